"""Memory of another process: reading and writing it, finding written pages, userfaultfd.

PAGEMAP_SCAN: include/uapi/linux/fs.h (6.7+); userfaultfd(2), include/uapi/linux/userfaultfd.h.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Iterable

from podtree.kernel.sys import NR, PAGE_SIZE, syscall

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 1, 2, 0x10, 0x20
MAP_GROWSDOWN, MAP_LOCKED, MAP_NORESERVE, MAP_STACK = 0x100, 0x2000, 0x4000, 0x20000
MAP_HUGETLB, MAP_FIXED_NOREPLACE = 0x40000, 0x100000
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
TASK_SIZE = 0x7FFFFFFFF000  # end of user addresses with 4-level paging (arch/x86/include/asm/page_64.h)

PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)
PM_SCAN_WP_MATCHING, PM_SCAN_CHECK_WPASYNC = 1, 2
PAGE_IS_WPALLOWED, PAGE_IS_WRITTEN, PAGE_IS_FILE, PAGE_IS_PRESENT = 1, 2, 4, 8
PAGE_IS_SWAPPED, PAGE_IS_PFNZERO, PAGE_IS_HUGE, PAGE_IS_SOFT_DIRTY, PAGE_IS_GUARD = 16, 32, 64, 128, 256

UFFD_USER_MODE_ONLY = 1
UFFD_API = 0xAA
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_REGISTER_MODE_WP = 2
UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
UFFD_FEATURE_WP_UNPOPULATED = 1 << 13
UFFD_FEATURE_WP_ASYNC = 1 << 15

IOV_MAX = 1024
_REGION = struct.Struct("<QQQ")
_SCAN_ARG = struct.Struct("<12Q")
_REGIONS_PER_SCAN = 8192
_scan_buffer = bytearray(_REGION.size * _REGIONS_PER_SCAN)
_scan_view = (ctypes.c_char * len(_scan_buffer)).from_buffer(_scan_buffer)
_scan_address = ctypes.addressof(_scan_view)


def address_of(buffer: bytearray | memoryview) -> int:
    """Address of a writable buffer in this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def read_memory(pid: int, address: int, length: int) -> bytes:
    """`length` bytes of another process (process_vm_readv); OSError EFAULT if any is unreadable."""
    data = bytearray(length)
    view = (ctypes.c_char * length).from_buffer(data)
    local = ctypes.create_string_buffer(struct.pack("<QQ", ctypes.addressof(view), length), 16)
    remote = ctypes.create_string_buffer(struct.pack("<QQ", address, length), 16)
    if syscall(NR.process_vm_readv, pid, local, 1, remote, 1, 0) != length:
        raise OSError(14, f"short read of {length} bytes at {address:#x} of process {pid}")
    return bytes(data)


def write_memory(pid: int, address: int, data: bytes) -> None:
    """Write into writable memory of another process (process_vm_writev)."""
    source = ctypes.create_string_buffer(data, len(data))
    local = ctypes.create_string_buffer(struct.pack("<QQ", ctypes.addressof(source), len(data)), 16)
    remote = ctypes.create_string_buffer(struct.pack("<QQ", address, len(data)), 16)
    if syscall(NR.process_vm_writev, pid, local, 1, remote, 1, 0) != len(data):
        raise OSError(14, f"short write of {len(data)} bytes at {address:#x} of process {pid}")


def read_ranges(pid: int, ranges: Iterable[tuple[int, int]], buffer: memoryview) -> None:
    """Copy (address, length) ranges of another process, one after the other, to the start of `buffer`.

    Ranges that process_vm_readv can't read (PROT_NONE) are read through /proc/PID/mem,
    which a tracer may do whatever the protection says.
    """
    base = address_of(buffer)
    position = 0
    batch: list[tuple[int, int]] = []
    size = 0
    for address, length in ranges:
        batch.append((address, length))
        size += length
        if len(batch) == IOV_MAX or size >= 1 << 30:
            _read_batch(pid, batch, base + position, size, buffer[position : position + size])
            position += size
            batch, size = [], 0
    if batch:
        _read_batch(pid, batch, base + position, size, buffer[position : position + size])


