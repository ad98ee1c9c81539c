"""Memory honesty: programs that know every byte of their memory, and check it, before and after.

Checkpoints fall at any instant of their work, under several allocators; in each new life they go on allocating,
with their memory filled before, or while they work.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import find_program
from driver import Podtree
from lives import start, verify

ALLOCATORS: dict[str, tuple[str, ...]] = {
    "glibc": (),
    "glibc-tight": ("-e", "GLIBC_TUNABLES=glibc.malloc.trim_threshold=0:glibc.malloc.mmap_threshold=4096"),
    "jemalloc": ("-e", "LD_PRELOAD=libjemalloc.so.2"),
    "jemalloc-eager": (
        "-e",
        "LD_PRELOAD=libjemalloc.so.2",
        "-e",
        "MALLOC_CONF=dirty_decay_ms:0,muzzy_decay_ms:0,junk:false",
    ),
}


def several_lives(podtree: Podtree, program: Path, case: str, options: tuple[str, ...]) -> None:
    """Two checkpoints of the busy program, a branch of each, one of a branch's own; all check every byte."""
    origin = start(podtree, program, case, name=case.replace("_", "-"), options=options)
    first = origin.checkpoint()
    second = origin.checkpoint()
    one, two = podtree.branch(first, "one"), podtree.branch(second, "two")
    third = podtree.branch(one.checkpoint(), "three")
    verify(one, two, third, origin, seconds=170)


@pytest.mark.needs("gcc")
@pytest.mark.usefixtures("memory_mode")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(1, 3))
def test_memory_calls(podtree: Podtree, compiled: Callable[[str], Path], seed: int) -> None:
    several_lives(podtree, compiled("churn"), "calls", ("-e", f"SEED={seed}"))


@pytest.mark.needs("gcc", "libjemalloc.so.2")
@pytest.mark.usefixtures("memory_mode")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("case", "allocator"),
    [*(("heap", allocator) for allocator in ALLOCATORS), ("heap_processes", "glibc"), ("heap_processes", "jemalloc")],
)
def test_allocators(podtree: Podtree, compiled: Callable[[str], Path], allocator: str, case: str) -> None:
    assert "jemalloc" not in allocator or find_program("libjemalloc.so.2")
    several_lives(podtree, compiled("churn"), case, ALLOCATORS[allocator])
