"""The next rewind of a pod is made ready ahead: the same as any other, and nothing of it stays when nobody wants it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from driver import SYSTEM_PYTHON, Pod, Podtree, until
from pod_fixtures import supervisor_of, wait_gone

LOOP = "while :; do sleep 0.05; done"
CLOCK = """
import time
last, worst = time.monotonic(), 0
while True:
    time.sleep(0.01)
    now = time.monotonic()
    last, worst = now, max(worst, now - last)
    open("/tmp/worst", "w").write(repr(worst))
"""


def groups_of(pod: Pod) -> dict[str, list[int]]:
    """What is in a pod's control groups, by their names."""
    found = {}
    for path in Path("/sys/fs/cgroup").glob(f"**/podtree/{pod.info()['id']}*"):
        found[path.name] = [int(line) for line in (path / "cgroup.procs").read_text().split()]
    return found


def ready(pod: Pod) -> list[int]:
    """Waits until the next rewind is ready; host pids of its processes."""
    init = int(pod.info()["pid"])

    def found() -> list[int] | None:
        others = [tasks for tasks in groups_of(pod).values() if tasks and init not in tasks]
        states = [Path(f"/proc/{pid}/stat").read_text().split()[2] for tasks in others for pid in tasks]
        return others[0] if states and set(states) == {"t"} and responsive(pod) else None

    return until(found, "the next rewind is ready")


def responsive(pod: Pod) -> bool:
    """The supervisor has nothing else to do: it is not just building."""
    return pod.podtree("exec", pod.name, "--", "true").code == 0


def rewound(pod: Pod, ref: str) -> None:
    pod.podtree("rewind", pod.name, ref)


def test_the_next_one_is_there_already(podtree: Podtree) -> None:
    pod = podtree.run("sh", "-c", "echo one > /tmp/file; " + LOOP)
    until(lambda: pod.sh("cat /tmp/file || true") == "one", "the file is there")
    ref = pod.checkpoint()
    for round_number in range(3):
        pod.sh(f"echo {round_number} > /tmp/file; touch /tmp/new")
        tasks = ready(pod) if round_number else []
        rewound(pod, ref)
        if tasks:
            assert int(pod.info()["pid"]) in tasks
        assert pod.sh("cat /tmp/file; ls /tmp/new 2>/dev/null || true") == "one"
    assert podtree.branch(pod.checkpoint()).sh("cat /tmp/file") == "one"
    podtree("fsck")
    podtree("gc")
    assert pod.running()


def test_no_time_passes_for_what_waits(podtree: Podtree) -> None:
    pod = podtree.run(SYSTEM_PYTHON, "-c", CLOCK)
    until(lambda: pod.sh("cat /tmp/worst || true"), "it runs")
    ref = pod.checkpoint()
    rewound(pod, ref)
    tasks = ready(pod)
    time.sleep(8)
    rewound(pod, ref)
    assert int(pod.info()["pid"]) in tasks
    time.sleep(0.5)
    assert float(pod.read("/tmp/worst")) < 7


def test_another_checkpoint(podtree: Podtree) -> None:
    pod = podtree.run("sh", "-c", LOOP)
    first = pod.checkpoint()
    pod.sh("echo later > /tmp/file")
    second = pod.checkpoint()
    rewound(pod, first)
    tasks = ready(pod)
    rewound(pod, second)
    assert pod.read("/tmp/file") == "later\n"
    for pid in tasks:
        wait_gone(pid)


def test_what_ends_with_the_pod(podtree: Podtree) -> None:
    pod = podtree.run("sh", "-c", LOOP)
    ref = pod.checkpoint()
    rewound(pod, ref)
    tasks = ready(pod)
    pod.kill()
    pod.wait()
    for pid in tasks:
        wait_gone(pid)
    until(lambda: not groups_of(pod), "no control group is left")
    podtree("gc")
    assert os.listdir(podtree.home / "pool" / "drafts") == []


def test_supervisor_dies_while_it_waits(podtree: Podtree) -> None:
    """The pod goes on; what was made ready goes."""
    pod = podtree.run("sh", "-c", LOOP)
    ref = pod.checkpoint()
    rewound(pod, ref)
    tasks, init = ready(pod), int(pod.info()["pid"])
    os.kill(supervisor_of(pod), signal.SIGKILL)
    for pid in tasks:
        wait_gone(pid)
    assert pod.sh("echo still") == "still"
    until(lambda: len(groups_of(pod)) == 1, "only the pod's own groups are left")
    assert int(pod.info()["pid"]) == init
    rewound(pod, ref)
    rewound(pod, ref)
    assert pod.running()


def test_a_checkpoint_that_cannot_be_brought_back_ends_nothing(podtree: Podtree) -> None:
    pod = podtree.run("sh", "-c", LOOP)
    ref = pod.checkpoint()
    rewound(pod, ref)
    ready(pod)
    podtree("discard", ref)
    podtree("rewind", pod.name, ref, code=4)
    assert pod.running()
