"""prctl(2): the operations used here, as include/uapi/linux/prctl.h numbers them."""

from __future__ import annotations

import enum

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


def set_name(name: str) -> None:
    """The calling thread's comm, 15 bytes at most, as ps shows it."""
    syscall(NR.prctl, Prctl.SET_NAME, name.encode()[:15] + b"\0", 0, 0, 0)
