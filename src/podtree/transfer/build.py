"""A table of entries as a tree of files, made from nothing in an empty directory that is ours alone.

Entries come verified (schema): parents are directories of the same table, no name leads elsewhere. Nothing is followed
all the same.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator

from podtree.kernel.below import open_below
from podtree.objects.held import path_bytes
from podtree.transfer.schema import UNITS, Entry, Parts, pieces

_STEP = 1 << 27  # bytes copied between two looks at the room that is left

#: Where a chunk is: (descriptor, offset there).
Place = Callable[[int], tuple[int, int]]
Segment = tuple[int, int, int, int]  # descriptor, offset there, offset here, bytes


class Builder:
    """Makes one tree below the directory `top`. `room` is called now and then, to raise when space gets short."""

    def __init__(self, name: str, top: int, place: Place, room: Callable[[], None]) -> None:
        self._unit = UNITS[name]
        self._top = top
        self._place = place
        self._room = room
        self._copied = 0

    def build(self, entries: tuple[Entry, ...]) -> None:
        """Raises OSError, or what `place` and `room` raise."""
        for entry in entries:
            self._make(entry)
        for entry in reversed(entries):  # what is made in a directory changes its times
            if entry.kind == stat.S_IFDIR:
                fd = self._open(entry.parts, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    _dress(fd, entry)
                finally:
                    os.close(fd)

    def _open(self, parts: Parts, flags: int) -> int:
        return open_below(self._top, parts, flags | (os.O_NOFOLLOW if parts else 0))

    def _make(self, entry: Entry) -> None:
        parts = entry.parts
        if not parts:
            return
        parent = self._open(parts[:-1], os.O_RDONLY | os.O_DIRECTORY)
        try:
            if entry.same_as:
                self._link(entry, parent)
            elif entry.kind == stat.S_IFDIR:
                os.mkdir(parts[-1], 0o700, dir_fd=parent)
            else:
                self._make_file(entry, parts[-1], parent)
        finally:
            os.close(parent)

    def _link(self, entry: Entry, parent: int) -> None:
        first = os.fsdecode(path_bytes(entry.same_as)).split("/")
        there = self._open(tuple(first[:-1]), os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.link(first[-1], entry.parts[-1], src_dir_fd=there, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(there)

    def _make_file(self, entry: Entry, name: str, parent: int) -> None:
        if entry.kind == stat.S_IFREG:
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
            try:
                os.ftruncate(fd, entry.size)
                for segment in _segments(pieces(entry, self._unit), self._place):
                    self._copy(fd, segment)
                _dress(fd, entry)
            finally:
                os.close(fd)
            return
        if entry.kind == stat.S_IFLNK:
            os.symlink(path_bytes(entry.target), os.fsencode(name), dir_fd=parent)
        else:
            os.mknod(name, entry.kind | 0o600, os.makedev(*entry.device), dir_fd=parent)
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            _dress(fd, entry)
        finally:
            os.close(fd)

    def _copy(self, fd: int, segment: Segment) -> None:
        """Blocks are shared where they are whole (copy_file_range(2) clones them on btrfs)."""
        source, there, here, count = segment
        while count:
            step = min(count, _STEP - self._copied)
            done = os.copy_file_range(source, fd, step, there, here)
            if done == 0:
                raise OSError(5, "a file ended before its time")
            there, here, count = there + done, here + done, count - done
            self._copied += done
            if self._copied >= _STEP:
                self._copied = 0
                self._room()


def _segments(found: Iterator[tuple[int, int, int]], place: Place) -> Iterator[Segment]:
    """Chunks that lie behind each other in both files as one."""
    last: Segment | None = None
    for here, length, number in found:
        source, there = place(number)
        if last is not None and (last[0], last[1] + last[3], last[2] + last[3]) == (source, there, here):
            last = (last[0], last[1], last[2], last[3] + length)
            continue
        if last is not None:
            yield last
        last = (source, there, here, length)
    if last is not None:
        yield last


def _dress(fd: int, entry: Entry) -> None:
    """Owner, mode, attributes, times, in the order in which they don't undo each other."""
    place = f"/proc/self/fd/{fd}"  # of an O_PATH descriptor: the file itself, also a symbolic link
    os.chown(fd if entry.kind in (stat.S_IFREG, stat.S_IFDIR) else place, entry.uid, entry.gid)
    if entry.kind != stat.S_IFLNK:
        os.chmod(place, entry.mode)
    for name, value in entry.xattrs.items():
        os.setxattr(place, name, value)
    os.utime(place, ns=(entry.atime, entry.mtime))
