"""Files below a directory, however deep: a path may be longer than the kernel takes at once (PATH_MAX, 4096 bytes).

No symbolic link is followed, and nothing outside of the directory is reached: openat2(2).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence

from podtree.kernel.mount import Resolve, openat2

_STRICT = Resolve.BENEATH | Resolve.NO_SYMLINKS
_LONGEST = 3000  # bytes that are opened at once


def open_below(top: int, parts: Sequence[str], flags: int) -> int:
    """Open the file at `parts` below the directory `top`; close-on-exec. Raises OSError, ELOOP for a symbolic link."""
    if not parts:
        return os.open(f"/proc/self/fd/{top}", flags | os.O_CLOEXEC)
    steps = list(_steps(parts))
    opened: list[int] = []
    try:
        for step in steps[:-1]:
            opened.append(openat2(opened[-1] if opened else top, step, os.O_PATH | os.O_DIRECTORY, _STRICT))
        return openat2(opened[-1] if opened else top, steps[-1], flags, _STRICT)
    finally:
        for fd in opened:
            os.close(fd)


def _steps(parts: Sequence[str]) -> Iterator[str]:
    piece: list[str] = []
    length = 0
    for part in parts:
        size = len(os.fsencode(part)) + 1
        if piece and length + size > _LONGEST:
            yield "/".join(piece)
            piece, length = [], 0
        piece.append(part)
        length += size
    yield "/".join(piece)


def walk(top: int) -> Iterator[tuple[tuple[str, ...], os.stat_result | OSError]]:
    """(parts, what it is) of everything below the directory `top`, or why that can't be told."""
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        directory = waiting.pop()
        try:
            fd = open_below(top, directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            yield directory, error
            continue
        try:
            found = list(_entries(fd))
        except OSError as error:
            yield directory, error
            continue
        finally:
            os.close(fd)
        for name, info in found:
            path = (*directory, name)
            yield path, info
            if isinstance(info, os.stat_result) and stat.S_ISDIR(info.st_mode):
                waiting.append(path)


def _entries(fd: int) -> Iterator[tuple[str, os.stat_result | OSError]]:
    for name in sorted(os.listdir(fd)):
        try:
            yield name, os.stat(name, dir_fd=fd, follow_symlinks=False)
        except OSError as error:
            yield name, error
