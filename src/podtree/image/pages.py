"""Page files: the contents of an address space or of a shared-memory object, one sparse file each.

`<name>`      data; file offset = address (or offset in the object)
`<name>.sum`  8 bytes, little-endian xxh3_64, of page i at offset 8*i
`<name>.map`  32 bytes blake2b-256 of the rest, then little-endian u64 pairs (first page, page
              count), ascending: the pages that are saved. Others are zeros, or come from a file.

The files lie in the live image directory, are changed in place at cost proportional to what
changed, and are snapshotted with it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
from collections.abc import Iterator

import xxhash

from podtree.errors import Damaged
from podtree.kernel.pageruns import Run, subtract_runs
from podtree.kernel.sys import PAGE_SIZE

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2  # linux/falloc.h
_COMPARE_CHUNK = 256  # pages
_libc = ctypes.CDLL(None, use_errno=True)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Free a range of a file (fallocate(2))."""
    mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
    if _libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        code = ctypes.get_errno()
        raise OSError(code, f"fallocate: {os.strerror(code)}")


def load_map(dir_fd: int, name: str) -> list[Run]:
    """The saved runs of page file `name`, verified; raises Damaged."""
    try:
        fd = os.open(name + ".map", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=dir_fd)
    except FileNotFoundError as error:
        raise Damaged(f"page map {name}.map is missing") from error
    with open(fd, "rb") as file:
        raw = file.read()
    body = raw[32:]
    if len(body) % 16 or hashlib.blake2b(body, digest_size=32).digest() != raw[:32]:
        raise Damaged(f"page map {name}.map is damaged")
    runs = list(struct.iter_unpack("<QQ", body))
    end = 0
    for first, count in runs:
        if first < end or count == 0 or first + count > 1 << 51:
            raise Damaged(f"page map {name}.map is out of order")
        end = first + count
    return runs


class PageFile:
    """One page file opened for an update; use as a context manager."""

    def __init__(self, dir_fd: int, name: str, *, sync: bool = True) -> None:
        self.dir_fd = dir_fd
        self.name = name
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self.fd = os.open(name, flags, 0o600, dir_fd=dir_fd)
        self.sum_fd = os.open(name + ".sum", flags, 0o600, dir_fd=dir_fd)
        self.bytes_written = 0

    def __enter__(self) -> PageFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        os.close(self.sum_fd)

    def old_map(self) -> list[Run]:
        """What is saved so far; empty if nothing (or nothing usable) is."""
        try:
            return load_map(self.dir_fd, self.name)
        except Damaged:
            return []

    def write(self, first_page: int, data: memoryview) -> None:
        """Save whole pages from `first_page` on."""
        offset = first_page * PAGE_SIZE
        done = 0
        while done < len(data):
            done += os.pwrite(self.fd, data[done : done + (1 << 30)], offset + done)
        digest = xxhash.xxh3_64_intdigest
        sums = [digest(data[i : i + PAGE_SIZE]) for i in range(0, len(data), PAGE_SIZE)]
        os.pwrite(self.sum_fd, struct.pack(f"<{len(sums)}Q", *sums), first_page * 8)
        self.bytes_written += len(data)

    def write_changed(self, first_page: int, data: memoryview) -> None:
        """Save whole pages, but only those that differ from what the file holds."""
        for at in range(0, len(data), _COMPARE_CHUNK * PAGE_SIZE):
            chunk = data[at : at + _COMPARE_CHUNK * PAGE_SIZE]
            page = first_page + at // PAGE_SIZE
            old = os.pread(self.fd, len(chunk), page * PAGE_SIZE)
            if old != chunk:
                for start, count in _differing(old, chunk):
                    self.write(page + start, chunk[start * PAGE_SIZE : (start + count) * PAGE_SIZE])

    def ensure_sums(self, first_page: int, count: int) -> None:
        """Give pages that were never written (all zeros, so never found differing) their checksum."""
        raw = os.pread(self.sum_fd, count * 8, first_page * 8).ljust(count * 8, b"\0")
        zero = b"\0" * 8
        if zero not in (raw[i : i + 8] for i in range(0, len(raw), 8)):
            return
        for i in range(count):
            if raw[i * 8 : i * 8 + 8] == zero:
                page = os.pread(self.fd, PAGE_SIZE, (first_page + i) * PAGE_SIZE).ljust(PAGE_SIZE, b"\0")
                value = struct.pack("<Q", xxhash.xxh3_64_intdigest(page))
                os.pwrite(self.sum_fd, value, (first_page + i) * 8)

    def save_map(self, runs: list[Run], old: list[Run]) -> None:
        """Record which pages are saved, and free the space of those that no longer are."""
        for first, count in subtract_runs(old, runs):
            punch_hole(self.fd, first * PAGE_SIZE, count * PAGE_SIZE)
            os.pwrite(self.sum_fd, bytes(count * 8), first * 8)
        end = (runs[-1][0] + runs[-1][1]) if runs else 0
        if os.fstat(self.fd).st_size < end * PAGE_SIZE:
            os.ftruncate(self.fd, end * PAGE_SIZE)
        body = b"".join(struct.pack("<QQ", *run) for run in runs)
        raw = hashlib.blake2b(body, digest_size=32).digest() + body
        temporary = self.name + ".map.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o600, dir_fd=self.dir_fd)
        try:
            os.write(fd, raw)
        finally:
            os.close(fd)
        os.rename(temporary, self.name + ".map", src_dir_fd=self.dir_fd, dst_dir_fd=self.dir_fd)
        self.bytes_written += len(raw) if runs != old else 0


def _differing(old: bytes, new: memoryview) -> Iterator[Run]:
    """Runs of pages that differ, in pages from the start."""
    start = -1
    total = len(new) // PAGE_SIZE
    for i in range(total):
        at = i * PAGE_SIZE
        if old[at : at + PAGE_SIZE] != new[at : at + PAGE_SIZE]:
            if start < 0:
                start = i
        elif start >= 0:
            yield start, i - start
            start = -1
    if start >= 0:
        yield start, total - start


def remove(dir_fd: int, name: str) -> None:
    """Remove a page file with its companions."""
    for suffix in ("", ".sum", ".map", ".map.new"):
        try:
            os.unlink(name + suffix, dir_fd=dir_fd)
        except FileNotFoundError:
            pass
