"""A tree of files as a table of entries, and its contents as chunks for a sink."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec
from blake3 import blake3

from podtree.kernel import fdops
from podtree.kernel.below import open_below, walk
from podtree.objects.held import path_text
from podtree.transfer.schema import TOP, UNITS, XATTRS, Entry, Parts, Run, TreeDigest, not_carried

_BLOCK = 1 << 20  # bytes read at once; a multiple of every unit
_ZEROS = bytes(max(UNITS.values()))
_NO_XATTRS = (errno.ENOTSUP, errno.ENODATA)

Skip = Callable[[Parts], bool]


class Sink(Protocol):
    """Where chunks go."""

    def add(self, digest: bytes, piece: bytes, parts: Parts, at: int) -> int:
        """Take the chunk at offset `at` of the file `parts`; its number, for the runs."""


class NoSink:
    """For whoever wants the digest only."""

    def add(self, digest: bytes, piece: bytes, parts: Parts, at: int) -> int:
        return 0


def own_only(parts: Parts) -> bool:
    """What of a volume isn't carried: an overlay makes its own `work`, and each host's pool has a veil of its own."""
    place = parts[2:] if parts[:1] == ("mounts",) else parts
    return place[:1] in (("work",), ("veil",))


def nothing(_parts: Parts) -> bool:
    """A `Skip` for trees that are carried whole."""
    return False


class TreeReader:
    """Reads one tree. `name` is "vol", "img" or "base"; `living`: of a file system in use, where files come and go."""

    def __init__(self, name: str, top: int, sink: Sink, skip: Skip = nothing, *, living: bool = False) -> None:
        self.name = name
        self.unit = UNITS[name]
        self.digest = TreeDigest()
        self._top = top
        self._sink = sink
        self._skip = skip
        self._living = living
        self._names: dict[tuple[int, int], str] = {}

    def entries(self) -> Iterator[Entry]:
        """All of the tree, each entry complete. Raises OSError, PodtreeError."""
        yield self._entry((), os.fstat(self._top))
        skipped: set[Parts] = set()
        for parts, info in walk(self._top):
            if parts[:-1] in skipped or self._skip(parts):
                skipped.add(parts)
                continue
            if isinstance(info, OSError):
                if self._living and info.errno == errno.ENOENT:
                    continue
                raise OSError(info.errno, os.strerror(info.errno or 0), "/".join(parts))
            try:
                yield self._entry(parts, info)
            except FileNotFoundError:
                if not self._living:
                    raise

    def _entry(self, parts: Parts, info: os.stat_result) -> Entry:
        path = path_text(os.fsencode("/".join(parts))) if parts else TOP
        kind = stat.S_IFMT(info.st_mode)
        if kind != stat.S_IFDIR and info.st_nlink > 1:
            first = self._names.setdefault((info.st_dev, info.st_ino), path)
            if first != path:
                entry = Entry(path=path, kind=kind, same_as=first)
                self.digest.entry(entry)
                return entry
        # The top is opened by its descriptor's name in /proc, which is a link.
        fd = open_below(self._top, parts, os.O_PATH | (os.O_NOFOLLOW if parts else 0))
        try:
            return self._opened(parts, path, os.fstat(fd), fd)
        finally:
            os.close(fd)

    def _opened(self, parts: Parts, path: str, info: os.stat_result, fd: int) -> Entry:
        kind = stat.S_IFMT(info.st_mode)
        node = kind in (stat.S_IFCHR, stat.S_IFBLK)
        entry = Entry(
            path=path,
            kind=kind,
            mode=stat.S_IMODE(info.st_mode),
            uid=info.st_uid,
            gid=info.st_gid,
            atime=info.st_atime_ns,
            mtime=info.st_mtime_ns,
            size=info.st_size if kind == stat.S_IFREG else 0,
            device=(os.major(info.st_rdev), os.minor(info.st_rdev)) if node else (0, 0),
            target=path_text(os.fsencode(os.readlink("", dir_fd=fd))) if kind == stat.S_IFLNK else "",
            xattrs=_xattrs(fd, path),
        )
        self.digest.entry(entry)
        if kind != stat.S_IFREG or not entry.size:
            return entry
        return msgspec.structs.replace(entry, runs=tuple(self._contents(parts, entry.size, fd)))

    def _contents(self, parts: Parts, size: int, path_fd: int) -> list[Run]:
        fd = os.open(f"/proc/self/fd/{path_fd}", os.O_RDONLY | os.O_NOATIME | os.O_NONBLOCK | os.O_CLOEXEC)
        runs: list[Run] = []
        try:
            for at, piece in self._pieces(fd, size):
                digest = blake3(piece).digest()
                self.digest.chunk(at, digest)
                append(runs, at, self._sink.add(digest, piece, parts, at), self.unit)
        finally:
            os.close(fd)
        return runs

    def _pieces(self, fd: int, size: int) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of each chunk that isn't all zeros."""
        unit, done = self.unit, 0
        for start, end in fdops.data_extents(fd, size):
            end = min(end, size)
            at = max(done, start - start % unit)
            while at < end:
                block = _read(fd, at, min(_BLOCK, size - at, end + -end % unit - at))
                for index in range(0, len(block), unit):
                    piece = block[index : index + unit]
                    if piece != _ZEROS[: len(piece)]:
                        yield at + index, piece
                at += len(block)
            done = max(at, end)


def _read(fd: int, at: int, count: int) -> bytes:
    """All of it; a file that has got shorter meanwhile counts as filled up with zeros."""
    block = os.pread(fd, count, at)
    while len(block) < count:
        more = os.pread(fd, count - len(block), at + len(block))
        if not more:
            return block.ljust(count, b"\0")
        block += more
    return block


def append(runs: list[Run], at: int, number: int, unit: int) -> None:
    """One more chunk of a file, as part of the last run if that goes on so."""
    if runs:
        last = runs[-1]
        step = 1 if last.first >= 0 else -1
        follows = last.first + step * last.count == number and (last.first < 0) == (number < 0)
        if last.at + last.count * unit == at and follows:
            runs[-1] = Run(last.at, last.first, last.count + 1)
            return
    runs.append(Run(at, number, 1))


def _xattrs(fd: int, path: str) -> dict[str, bytes]:
    """Of an O_PATH descriptor: of the file itself, also of a symbolic link."""
    place = f"/proc/self/fd/{fd}"
    found: dict[str, bytes] = {}
    try:
        names = os.listxattr(place)
    except OSError as error:
        if error.errno in _NO_XATTRS:
            return {}
        raise
    strange = [name for name in names if not name.startswith(XATTRS)]
    if strange:
        raise not_carried(path, strange)
    for name in sorted(names):
        with contextlib.suppress(FileNotFoundError):
            found[name] = os.getxattr(place, name)
    return found


def digest_of(name: str, top: int, skip: Skip = nothing, sink: Sink | None = None) -> str:
    """The digest of a tree, in hex digits."""
    reader = TreeReader(name, top, sink or NoSink(), skip)
    for _entry in reader.entries():
        pass
    return reader.digest.hex()
