"""A branch that was made ready ahead is the same as any other: only quicker, and gone when nobody wants it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from driver import SYSTEM_PYTHON, Pod, Podtree, until
from pod_fixtures import parent, supervisor_of, wait_gone

LOOP = "while :; do sleep 0.05; done"
CLOCKS = """
import os, threading, time
worst = {}
def watch(name):
    last = time.monotonic()
    while True:
        time.sleep(0.01)
        now = time.monotonic()
        worst[name] = max(worst.get(name, 0), now - last)
        last = now
for name in ("one", "two", "three"):
    threading.Thread(target=watch, args=(name,), daemon=True).start()
if os.fork() == 0:
    watch("child")
timer = os.timerfd_create(time.CLOCK_MONOTONIC) if hasattr(os, "timerfd_create") else None
print("READY", flush=True)
while True:
    open("/tmp/worst", "w").write(repr(max(worst.values(), default=0)))
    time.sleep(0.05)
"""


def waiting(podtree: Podtree) -> set[str]:
    """Ids of branches that are there already, and that no pod has."""
    run = podtree.home / "run"
    known = {pod["id"] for pod in podtree.json("ps", "-a")}
    return {entry.name for entry in run.iterdir() if len(entry.name) == 12} - known


def ready_one(podtree: Podtree) -> str:
    """Waits for a standby whose supervisor waits for an order; its id."""

    def found() -> str | None:
        for pod in waiting(podtree):
            supervisor = supervisor_of_standby(podtree, pod)
            if supervisor and "unix_stream" in Path(f"/proc/{supervisor}/wchan").read_text():
                return pod
        return None

    return until(found, "a branch is kept ready")


def supervisor_of_standby(podtree: Podtree, pod: str) -> int:
    """0 if it has none yet."""
    tasks = tasks_of(pod)
    return int(parent(tasks[0])) if tasks else 0


def tasks_of(pod: str) -> list[int]:
    """Host pids of all that is in a pod's groups."""
    for group in Path("/sys/fs/cgroup").glob(f"**/podtree/{pod}/cgroup.procs"):
        return [int(line) for line in group.read_text().split()]
    return []


def branch_from_standby(podtree: Podtree, ref: str) -> Pod:
    """A branch that was made ready ahead."""
    for _ in range(20):
        podtree.branch(ref).kill()
        ready = ready_one(podtree)
        branch = podtree.branch(ref)
        if branch.info()["id"] == ready:
            return branch
    raise AssertionError("no branch is the one that was kept ready")


def test_the_next_branch_is_there_already(podtree: Podtree) -> None:
    origin = podtree.run("sh", "-c", "echo one > /tmp/file; " + LOOP)
    ref = origin.checkpoint()
    origin.sh("echo two > /tmp/file")
    branch = branch_from_standby(podtree, ref)
    assert branch.read("/tmp/file") == "one\n"
    again = podtree.branch(branch.checkpoint())
    assert again.read("/tmp/file") == "one\n"
    assert origin.read("/tmp/file") == "two\n"
    assert podtree.json("show", ref)["branches"].count(branch.name) == 1


def test_it_takes_any_name(podtree: Podtree) -> None:
    origin = podtree.run("sh", "-c", LOOP)
    ref = origin.checkpoint()
    podtree.branch(ref)
    ready = ready_one(podtree)
    named = podtree("branch", "--name", "chosen", ref).out.strip()
    podtree.note_pods()
    assert named == "chosen"
    assert Pod(podtree, named).info()["id"] == ready
    ready_one(podtree)
    assert "chosen" in podtree("branch", "--name", "chosen", ref, code=5).err


