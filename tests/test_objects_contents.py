"""The contents of memory files: incremental files in the image directory, exactness, damage."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from podtree.errors import Damaged
from podtree.kernel.pageruns import subtract_runs
from podtree.kernel.sys import PAGE_SIZE
from podtree.objects import contents
from podtree.objects.contents import Contents


@pytest.fixture
def image(tmp_path: Path) -> tuple[Path, int]:
    return tmp_path, os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)


def checkpoint(image: tuple[Path, int], **files: int) -> int:
    """Capture and write; returns the bytes of data written."""
    saved = Contents(image[0])
    for key, fd in files.items():
        saved.capture(key, fd)
    saved.write(image[1])
    return saved.changed_bytes


def loaded(image: tuple[Path, int], key: str, size: int) -> bytes:
    fd = os.memfd_create("copy")
    try:
        contents.restore(image[1], key, fd, size)
        return os.pread(fd, size + 1, 0)
    finally:
        os.close(fd)


def test_only_changed_pages_are_written(image: tuple[Path, int]) -> None:
    fd = os.memfd_create("x")
    os.pwrite(fd, os.urandom(1000 * PAGE_SIZE), 0)
    assert checkpoint(image, a=fd) == 1000 * PAGE_SIZE
    assert checkpoint(image, a=fd) == 0
    os.pwrite(fd, b"!", 17 * PAGE_SIZE + 5)
    assert checkpoint(image, a=fd) == PAGE_SIZE
    assert loaded(image, "a", 1000 * PAGE_SIZE) == os.pread(fd, 1000 * PAGE_SIZE, 0)
    assert os.lseek(fd, 0, os.SEEK_CUR) == 0
    os.close(fd)


def test_holes_sizes_and_zeros(image: tuple[Path, int]) -> None:
    fd = os.memfd_create("x")
    size = (5 << 30) + 123
    os.ftruncate(fd, size)
    os.pwrite(fd, b"begin", 0)
    os.pwrite(fd, b"end", size - 3)
    os.pwrite(fd, bytes(PAGE_SIZE), 50 * PAGE_SIZE)  # a page of zeros is no data
    assert checkpoint(image, a=fd) == 2 * PAGE_SIZE
    copy = os.memfd_create("copy")
    contents.restore(image[1], "a", copy, size)
    assert os.fstat(copy).st_size == size
    assert os.pread(copy, 5, 0) == b"begin"
    assert os.pread(copy, 10, size - 3) == b"end"
    assert os.fstat(copy).st_blocks * 512 == 2 * PAGE_SIZE
    contents.punch_hole(fd, 0, PAGE_SIZE)
    os.ftruncate(fd, 100 * PAGE_SIZE)
    assert checkpoint(image, a=fd) == 0
    assert loaded(image, "a", 100 * PAGE_SIZE) == bytes(100 * PAGE_SIZE)
    assert (image[0] / "shm" / "a").stat().st_blocks == 0
    os.close(fd)
    os.close(copy)


def test_random_history(image: tuple[Path, int]) -> None:
    rng = random.Random(7)
    fd = os.memfd_create("x")
    for _ in range(60):
        match rng.randrange(4):
            case 0:
                os.ftruncate(fd, rng.randrange(64 * PAGE_SIZE))
            case 1:
                first, count = rng.randrange(60), rng.randrange(1, 9)
                contents.punch_hole(fd, first * PAGE_SIZE, count * PAGE_SIZE)
            case _:
                os.pwrite(fd, rng.randbytes(rng.randrange(1, 9000)), rng.randrange(60 * PAGE_SIZE))
        checkpoint(image, a=fd)
        size = os.fstat(fd).st_size
        assert loaded(image, "a", size) == os.pread(fd, size, 0)
        contents.verify(image[1], "a", size)
    os.close(fd)


def test_files_replaced_behind_its_back(image: tuple[Path, int]) -> None:
    """What this process remembers of the files counts only while they are the same (a rewind replaces them)."""
    fd = os.memfd_create("x")
    os.write(fd, b"old" * 5000)
    checkpoint(image, a=fd)
    (image[0] / "shm").rename(image[0] / "kept")
    os.pwrite(fd, b"new" * 5000, 0)
    checkpoint(image, a=fd)
    for path in (image[0] / "shm").iterdir():
        path.unlink()
    (image[0] / "shm").rmdir()
    (image[0] / "kept").rename(image[0] / "shm")
    assert checkpoint(image, a=fd) == 4 * PAGE_SIZE
    assert loaded(image, "a", 15_000) == b"new" * 5000
    os.close(fd)


def test_vanished_files_are_removed(image: tuple[Path, int]) -> None:
    fd = os.memfd_create("x")
    os.write(fd, b"x")
    checkpoint(image, a=fd, b=fd)
    checkpoint(image, b=fd)
    assert sorted(os.listdir(image[0] / "shm")) == ["b", "b.map", "b.sum"]
    os.close(fd)


def test_killed_between_data_and_map(image: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a killed writer left, the next checkpoint is right."""
    fd = os.memfd_create("x")
    os.write(fd, b"one" * 5000)
    checkpoint(image, a=fd)
    os.pwrite(fd, b"two" * 5000, 0)
    saved = Contents(image[0])
    saved.capture("a", fd)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        saved.write(image[1])
    monkeypatch.undo()
    os.pwrite(fd, b"one" * 5000, 0)
    checkpoint(image, a=fd)
    assert loaded(image, "a", 15000) == b"one" * 5000
    assert sorted(os.listdir(image[0] / "shm")) == ["a", "a.map", "a.sum"]
    os.close(fd)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "harm",
    [
        lambda d: _flip(d / "a"),
        lambda d: _flip(d / "a.sum"),
        lambda d: _flip(d / "a.map"),
        lambda d: (d / "a").unlink(),
        lambda d: (d / "a.sum").write_bytes(b""),
        lambda d: (d / "a.map").write_bytes(b"short"),
    ],
)
def test_damage_is_noticed(image: tuple[Path, int], harm: Callable[[Path], object]) -> None:
    fd = os.memfd_create("x")
    os.write(fd, os.urandom(40_000))
    checkpoint(image, a=fd)
    harm(image[0] / "shm")
    with pytest.raises(Damaged):
        loaded(image, "a", 40_000)
    with pytest.raises(Damaged):
        contents.verify(image[1], "a", 40_000)
    os.close(fd)


