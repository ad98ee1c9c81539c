"""Moments worth keeping: marked from outside, by the pod, and by the ends of its processes."""

from __future__ import annotations

from typing import Any

from driver import SYSTEM_PYTHON, Pod, Podtree, until

COUNTER = "import time\nn = 0\nwhile True:\n    n += 1; print(n, flush=True); time.sleep(0.02)"


def marked(pod: Pod, number: int) -> list[dict[str, Any]]:
    """Waits for so many marked checkpoints; oldest first."""

    def probe() -> list[dict[str, Any]] | None:
        found = [one for one in pod.podtree.json("log", pod.name) if "mark" in one]
        return found[::-1] if len(found) >= number else None

    return until(
        probe, f"{number} marks of {pod.name}", 60, 0.1, lambda: pod.podtree("record", pod.name, code=None).out
    )


def test_from_outside(podtree: Podtree) -> None:
    """Of any running pod; no recorder thins it."""
    pod = podtree.run(SYSTEM_PYTHON, "-c", COUNTER)
    one = podtree("mark", pod.name, "before the upgrade").out.strip()
    (found,) = marked(pod, 1)
    assert (found["id"], found["mark"], found["message"]) == (one, "before the upgrade", "before the upgrade")
    assert "recorded" not in found and "(mark" in podtree("log", pod.name).out
    podtree("mark", pod.name, " ", code=2)


def test_by_the_pod(podtree: Podtree) -> None:
    """Whoever its programs run as, however they write; also in a branch. What isn't a plain file there isn't read."""
    pod = podtree.run(SYSTEM_PYTHON, "-c", COUNTER, options=["--every", "300ms"])
    until(lambda: podtree.json("record", pod.name)["taken"] >= 1, "it is recorded")
    podtree("exec", "-u", "65534", pod.name, "--", "sh", "-c", "echo first > /run/podtree/mark")
    first = marked(pod, 1)[0]
    assert (first["mark"], first["recorded"]) == ("first", True)
    assert first["marked_before"] in {one["id"] for one in podtree.json("log", pod.name)}
    pod.sh("printf 'x\nsecond\n' >> /run/podtree/mark")
    assert marked(pod, 2)[1]["mark"] == "second"
    pod.sh("cd /run/podtree; rm mark; echo third > new; mv new mark")
    assert marked(pod, 3)[2]["mark"] == "third"
    pod.sh("for n in $(seq 0 29); do echo many $n > /run/podtree/mark; done")  # no more than one a second
    many = until(lambda: [one for one in marked(pod, 4) if one["mark"].endswith("many 29")], "the last of many")
    assert len(marked(pod, 4)) < 25 and many
    strange = "ln -s /etc/passwd link; mv -T link mark; mkfifo fifo; mv -T fifo mark; rm mark"
    pod.sh(f"cd /run/podtree; {strange}; echo last > mark")
    until(lambda: [one for one in marked(pod, 5) if one["mark"].endswith("last")], "the last")
    assert not [one for one in marked(pod, 5) if ":" in one["mark"]], "a link was followed"
    branch = podtree.branch(first["id"])
    podtree("record", branch.name, "--every", "300ms")
    branch.sh("echo in a branch > /run/podtree/mark")
    assert marked(branch, 1)[0]["mark"] == "in a branch"
    podtree("rewind", branch.name, marked(branch, 1)[0]["id"])
    branch.sh("echo rewound > /run/podtree/mark")
    assert until(lambda: [one for one in marked(branch, 2) if one["mark"].endswith("rewound")], "it is watched again")


SPAWNER = """
import os, signal, subprocess, sys, time
def wait(name):
    while not os.path.exists(name): time.sleep(0.02)
for name, words in (("/tmp/one", ["sh", "-c", "exit 3"]), ("/tmp/two", ["sh", "-c", "kill -SEGV $$"]),
                    ("/tmp/three", ["sh", "-c", "kill -TERM $$"]), ("/tmp/four", ["sh", "-c", "exit 0"]),
                    ("/tmp/five", ["sh", "-c", "exit 5"])):
    wait(name)
    subprocess.run(words)
time.sleep(1000)
"""


def test_a_process_that_ends_with_an_error(podtree: Podtree) -> None:
    """The moment after is marked, and names the one before; ends that were asked for aren't errors."""
    pod = podtree.run(SYSTEM_PYTHON, "-c", SPAWNER, options=["--every", "300ms"])
    until(lambda: podtree.json("record", pod.name)["taken"] >= 1, "it is recorded")
    assert podtree.json("record", pod.name)["unnoticed"] == []
    pod.sh("touch /tmp/one")
    first = marked(pod, 1)[0]
    assert first["mark"].endswith("ended with 3")
    assert first["marked_before"] in {one["id"] for one in podtree.json("log", pod.name)}
    pod.sh("touch /tmp/two")
    assert "SIGSEGV" in marked(pod, 2)[1]["mark"]
    pod.sh("touch /tmp/three /tmp/four /tmp/five")
    assert marked(pod, 3)[2]["mark"].endswith("ended with 5")