def test_no_time_passes_for_what_waits(podtree: Podtree) -> None:
    """All tasks are in the same new time namespace, and find their clocks where they stood."""
    origin = podtree.run(SYSTEM_PYTHON, "-c", CLOCKS)
    origin.wait_log("READY")
    time.sleep(0.5)
    ref = origin.checkpoint()
    podtree.branch(ref)
    ready = ready_one(podtree)
    time.sleep(8)
    branch = podtree.branch(ref)
    assert branch.info()["id"] == ready
    time.sleep(0.5)
    assert float(branch.read("/tmp/worst")) < 7
    tasks = [task for pid in tasks_of(ready) for task in os.listdir(f"/proc/{pid}/task")]
    spaces = {os.readlink(f"/proc/{task}/ns/time") for task in tasks}
    assert len(tasks) >= 5
    assert len(spaces) == 1
    assert spaces != {os.readlink("/proc/self/ns/time")}


def test_it_goes_when_its_keeper_goes(podtree: Podtree) -> None:
    origin = podtree.run("sh", "-c", LOOP)
    ref = origin.checkpoint()
    branch = podtree.branch(ref)
    ready = ready_one(podtree)
    supervisor, tasks = supervisor_of_standby(podtree, ready), tasks_of(ready)
    origin.kill()
    origin.wait()
    for pid in (supervisor, *tasks):
        wait_gone(pid)
    until(lambda: not waiting(podtree), "nothing of it is left in run/")
    assert not (podtree.home / "pool" / "pods" / ready).exists()
    assert not list(Path("/sys/fs/cgroup").glob(f"**/podtree/{ready}"))
    assert not (podtree.home / "locks" / ready).exists()
    assert branch.running()
    podtree("fsck")


def test_neither_gc_nor_fsck_mistake_it_for_a_leftover(podtree: Podtree) -> None:
    origin = podtree.run("sh", "-c", LOOP)
    ref = origin.checkpoint()
    podtree.branch(ref)
    ready = ready_one(podtree)
    podtree("gc")
    podtree("fsck")
    assert podtree.branch(ref).info()["id"] == ready


def test_killed_while_it_waits(podtree: Podtree) -> None:
    """Whoever wants a branch gets one all the same."""
    origin = podtree.run("sh", "-c", LOOP)
    ref = origin.checkpoint()
    podtree.branch(ref)
    ready = ready_one(podtree)
    os.kill(supervisor_of_standby(podtree, ready), signal.SIGKILL)
    branch = podtree.branch(ref)
    assert branch.running()
    until(lambda: ready not in waiting(podtree), "what was killed is cleaned up")
    assert not tasks_of(ready)


def test_discarded_checkpoint(podtree: Podtree) -> None:
    """What was made ready of a checkpoint that is gone isn't to be had."""
    origin = podtree.run("sh", "-c", LOOP)
    ref = origin.checkpoint()
    podtree.branch(ref).remove()
    ready_one(podtree)
    podtree("discard", ref)
    podtree("branch", ref, code=4)


def test_not_of_what_shares_with_the_host(podtree: Podtree, tmp_path: Path) -> None:
    """A lock that the branch takes at its start, say, would be taken too early."""
    origin = podtree.run("sh", "-c", LOOP, options=["-v", f"{tmp_path}:/shared"])
    ref = origin.checkpoint()
    podtree.branch(ref)
    keeper = parent(supervisor_of(origin))
    time.sleep(1)
    assert not waiting(podtree)
    assert podtree.branch(ref).running()
    assert parent(keeper) >= 1


def test_not_with_much_memory_that_has_to_be_there(podtree: Podtree) -> None:
    """What may never be wanted isn't worth it."""
    program = "import os, time; f = os.memfd_create('big'); os.write(f, bytes(256 << 20)); print('READY', flush=True)"
    origin = podtree.run(SYSTEM_PYTHON, "-c", f"{program}\nwhile True: time.sleep(0.1)")
    origin.wait_log("READY")
    ref = origin.checkpoint()
    podtree.branch(ref)
    until(lambda: not waiting(podtree), "what was begun is given up")
    time.sleep(1)
    assert not waiting(podtree)
    assert podtree.branch(ref).running()
