"""timerfd_create(2), signalfd(2), eventfd(2): the calls and structures that Python's os lacks."""

from __future__ import annotations

import fcntl
import os
import struct

from podtree.kernel.sys import NR, syscall

TFD_TIMER_ABSTIME = 1
TFD_TIMER_CANCEL_ON_SET = 2
TFD_IOC_SET_TICKS = 0x40085400  # include/uapi/linux/timerfd.h: _IOW('T', 0, __u64)

CLOEXEC = os.O_CLOEXEC  # EFD_CLOEXEC, TFD_CLOEXEC and SFD_CLOEXEC are all this

NANO = 1_000_000_000


def timerfd_create(clock: int, flags: int) -> int:
    """timerfd_create(2)."""
    return syscall(NR.timerfd_create, clock, flags)


def timerfd_gettime(fd: int) -> tuple[int, int]:
    """(nanoseconds until the next expiry or 0 when disarmed, interval in nanoseconds).

    A periodic timer that has expired is moved on and its ticks are counted, as a read would find them.
    """
    raw = bytearray(32)
    syscall(NR.timerfd_gettime, fd, raw)
    interval_s, interval_ns, value_s, value_ns = struct.unpack("4q", raw)
    return value_s * NANO + value_ns, interval_s * NANO + interval_ns


def timerfd_settime(fd: int, flags: int, value_ns: int, interval_ns: int) -> None:
    """Arm (value_ns > 0) or disarm (0); `flags` is of TFD_TIMER_*."""
    raw = struct.pack("4q", *divmod(interval_ns, NANO), *divmod(value_ns, NANO))
    syscall(NR.timerfd_settime, fd, flags, raw, None)


def timerfd_set_ticks(fd: int, ticks: int) -> None:
    """Make `ticks` (> 0) expirations pending: TFD_IOC_SET_TICKS, CONFIG_CHECKPOINT_RESTORE."""
    fcntl.ioctl(fd, TFD_IOC_SET_TICKS, struct.pack("Q", ticks))


def signalfd(mask: int, flags: int) -> int:
    """A new signalfd for the signals in `mask` (bit N-1 is signal N)."""
    return syscall(NR.signalfd4, -1, struct.pack("Q", mask), 8, flags & (os.O_NONBLOCK | os.O_CLOEXEC))
