"""Contents of memory files (memfd, shared anonymous memory, tmpfs): page-wise incremental, in the live image directory.

Per inode and under a key that stays the same from checkpoint to checkpoint, `shm/` has

    KEY       the data: sparse, file offset = offset in the memory file; a page of zeros is a hole
    KEY.sum   the xxh3_64 of page i, little-endian, at offset 8*i (a hole where page i has no data)
    KEY.map   blake2b-256 of what follows, then little-endian u64 pairs (first page, number of pages) with data

`capture` runs while the pod is frozen: it hashes each page and keeps a copy of those whose hash differs from KEY.sum's.
`write` runs when the pod goes on again: O(changed) writes. KEY.map goes first and comes back last, so that whoever is
killed between leaves no map, and the next checkpoint takes all pages as changed.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import hashlib
import mmap
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from podtree.errors import Damaged
from podtree.kernel import fdops
from podtree.kernel.pageruns import subtract_runs
from podtree.kernel.sys import PAGE_SIZE

DIRECTORY = "shm"
BLOCK = 256  # pages read at a time
DIGEST = 32
KEY_XATTR = "trusted.podtree.key"  # of a restored inode: the key its contents already have in the image
_KEY = re.compile(r"[0-9a-z][0-9a-z_.-]{0,99}\Z")
_ZERO_PAGE = bytes(PAGE_SIZE)

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2  # include/uapi/linux/falloc.h
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def punch_hole(fd: int, offset: int, length: int) -> None:
    """fallocate(2), FALLOC_FL_PUNCH_HOLE: that part reads as zeros and takes no space."""
    if _fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, offset, length):
        code = ctypes.get_errno()
        raise OSError(code, f"fallocate: {os.strerror(code)}")


def address_of(memory: mmap.mmap) -> int:
    """Where a mapping of this process begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def check_key(key: str) -> str:
    """The key itself, if it can be a file name here; Damaged otherwise (it comes from an image)."""
    if not _KEY.match(key):
        raise Damaged(f"the image has an impossible key of memory contents: {key!r}")
    return key


@dataclass(slots=True)
class _Captured:
    """What one inode needs to have written: runs of pages into the arena, by ascending page."""

    size: int
    runs: list[tuple[int, int]]  # all pages with data: (first, count)
    holes: list[tuple[int, int]]  # pages that had data and have none now
    changed: list[tuple[int, int, int]] = field(default_factory=list)  # (first page, count, offset in the arena)
    sums: dict[int, bytes] = field(default_factory=dict)  # new hash by page
    fresh: bool = False  # nothing usable is there: begin with empty files
    blocks: dict[tuple[int, int], int] = field(default_factory=dict)  # hash of (first page, count) as read


#: Hashes of whole blocks as last written, with what identifies the files then: a block that is the same needs no look
#: at its pages. (image directory, key) -> (stamp, blocks)
_written: dict[tuple[str, str], tuple[list[int], dict[tuple[int, int], int]]] = {}


def _stamp(shm: Path | int, key: str) -> list[int]:
    """What changes whenever somebody else writes or replaces the files of `key`; empty when they are not there."""
    found: list[int] = []
    for suffix in ("", ".sum", ".map"):
        try:
            st = os.stat(shm / f"{key}{suffix}") if isinstance(shm, Path) else os.stat(key + suffix, dir_fd=shm)
        except FileNotFoundError:
            return []
        found += (st.st_dev, st.st_ino, st.st_ctime_ns, st.st_size)
    return found


