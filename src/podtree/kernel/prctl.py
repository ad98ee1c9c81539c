"""prctl(2): the operations used here, as include/uapi/linux/prctl.h numbers them."""

from __future__ import annotations

import ctypes
import enum
import errno

from podtree.kernel.sys import NR, syscall


class Prctl(enum.IntEnum):
    """PR_*."""

    SET_PDEATHSIG = 1
    GET_DUMPABLE = 3
    SET_DUMPABLE = 4
    SET_KEEPCAPS = 8
    SET_NAME = 15
    CAPBSET_READ = 23
    CAPBSET_DROP = 24
    SET_CHILD_SUBREAPER = 36
    SET_NO_NEW_PRIVS = 38
    CAP_AMBIENT = 47


def prctl(option: Prctl, *args: int) -> int:
    """Call prctl with up to four integer arguments; returns its result, raises OSError."""
    padded = (*args, 0, 0, 0, 0)[:4]
    return syscall(NR.prctl, option, *padded)


_PR_SCHED_CORE, _PR_SCHED_CORE_GET, _SCOPE_THREAD = 62, 0, 0
_no_cookies = False


def core_cookie(tid: int) -> int:
    """The core scheduling cookie of a thread (PR_SCHED_CORE_GET); 0: none, or the kernel or the CPU knows no such."""
    global _no_cookies
    if _no_cookies:
        return 0
    value = ctypes.c_uint64(0)
    try:
        syscall(NR.prctl, _PR_SCHED_CORE, _PR_SCHED_CORE_GET, tid, _SCOPE_THREAD, ctypes.addressof(value))
    except OSError as error:
        _no_cookies = error.errno in (errno.EINVAL, errno.ENODEV)
        return 0
    return value.value


def set_name(name: str) -> None:
    """The calling thread's comm, 15 bytes at most, as ps shows it."""
    syscall(NR.prctl, Prctl.SET_NAME, name.encode()[:15] + b"\0", 0, 0, 0)
