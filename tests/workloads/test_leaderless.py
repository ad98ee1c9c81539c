"""A real interpreter whose main thread has ended, as pid 1 of a pod: killed and branched, and the branches again."""

from __future__ import annotations

import pytest

from driver import SYSTEM_PYTHON, WORKLOADS, Pod, Podtree

PLACE = "/var/tmp/leaderless"


def highest(pod: Pod) -> list[int]:
    """How far each thread has counted, as its database says."""
    script = f"import sqlite3\nfor n in range(3): print(sqlite3.connect(f'{PLACE}/{{n}}.db').execute("
    return [int(word) for word in pod.python(script + "'SELECT max(value) FROM counted').fetchone()[0])").split()]


@pytest.mark.usefixtures("memory_mode")
def test_python_without_its_main_thread(podtree: Podtree) -> None:
    words = [SYSTEM_PYTHON, WORKLOADS / "inside_leaderless.py", PLACE]
    pod = podtree.run("sh", "-c", f'mkdir -p {PLACE}; exec "$@"', "sh", *words, name="leaderless")
    pod.wait_log("thread 2 at 40", 60)
    assert "zombie" in pod.read("/proc/1/status")
    first = pod.checkpoint()
    pod.wait_log("thread 2 at 80", 60)
    second = pod.checkpoint()
    pod.kill()
    one, two = podtree.branch(first, pod.name), podtree.branch(second, pod.name)
    for branch in (one, two):
        before = highest(branch)
        third = branch.checkpoint()
        assert "zombie" in branch.read("/proc/1/status")
        branch.kill()
        again = podtree.branch(third, branch.name)
        again.wait_log(f"thread 1 at {(max(before) // 20 + 2) * 20}", 60)
        assert "BAD" not in branch.logs() + again.logs()
        assert all(now > then for now, then in zip(highest(again), before, strict=True))
        again.kill()
