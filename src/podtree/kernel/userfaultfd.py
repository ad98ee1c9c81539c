"""Faults on missing pages handled by another process: userfaultfd(2), ioctl_userfaultfd(2).

Constants: include/uapi/linux/userfaultfd.h. Write tracking, the other use of a userfaultfd, is in podtree.kernel.mm.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from podtree.kernel.mm import UFFD_API, UFFDIO_API, UFFDIO_REGISTER
from podtree.kernel.sys import NR, syscall

UFFDIO_REGISTER_MODE_MISSING = 1
UFFDIO_WAKE, UFFDIO_COPY, UFFDIO_ZEROPAGE = 0x8010AA02, 0xC028AA03, 0xC020AA04
EVENT_FORK, EVENT_REMAP, EVENT_REMOVE, EVENT_UNMAP = 1 << 1, 1 << 2, 1 << 3, 1 << 6  # UFFD_FEATURE_*

_COPY = struct.Struct("<4Qq")  # struct uffdio_copy: dst, src, len, mode, copied or -errno
_MESSAGE = 32  # sizeof(struct uffd_msg)
_libc = ctypes.CDLL(None, use_errno=True)


class Event(enum.IntEnum):
    """enum uffd_event."""

    PAGEFAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


class Message(NamedTuple):
    """struct uffd_msg: PAGEFAULT (flags, address), FORK (descriptor), REMAP (from, to, length), others (start, end)."""

    event: Event
    args: tuple[int, int, int]


def enable_missing(uffd: int) -> None:
    """UFFDIO_API: faults on missing pages, and every event that moves or drops them. OSError EINVAL without them."""
    features = EVENT_FORK | EVENT_REMAP | EVENT_REMOVE | EVENT_UNMAP
    fcntl.ioctl(uffd, UFFDIO_API, struct.pack("<QQQ", UFFD_API, features, 0))


def is_available() -> bool:
    """Whether this kernel and this process can handle faults of others."""
    try:
        fd = syscall(NR.userfaultfd, os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        enable_missing(fd)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def register_missing(uffd: int, start: int, end: int) -> None:
    """From now on, whoever touches a page of [start, end) that isn't there waits for the handler."""
    fcntl.ioctl(uffd, UFFDIO_REGISTER, struct.pack("<QQQQ", start, end - start, UFFDIO_REGISTER_MODE_MISSING, 0))


def copy(uffd: int, target: int, source: int, length: int) -> tuple[int, int]:
    """Put pages in place, whole or not at all each, and wake who waits for them: (bytes done, errno or 0).

    EEXIST: the next page is there already. EAGAIN: an event waits to be read first. ENOENT: not all of it lies in
    one registered mapping. ESRCH: the address space is gone.
    """
    raw = bytearray(_COPY.pack(target, source, length, 0, 0))
    buffer = (ctypes.c_char * len(raw)).from_buffer(raw)
    if not _libc.ioctl(uffd, ctypes.c_ulong(UFFDIO_COPY), buffer):
        return length, 0
    code = ctypes.get_errno()
    done: int = _COPY.unpack(raw)[4]
    return max(0, done), code


def zero(uffd: int, page: int, length: int) -> int:
    """Put a page of zeros in place and wake who waits for it; errno or 0, as `copy`."""
    try:
        fcntl.ioctl(uffd, UFFDIO_ZEROPAGE, struct.pack("<QQQq", page, length, 0, 0))
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def wake(uffd: int, start: int, length: int) -> None:
    """Let who waits for pages of this range try again."""
    fcntl.ioctl(uffd, UFFDIO_WAKE, struct.pack("<QQ", start, length))


def messages(uffd: int, most: int = 64) -> Iterator[Message]:
    """What has happened and wasn't read yet; reading an event lets the task that caused it go on."""
    try:
        data = os.read(uffd, most * _MESSAGE)
    except BlockingIOError:
        return
    for at in range(0, len(data), _MESSAGE):
        kind = Event(data[at])
        if kind is Event.FORK:
            yield Message(kind, (struct.unpack_from("<I", data, at + 8)[0], 0, 0))
        else:
            yield Message(kind, struct.unpack_from("<3Q", data, at + 8))