def _read_batch(pid: int, batch: list[tuple[int, int]], target: int, size: int, view: memoryview) -> None:
    local = ctypes.create_string_buffer(struct.pack("<QQ", target, size), 16)
    packed = b"".join(struct.pack("<QQ", *r) for r in batch)
    remote = ctypes.create_string_buffer(packed, len(packed))
    try:
        if syscall(NR.process_vm_readv, pid, local, 1, remote, len(batch), 0) == size:
            return
    except OSError as error:
        if error.errno != 14:
            raise
    position = 0
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for address, length in batch:
            done = 0
            while done < length:
                got = os.preadv(fd, [view[position + done : position + length]], address + done)
                if got <= 0:
                    raise OSError(14, f"cannot read {length} bytes at {address:#x} of process {pid}")
                done += got
            position += length
    finally:
        os.close(fd)


def scan_pages(
    pagemap_fd: int,
    start: int,
    end: int,
    *,
    anyof: int,
    allof: int = 0,
    inverted: int = 0,
    returned: int,
    flags: int = 0,
) -> list[tuple[int, int, int]]:
    """PAGEMAP_SCAN over [start, end): (start, end, categories) of matching page ranges.

    With flags PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC the matching pages are write-protected
    again in the same walk, so that the next scan finds what was written after this one.
    """
    found: list[tuple[int, int, int]] = []
    arg = bytearray(_SCAN_ARG.size)
    while start < end:
        _SCAN_ARG.pack_into(
            arg, 0, _SCAN_ARG.size, flags, start, end, 0, _scan_address, _REGIONS_PER_SCAN, 0, inverted, allof,
            anyof, returned,
        )  # fmt: skip
        count = fcntl.ioctl(pagemap_fd, PAGEMAP_SCAN, arg, True)
        walked = struct.unpack_from("<Q", arg, 32)[0]
        found += _REGION.iter_unpack(memoryview(_scan_buffer)[: count * _REGION.size])
        if walked <= start:
            break
        start = walked
    return found


def write_protection_marks(pagemap_fd: int, start: int, end: int) -> list[tuple[int, int]]:
    """Runs (first page, count) in [start, end) that are no pages but only a note that userfaultfd protects them.

    In /proc/PID/pagemap (admin-guide/mm/pagemap.rst) such a note is an entry of the last swap type, PTE_MARKER
    (include/linux/swap.h), with bit 0 of its offset set (PTE_MARKER_UFFD_WP, include/linux/swapops.h).
    """
    runs: list[tuple[int, int]] = []
    raw = os.pread(pagemap_fd, (end - start) // PAGE_SIZE * 8, start // PAGE_SIZE * 8)
    for page, (entry,) in enumerate(struct.iter_unpack("<Q", raw), start // PAGE_SIZE):
        if entry >> 62 & 1 and entry & 31 == 31 and entry >> 5 & 1:
            if runs and sum(runs[-1]) == page:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((page, 1))
    return runs


def uffd_enable(uffd: int) -> None:
    """UFFDIO_API for asynchronous write-protection tracking (6.7+); OSError EINVAL without it."""
    features = (
        UFFD_FEATURE_PAGEFAULT_FLAG_WP
        | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
        | UFFD_FEATURE_WP_UNPOPULATED
        | UFFD_FEATURE_WP_ASYNC
    )
    fcntl.ioctl(uffd, UFFDIO_API, struct.pack("<QQQ", UFFD_API, features, 0))


def uffd_register(uffd: int, start: int, end: int) -> None:
    """Track writes to [start, end) of the address space that made `uffd`."""
    fcntl.ioctl(uffd, UFFDIO_REGISTER, struct.pack("<QQQQ", start, end - start, UFFDIO_REGISTER_MODE_WP, 0))


def pages(length: int) -> int:
    """Number of pages that `length` bytes take."""
    return (length + PAGE_SIZE - 1) // PAGE_SIZE