class Contents:
    """The memory contents of one checkpoint. `arena` (reused from checkpoint to checkpoint) holds changed pages."""

    def __init__(self, image_dir: Path, arena: bytearray | None = None) -> None:
        self.directory = image_dir / DIRECTORY
        self.arena = bytearray() if arena is None else arena
        self._used = 0
        self._block = bytearray(BLOCK * PAGE_SIZE)
        self._captured: dict[str, _Captured] = {}
        self._owners: dict[str, tuple[int, int]] = {}

    def key_for(self, fd: int, kind: str) -> str:
        """The key for an inode: what a restore noted on it, so that its saved pages are found again, or a new one."""
        st = os.fstat(fd)
        inode = (st.st_dev, st.st_ino)
        key = f"{kind}-{st.st_ino}"
        with contextlib.suppress(OSError):
            noted = os.getxattr(fd, KEY_XATTR).decode("ascii", "replace")
            if _KEY.match(noted):
                key = noted
        while self._owners.setdefault(key, inode) != inode:
            key += "x"
        return key

    def capture(self, key: str, fd: int) -> None:
        """Take what changed since the files of `key` were written. `fd` must be readable; its offset is kept."""
        if key in self._captured:
            return
        size = os.fstat(fd).st_size
        old_runs = _read_map(self.directory / f"{key}.map")
        state = _Captured(size, [], [], fresh=old_runs is None)
        stamp, blocks = _written.get((str(self.directory), key), ([], {}))
        if not stamp or stamp != _stamp(self.directory, key):
            blocks = {}
        old = _OldSums(self.directory / f"{key}.sum", old_runs or [], blocks)
        try:
            self._walk(fd, size, state, old)
        finally:
            old.close()
        state.holes = subtract_runs(old_runs or [], state.runs)
        self._captured[key] = state

    def _walk(self, fd: int, size: int, state: _Captured, old: _OldSums) -> None:
        view = memoryview(self._block)
        for start, end in data_ranges(fd, size):
            for first in range(start, end, BLOCK):
                count = min(BLOCK, end - first)
                block = view[: count * PAGE_SIZE]
                got = os.preadv(fd, [block], first * PAGE_SIZE)
                if got < len(block):  # the last page of the file
                    block[got:] = bytes(len(block) - got)
                digest = state.blocks[first, count] = xxhash.xxh3_64_intdigest(block)
                if old.blocks.get((first, count)) == digest:
                    for run in clip_runs(old.runs, first, first + count):
                        _extend(state.runs, *run)
                else:
                    self._compare(block, first, state, old.range(first, count))

    def _compare(self, block: memoryview, first: int, state: _Captured, old: bytes) -> None:
        digest = xxhash.xxh3_64_intdigest
        pack = struct.Struct("<Q").pack
        for index in range(len(block) // PAGE_SIZE):
            page = block[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
            number = first + index
            value = digest(page)
            if value == _ZERO_SUM and page == _ZERO_PAGE:
                continue
            _extend(state.runs, number)
            new = pack(value)
            if new != old[index * 8 : index * 8 + 8]:
                state.sums[number] = new
                self._keep(page, number, state)

    def _keep(self, page: memoryview, number: int, state: _Captured) -> None:
        if len(self.arena) < self._used + PAGE_SIZE:
            self.arena.extend(bytes(max(1 << 20, len(self.arena) // 2)))
        self.arena[self._used : self._used + PAGE_SIZE] = page
        last = state.changed[-1] if state.changed else None
        if last and last[0] + last[1] == number and last[2] + last[1] * PAGE_SIZE == self._used:
            state.changed[-1] = (last[0], last[1] + 1, last[2])
        else:
            state.changed.append((number, 1, self._used))
        self._used += PAGE_SIZE

    @property
    def changed_bytes(self) -> int:
        """How much `write` will write as data."""
        return self._used

    def write(self, dir_fd: int) -> None:
        """Bring `shm/` below the image directory `dir_fd` up to date; keys not captured this time are removed."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(DIRECTORY, 0o700, dir_fd=dir_fd)
        written: dict[tuple[str, str], tuple[list[int], dict[tuple[int, int], int]]] = {}
        shm = os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            for key in sorted(self._captured):
                self._write_one(shm, key, self._captured[key])
                written[str(self.directory), key] = _stamp(shm, key), self._captured[key].blocks
            for name in os.listdir(shm):
                if name.removesuffix(".sum").removesuffix(".map") not in self._captured:
                    os.unlink(name, dir_fd=shm)
        finally:
            os.close(shm)
        for known in [k for k in _written if k[0] == str(self.directory)]:
            del _written[known]
        _written.update(written)

    def _write_one(self, shm: int, key: str, state: _Captured) -> None:
        if not (state.fresh or state.changed or state.holes):
            data = os.open(key, os.O_RDWR | os.O_CLOEXEC, dir_fd=shm)
            if os.fstat(data).st_size != state.size:
                os.ftruncate(data, state.size)
            os.close(data)
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{key}.map", dir_fd=shm)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if state.fresh else 0)
        data = os.open(key, flags, 0o600, dir_fd=shm)
        sums = os.open(f"{key}.sum", flags, 0o600, dir_fd=shm)
        try:
            self._write_pages(data, sums, state)
        finally:
            os.close(data)
            os.close(sums)
        pairs = b"".join(struct.pack("<QQ", *run) for run in state.runs)
        made = os.open(f"{key}.map.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=shm)
        try:
            write_all(made, hashlib.blake2b(pairs, digest_size=DIGEST).digest() + pairs)
        finally:
            os.close(made)
        os.rename(f"{key}.map.new", f"{key}.map", src_dir_fd=shm, dst_dir_fd=shm)

    def _write_pages(self, data: int, sums: int, state: _Captured) -> None:
        pages = -(-state.size // PAGE_SIZE)
        for first, count in state.holes:
            punch_hole(data, first * PAGE_SIZE, count * PAGE_SIZE)
            punch_hole(sums, first * 8, count * 8)
        arena = memoryview(self.arena)
        for first, count, offset in state.changed:
            write_all(data, arena[offset : offset + count * PAGE_SIZE], first * PAGE_SIZE)
            write_all(sums, b"".join(state.sums[first + i] for i in range(count)), first * 8)
        arena.release()
        os.ftruncate(data, state.size)
        os.ftruncate(sums, pages * 8)


class _OldSums:
    """What the last image tells: runs of pages with data, KEY.sum read block-wise, hashes of blocks if known."""

    def __init__(self, path: Path, runs: list[tuple[int, int]], blocks: dict[tuple[int, int], int]) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if runs and path.exists() else -1
        self.runs = runs
        self.blocks = blocks

    def range(self, first: int, count: int) -> bytes:
        """8 bytes per page; zero bytes for pages that had no data."""
        raw = os.pread(self._fd, count * 8, first * 8) if self._fd >= 0 else b""
        return raw.ljust(count * 8, b"\0")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


_ZERO_SUM = xxhash.xxh3_64_intdigest(_ZERO_PAGE)


def write_all(fd: int, data: bytes | memoryview, offset: int | None = None) -> None:
    """Write everything, at `offset` or at the file's position."""
    rest = memoryview(data)
    while rest:
        done = os.write(fd, rest) if offset is None else os.pwrite(fd, rest, offset)
        offset = None if offset is None else offset + done
        rest = rest[done:]


def data_ranges(fd: int, size: int) -> list[tuple[int, int]]:
    """(first page, page after the last) of the parts of a file that are no holes; the file offset is put back."""
    before = os.lseek(fd, 0, os.SEEK_CUR)
    try:
        return [(start // PAGE_SIZE, -(-end // PAGE_SIZE)) for start, end in fdops.data_extents(fd, size)]
    finally:
        os.lseek(fd, before, os.SEEK_SET)


def _extend(runs: list[tuple[int, int]], first: int, count: int = 1) -> None:
    if runs and runs[-1][0] + runs[-1][1] == first:
        runs[-1] = (runs[-1][0], runs[-1][1] + count)
    else:
        runs.append((first, count))


def clip_runs(runs: list[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of ascending runs that lie in pages `start` to `end` (exclusive)."""
    at = max(bisect.bisect_right(runs, start, key=lambda run: run[0]) - 1, 0)
    while at < len(runs) and runs[at][0] < end:
        first, last = max(runs[at][0], start), min(sum(runs[at]), end)
        if first < last:
            yield first, last - first
        at += 1


def _parse_map(raw: bytes) -> list[tuple[int, int]] | None:
    """Runs of a KEY.map; None if it is damaged."""
    digest, pairs = raw[:DIGEST], raw[DIGEST:]
    if len(pairs) % 16 or hashlib.blake2b(pairs, digest_size=DIGEST).digest() != digest:
        return None
    runs = [(int(a), int(b)) for a, b in struct.iter_unpack("<QQ", pairs)]
    end = 0
    for first, count in runs:
        if first < end or not 0 < count < 1 << 52:
            return None
        end = first + count
    return runs


def _read_map(path: Path) -> list[tuple[int, int]] | None:
    try:
        return _parse_map(path.read_bytes())
    except FileNotFoundError:
        return None


# ----------------------------------------------------------------------------------------------- restore


def restore(image_dir_fd: int, key: str, fd: int, size: int) -> None:
    """Fill the new memory file `fd` (empty, writable) with `size` bytes of `key`, every page verified.

    Raises Damaged when the files don't fit each other or a page's hash is wrong.
    """
    check_key(key)
    os.ftruncate(fd, size)
    try:
        shm = os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=image_dir_fd)
    except FileNotFoundError as error:
        raise Damaged("the image has no memory file contents") from error
    try:
        _restore_from(shm, key, fd, size)
    except FileNotFoundError as error:
        raise Damaged(f"the image lacks the contents of memory file {key}") from error
    finally:
        os.close(shm)
    with contextlib.suppress(OSError):  # without it, the next checkpoint writes all pages again
        os.setxattr(fd, KEY_XATTR, key.encode())


def verify(image_dir_fd: int, key: str, size: int) -> None:
    """Check the files of `key` without restoring; Damaged says what is wrong."""
    check_key(key)
    shm = os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=image_dir_fd)
    try:
        _restore_from(shm, key, None, size)
    except FileNotFoundError as error:
        raise Damaged(f"the image lacks the contents of memory file {key}") from error
    finally:
        os.close(shm)


def _restore_from(shm: int, key: str, fd: int | None, size: int) -> None:
    with contextlib.ExitStack() as stack:
        files = {}
        for suffix in ("", ".sum", ".map"):
            file = os.open(key + suffix, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=shm)
            stack.callback(os.close, file)
            files[suffix] = file
        raw = os.pread(files[".map"], os.fstat(files[".map"]).st_size, 0)
        runs = _parse_map(raw)
        pages = -(-size // PAGE_SIZE)
        if runs is None or (runs and sum(runs[-1]) > pages):
            raise Damaged(f"the page map of memory file {key} is damaged")
        for first, count in runs:
            for start in range(first, first + count, BLOCK):
                number = min(BLOCK, first + count - start)
                data = os.pread(files[""], number * PAGE_SIZE, start * PAGE_SIZE)
                sums = os.pread(files[".sum"], number * 8, start * 8)
                _verify_block(key, start, number, data, sums)
                if fd is not None:
                    write_all(fd, data, start * PAGE_SIZE)
        if fd is not None:
            os.ftruncate(fd, size)


def _verify_block(key: str, first: int, count: int, data: bytes, sums: bytes) -> None:
    padded = memoryview(data.ljust(count * PAGE_SIZE, b"\0"))  # the last page of a file may be short
    for index in range(count):
        page = padded[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
        if xxhash.xxh3_64_intdigest(page) != int.from_bytes(sums[index * 8 : index * 8 + 8], "little"):
            raise Damaged(f"page {first + index} of memory file {key} is damaged")
