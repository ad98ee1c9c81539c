"""Page files: what is written is what is read, whatever was there before, and the sums say so."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podtree.errors import Damaged
from podtree.image.pages import PageFile, load_map, remove
from podtree.kernel.pageruns import Run, merge_runs, subtract_runs
from podtree.kernel.sys import PAGE_SIZE
from podtree.pool.verify import verify_pages

runs = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 20)), max_size=12)


def pages_of(these: list[Run]) -> set[int]:
    return {page for first, count in these for page in range(first, first + count)}


@given(runs)
def test_merged_runs_cover_the_same_pages_without_touching(these: list[Run]) -> None:
    merged = merge_runs(these)
    assert pages_of(merged) == pages_of(these)
    assert all(a[0] + a[1] < b[0] for a, b in pairwise(merged))


@given(runs, runs)
def test_subtraction_is_that_of_sets(these: list[Run], minus: list[Run]) -> None:
    left = subtract_runs(merge_runs(these), merge_runs(minus))
    assert pages_of(left) == pages_of(these) - pages_of(minus)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def page(number: int, version: int) -> bytes:
    return (number.to_bytes(4, "little") + version.to_bytes(4, "little")) * (PAGE_SIZE // 8)


def save(fd: int, memory: dict[int, bytes], *, compare: bool, name: str = "1") -> int:
    """What a checkpoint does with the page file of an address space that looks like `memory`."""
    saved = merge_runs((number, 1) for number in memory)
    with PageFile(fd, name) as file:
        old = file.old_map()
        for first, count in saved:
            data = memoryview(b"".join(memory[number] for number in range(first, first + count)))
            if compare:
                file.write_changed(first, data)
                file.ensure_sums(first, count)
            else:
                file.write(first, data)
        written = file.bytes_written
        file.save_map(saved, old)
    return written


def load(fd: int, name: str = "1") -> dict[int, bytes]:
    data = os.open(name, os.O_RDONLY, dir_fd=fd)
    try:
        return {n: os.pread(data, PAGE_SIZE, n * PAGE_SIZE) for n in pages_of(load_map(fd, name))}
    finally:
        os.close(data)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.dictionaries(st.integers(0, 40), st.integers(0, 3), max_size=20), st.booleans()),
        min_size=1,
        max_size=5,
    )
)
def test_any_history_of_memories_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[dict[int, int], bool]]
) -> None:
    """Pages come, change, go and come back as zeros (version 0), saved with and without comparing."""
    place = tmp_path_factory.mktemp("pages")
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for versions, compare in history:
            memory = {n: page(n, v) if v else bytes(PAGE_SIZE) for n, v in versions.items()}
            save(fd, memory, compare=compare)
            assert load(fd) == memory
            assert verify_pages(place / "1") == []
    finally:
        os.close(fd)


def test_comparing_writes_only_what_differs(directory: int) -> None:
    memory = {n: page(n, 1) for n in range(1000)}
    save(directory, memory, compare=True)
    assert save(directory, memory, compare=True) == 0
    memory[500] = page(500, 2)
    memory[501] = page(501, 2)
    assert save(directory, memory, compare=True) == 2 * PAGE_SIZE
    assert load(directory) == memory


def test_pages_that_are_gone_take_no_space(directory: int, tmp_path: Path) -> None:
    save(directory, {n: page(n, 1) for n in range(2000)}, compare=False)
    full = (tmp_path / "1").stat().st_blocks
    save(directory, {0: page(0, 1)}, compare=False)
    assert (tmp_path / "1").stat().st_blocks < full / 100


def test_addresses_of_the_whole_address_space() -> None:
    memory = {0x7FFFFFFFE: page(1, 1), 0x10: page(2, 1)}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:  # tmpfs, as btrfs, takes such offsets
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        save(fd, memory, compare=False)
        assert load(fd) == memory
        os.close(fd)


def test_damage_of_the_map_is_named(directory: int, tmp_path: Path) -> None:
    save(directory, {1: page(1, 1)}, compare=False)
    raw = bytearray((tmp_path / "1.map").read_bytes())
    raw[40] ^= 1
    (tmp_path / "1.map").write_bytes(raw)
    with pytest.raises(Damaged, match=r"1\.map"):
        load_map(directory, "1")


def test_removal_leaves_nothing(directory: int, tmp_path: Path) -> None:
    save(directory, {1: page(1, 1)}, compare=False)
    remove(directory, "1")
    assert list(tmp_path.iterdir()) == []