@pytest.mark.parametrize("key", ["", "../x", "a/b", ".", "A", "x" * 200])
def test_keys_are_plain_names(image: tuple[Path, int], key: str) -> None:
    with pytest.raises(Damaged):
        contents.restore(image[1], key, -1, 0)


def test_runs_difference() -> None:
    rng = random.Random(3)

    def runs() -> tuple[list[tuple[int, int]], set[int]]:
        pages = {p for p in range(60) if rng.random() < 0.5}
        made: list[tuple[int, int]] = []
        for page in sorted(pages):
            if made and sum(made[-1]) == page and rng.random() < 0.8:
                made[-1] = (made[-1][0], made[-1][1] + 1)
            else:
                made.append((page, 1))
        return made, pages

    for _ in range(300):
        (a, a_pages), (b, b_pages) = runs(), runs()
        left = subtract_runs(a, b)
        assert {p for first, count in left for p in range(first, first + count)} == a_pages - b_pages


def test_a_restored_inode_keeps_its_key(image: tuple[Path, int]) -> None:
    fd = os.memfd_create("x")
    os.write(fd, b"data" * 5000)
    saved = Contents(image[0])
    key = saved.key_for(fd, "memfd")
    saved.capture(key, fd)
    saved.write(image[1])
    copy = os.memfd_create("y")
    contents.restore(image[1], key, copy, 20_000)
    following = Contents(image[0])
    assert following.key_for(copy, "memfd") == key
    assert following.key_for(fd, "memfd") != key  # taken by now
    following.capture(key, copy)
    assert following.changed_bytes == 0
    os.close(fd)
    os.close(copy)
