"""Capabilities of the calling process: capabilities(7), capget(2); include/uapi/linux/capability.h."""

from __future__ import annotations

import ctypes
import enum
import functools
import struct

from podtree.kernel.prctl import Prctl, prctl
from podtree.kernel.sys import NR, syscall

_VERSION_3 = 0x20080522
PR_CAP_AMBIENT_CLEAR_ALL = 4


class Cap(enum.IntEnum):
    """CAP_*, by number."""

    CHOWN = 0
    DAC_OVERRIDE = 1
    DAC_READ_SEARCH = 2
    FOWNER = 3
    FSETID = 4
    KILL = 5
    SETGID = 6
    SETUID = 7
    SETPCAP = 8
    LINUX_IMMUTABLE = 9
    NET_BIND_SERVICE = 10
    NET_BROADCAST = 11
    NET_ADMIN = 12
    NET_RAW = 13
    IPC_LOCK = 14
    IPC_OWNER = 15
    SYS_MODULE = 16
    SYS_RAWIO = 17
    SYS_CHROOT = 18
    SYS_PTRACE = 19
    SYS_PACCT = 20
    SYS_ADMIN = 21
    SYS_BOOT = 22
    SYS_NICE = 23
    SYS_RESOURCE = 24
    SYS_TIME = 25
    SYS_TTY_CONFIG = 26
    MKNOD = 27
    LEASE = 28
    AUDIT_WRITE = 29
    AUDIT_CONTROL = 30
    SETFCAP = 31
    MAC_OVERRIDE = 32
    MAC_ADMIN = 33
    SYSLOG = 34
    WAKE_ALARM = 35
    BLOCK_SUSPEND = 36
    AUDIT_READ = 37
    PERFMON = 38
    BPF = 39
    CHECKPOINT_RESTORE = 40


def mask(caps: frozenset[Cap]) -> int:
    """The set as the kernel's 64-bit mask."""
    return sum(1 << cap for cap in caps)


@functools.cache
def last_cap() -> int:
    """The highest that this kernel knows."""
    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
        return int(file.read())


def drop_bounding(keep: frozenset[Cap]) -> None:
    """Take everything but `keep` out of the bounding set, newer capabilities than we know included."""
    for number in range(last_cap() + 1):
        if number not in keep and prctl(Prctl.CAPBSET_READ, number):
            prctl(Prctl.CAPBSET_DROP, number)


def clear_ambient() -> None:
    """Empty the ambient set."""
    prctl(Prctl.CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)


HEADER = struct.pack("Ii", _VERSION_3, 0)  # struct __user_cap_header_struct: of the calling thread
DATA_SIZE = 24  # struct __user_cap_data_struct, twice


def pack(effective: int, permitted: int, inheritable: int) -> bytes:
    """The three sets (masks) as capset(2) takes them."""
    low, high = 0xFFFFFFFF, 32
    return struct.pack(
        "6I",
        effective & low, permitted & low, inheritable & low,
        effective >> high, permitted >> high, inheritable >> high,
    )  # fmt: skip


def unpack(data: bytes) -> tuple[int, int, int]:
    """The reverse: (effective, permitted, inheritable) masks."""
    e0, p0, i0, e1, p1, i1 = struct.unpack("6I", data)
    return e0 | e1 << 32, p0 | p1 << 32, i0 | i1 << 32


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Set the three sets of the calling thread (masks)."""
    syscall(NR.capset, HEADER, pack(effective, permitted, inheritable))


def capget() -> tuple[int, int, int]:
    """(effective, permitted, inheritable) masks of the calling thread."""
    data = ctypes.create_string_buffer(DATA_SIZE)
    syscall(NR.capget, HEADER, data)
    return unpack(data.raw)
