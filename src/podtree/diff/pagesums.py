"""How many pages differ between two files of pages, told from their maps and checksums alone."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple

from podtree.image.pages import load_map
from podtree.kernel.pageruns import Run, merge_runs, subtract_runs


class PageCount(NamedTuple):
    """Numbers of pages of 4096 bytes."""

    changed: int
    added: int
    removed: int

    @property
    def all(self) -> int:
        return self.changed + self.added + self.removed


def count(old: Path | None, new: Path | None) -> PageCount:
    """From the file of pages `old` to `new`; None: there was none. Raises Damaged, OSError."""
    with _PageSums(old) as a, _PageSums(new) as b:
        common = subtract_runs(a.runs, subtract_runs(a.runs, b.runs))
        return PageCount(
            sum(_differing(a.read(*run), b.read(*run)) for run in common),
            _total(subtract_runs(b.runs, a.runs)),
            _total(subtract_runs(a.runs, b.runs)),
        )


def _total(runs: list[Run]) -> int:
    return sum(count for _, count in runs)


def _differing(a: bytes, b: bytes) -> int:
    if a == b:
        return 0
    return sum(x != y for x, y in zip(struct.iter_unpack("<Q", a), struct.iter_unpack("<Q", b), strict=True))


class _PageSums:
    """Map and checksums of one file of pages."""

    def __init__(self, path: Path | None) -> None:
        self.runs: list[Run] = []
        self._fd = -1
        if path is None:
            return
        dir_fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.runs = merge_runs(load_map(dir_fd, path.name))
            self._fd = os.open(f"{path.name}.sum", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=dir_fd)
        finally:
            os.close(dir_fd)

    def __enter__(self) -> _PageSums:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def read(self, first: int, count: int) -> bytes:
        return os.pread(self._fd, count * 8, first * 8).ljust(count * 8, b"\0")
