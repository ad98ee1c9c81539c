"""Python's multiprocessing: pools, queues, managers, shared memory, semaphores, by fork and by spawn."""

from __future__ import annotations

import pytest
from branching import branch_twice, line_count, lines_grow

from driver import SYSTEM_PYTHON, WORKLOADS, Pod, Podtree

PLACE = "/var/lib/podtest-pools"


def mark(pod: Pod, word: str) -> None:
    pod.sh(f"echo {word} > {PLACE}/mark; echo {word} > /dev/shm/mark")


def seen(pod: Pod) -> object:
    memory, file = pod.sh(f"cat /dev/shm/mark {PLACE}/mark").split()
    return memory if memory == file else (memory, file)


def goes_on(pod: Pod) -> None:
    lines_grow(pod, f"{PLACE}/progress")
    pod.sh(f"touch {PLACE}/calm")


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.timeout(300)
def test_pools(podtree: Podtree, method: str) -> None:
    start = f"mkdir -p {PLACE} && exec {SYSTEM_PYTHON} {WORKLOADS}/inside_pools.py {method} {PLACE}"
    pod = podtree.run("sh", "-c", start, name=method)
    pod.wait_log("READY", 60)
    lives = branch_twice(podtree, pod, mark, seen, goes_on)
    for one in lives.all:
        assert line_count(one, f"{PLACE}/progress") > 0 and "BAD" not in one.logs(), one.logs()
