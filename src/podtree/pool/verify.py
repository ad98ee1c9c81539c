"""Checks of the files in an image directory against the checksums that were written beside them.

A file of pages, `mem/<n>` or `shm/<key>`, is sparse: page i of the address space (of the object) lies
at i * 4096. Beside it lie

    <file>.map    32 bytes blake2b-256 of the rest; then pairs of little-endian u64: first page, pages
    <file>.sum    sparse: at 8 * i the xxh3_64 of page i, little-endian, for all pages in the map

and `manifest` is 8 bytes `PODTREE\\x01`, 32 bytes blake2b-256 of the rest, then MessagePack.

An image is untrusted: nothing here trusts a length in it, and all damage comes back as text.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import xxhash

from podtree.kernel import fdops

PAGE = 4096
MANIFEST_MAGIC = b"PODTREE\x01"
_DIGEST = 32
_CHUNK_PAGES = 1024
_SUM_BYTES = 8
_MAX_MANIFEST = 1 << 30
_MAX_MAP = 1 << 28
_ENOUGH = 20  # lines of damage per file

Ranges = list[tuple[int, int]]


def _digest(payload: bytes | memoryview) -> bytes:
    return hashlib.blake2b(payload, digest_size=_DIGEST).digest()


def _why(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def verify_manifest(path: str | Path) -> list[str]:
    """What is wrong with a manifest: unreadable, no manifest, checksum, not MessagePack."""
    try:
        if os.path.getsize(path) > _MAX_MANIFEST:
            return ["is too large for a manifest"]
        raw = Path(path).read_bytes()
    except OSError as error:
        return [_why(error)]
    if raw[: len(MANIFEST_MAGIC)] != MANIFEST_MAGIC:
        return ["is not a podtree manifest, or one of another version"]
    start = len(MANIFEST_MAGIC) + _DIGEST
    if _digest(memoryview(raw)[start:]) != raw[len(MANIFEST_MAGIC) : start]:
        return ["checksum is wrong"]
    try:
        msgspec.msgpack.decode(memoryview(raw)[start:])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        return [f"is not MessagePack: {error}"]
    return []


def read_map(path: str | Path) -> Ranges:
    """The ranges (first page, pages) of a .map file. Raises OSError, or ValueError saying what is wrong."""
    if os.path.getsize(path) > _MAX_MAP:
        raise ValueError("is too large for a map")
    raw = Path(path).read_bytes()
    body = memoryview(raw)[_DIGEST:]
    if len(raw) < _DIGEST or len(body) % 16:
        raise ValueError("is cut off")
    if _digest(body) != raw[:_DIGEST]:
        raise ValueError("checksum is wrong")
    ranges = list(struct.iter_unpack("<QQ", body))
    end = 0
    for first, count in ranges:
        if first < end or count == 0 or first + count > 1 << 51:
            raise ValueError(f"pages {first}+{count} overlap others, or can't be")
        end = first + count
    return ranges


def verify_pages(path: str | Path) -> list[str]:
    """What is wrong with a file of pages, its map or its sums. Empty when every page is as it was written."""
    path = str(path)
    try:
        ranges = read_map(path + ".map")
    except OSError as error:
        return [f".map: {_why(error)}"]
    except ValueError as error:
        return [f".map {error}"]
    found: list[str] = []
    try:
        with _Opened(path) as pages, _Opened(path + ".sum") as sums:
            for message in _compare(pages, sums, ranges):
                found.append(message)
                if len(found) >= _ENOUGH:
                    found.append("and perhaps more: not looked further")
                    break
    except OSError as error:
        found.append(f"{os.path.basename(str(error.filename or path))}: {_why(error)}")
    return found


class _Opened:
    """A file opened for reading what is on the disk, not in the page cache."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> int:
        self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return self._fd

    def __exit__(self, *_exc: object) -> None:
        os.close(self._fd)


def _compare(pages: int, sums: int, ranges: Ranges) -> Iterator[str]:
    size = os.fstat(pages).st_size
    for first, count in ranges:
        if (first + count) * PAGE > size:
            yield f"page {max(first, size // PAGE)}: beyond the end of the file"
            return
        for start in range(first, first + count, _CHUNK_PAGES):
            yield from _compare_chunk(pages, sums, start, min(_CHUNK_PAGES, first + count - start))


def _compare_chunk(pages: int, sums: int, start: int, count: int) -> Iterator[str]:
    try:
        wanted = os.pread(sums, count * _SUM_BYTES, start * _SUM_BYTES)
        content = memoryview(os.pread(pages, count * PAGE, start * PAGE))
    except OSError as error:
        if count == 1:
            yield f"page {start}: {_why(error)}"
            return
        for page in range(start, start + count):
            yield from _compare_chunk(pages, sums, page, 1)
        return
    if len(wanted) < count * _SUM_BYTES:
        yield f"page {start + len(wanted) // _SUM_BYTES}: .sum ends before it"
    if len(content) < count * PAGE:
        yield f"page {start + len(content) // PAGE}: beyond the end of the file"
    intdigest = xxhash.xxh3_64_intdigest
    at = 0
    for (expected,) in struct.iter_unpack("<Q", wanted[: len(wanted) // _SUM_BYTES * _SUM_BYTES]):
        if intdigest(content[at : at + PAGE]) != expected:
            yield f"page {start + at // PAGE}: checksum is wrong"
        at += PAGE


def read_through(path: str | Path) -> list[str]:
    """Read all data of a regular file, so that the file system verifies its own checksums. Holes are skipped."""
    try:
        with _Opened(str(path)) as fd:
            return read_descriptor(fd)
    except OSError as error:
        return [_why(error)]


def read_descriptor(fd: int) -> list[str]:
    """As `read_through`, of an open file."""
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for start, end in fdops.data_extents(fd, os.fstat(fd).st_size):
            at = start
            while at < end:
                at += len(os.pread(fd, min(4 << 20, end - at), at)) or end
        return []
    except OSError as error:
        return [_why(error)]
