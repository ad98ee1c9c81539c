"""kcmp(2): are two kernel objects the same one? include/uapi/linux/kcmp.h."""

from __future__ import annotations

import os
import struct
import threading

from podtree.kernel.sys import NR, syscall

KCMP_FILE = 0
KCMP_VM = 1
KCMP_FILES = 2
KCMP_FS = 3
KCMP_SIGHAND = 4
KCMP_SYSVSEM = 6
KCMP_EPOLL_TFD = 7
CLONE_SYSVSEM = 0x40000  # include/uapi/linux/sched.h


def compare_tasks(tid1: int, tid2: int, kind: int) -> int:
    """Order the `kind` of object (KCMP_VM, _FILES, _FS, _SIGHAND, _SYSVSEM) of two tasks: -1, 0 (shared) or 1."""
    return (0, -1, 1)[syscall(NR.kcmp, tid1, tid2, kind, 0, 0)]


def has_undo_list(tid: int) -> bool:
    """Whether a task has a list of adjustments (SEM_UNDO), alone or with others; those that have none compare equal.

    The calling thread is what it is compared with, which is made to have none: creating a thread gives it one.
    """
    syscall(NR.unshare, CLONE_SYSVSEM)
    return compare_tasks(threading.get_native_id(), tid, KCMP_SYSVSEM) != 0


def compare_files(fd1: int, fd2: int) -> int:
    """Order the open file descriptions behind two of the caller's descriptors: -1, 0 (the same one) or 1.

    The order is that of their (obfuscated) kernel addresses: arbitrary, but total while both exist.
    """
    pid = os.getpid()
    result = syscall(NR.kcmp, pid, pid, KCMP_FILE, fd1, fd2)
    return (0, -1, 1)[result]


def is_epoll_target(fd: int, epoll_fd: int, number: int, occurrence: int) -> bool:
    """Whether `fd` is what `epoll_fd` watches under the descriptor number `number`.

    One number can be registered for several files (each closed while a duplicate lived on); `occurrence`
    counts them in the order in which /proc/PID/fdinfo lists them. Both descriptors are the caller's.
    Raises OSError ENOENT when there is no such registration.
    """
    pid = os.getpid()
    slot = struct.pack("3I", epoll_fd, number, occurrence)  # struct kcmp_epoll_slot
    return syscall(NR.kcmp, pid, pid, KCMP_EPOLL_TFD, fd, slot) == 0
