"""POSIX message queues: mq_overview(7), mq_open(2) and its like as the kernel has them (names without the slash)."""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from podtree.kernel.sys import NR, syscall

PRIORITIES = 32768  # MQ_PRIO_MAX, include/uapi/linux/mqueue.h
COOKIE_SIZE = 32  # NOTIFY_COOKIE_LEN
SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD = 0, 1, 2
_ATTR = struct.Struct("4q32x")  # struct mq_attr


class Attributes(NamedTuple):
    """struct mq_attr: sizes in messages and bytes."""

    flags: int
    max_messages: int
    message_size: int
    waiting: int


def mq_open(name: bytes, flags: int, mode: int = 0, max_messages: int = 0, message_size: int = 0) -> int:
    """A descriptor of a queue; the last three are for O_CREAT.

    It is close-on-exec, as all are. O_CLOEXEC would stay in the file's own flags, which fdinfo shows.
    """
    attributes = _ATTR.pack(0, max_messages, message_size, 0) if flags & os.O_CREAT else None
    return syscall(NR.mq_open, name + b"\0", flags & ~os.O_CLOEXEC, mode, attributes)


def mq_unlink(name: bytes) -> None:
    """Remove the name of a queue."""
    syscall(NR.mq_unlink, name + b"\0")


def mq_attributes(fd: int) -> Attributes:
    """mq_getattr(3)."""
    raw = bytearray(_ATTR.size)
    syscall(NR.mq_getsetattr, fd, None, raw)
    return Attributes(*_ATTR.unpack(raw))


def mq_send(fd: int, data: bytes, priority: int) -> None:
    """mq_timedsend(2) without a timeout."""
    syscall(NR.mq_timedsend, fd, data or b"\0", len(data), priority, None)


def notification(value: bytes, signal: int, method: int) -> bytes:
    """struct sigevent; `value` is its 8 bytes."""
    return value + struct.pack("<ii", signal, method).ljust(56, b"\0")
