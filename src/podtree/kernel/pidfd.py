"""Process descriptors: pidfd_open(2), pidfd_getfd(2), pidfd_send_signal(2); include/uapi/linux/pidfd.h (Linux 6.18)."""

from __future__ import annotations

import fcntl
import os
import select
import struct

from podtree.kernel import procfs
from podtree.kernel.sys import NR, syscall

PIDFD_THREAD = os.O_EXCL  # of one thread, not of a process (Linux 6.9); F_GETFL shows it
PIDFD_GET_INFO = 0xC040FF0B  # _IOWR(0xFF, 11, struct pidfd_info): Linux 6.13
PIDFD_INFO_EXIT = 1 << 3  # Linux 6.15
_INFO = struct.Struct("QQ11Ii")  # mask, cgroup id, pids and credentials, exit code


def pidfd_open(pid: int) -> int:
    """A close-on-exec descriptor of the process; readable once it has ended."""
    return syscall(NR.pidfd_open, pid, 0)


def pidfd_open_living(pid: int) -> int:
    """A descriptor of a process by which its descriptors can be had: of a living thread if its leader has ended.

    OSError EINVAL before Linux 6.9 in that case.
    """
    tid = procfs.living_thread(pid)
    return pidfd_open(pid) if tid == pid else pidfd_open_thread(tid)


def pidfd_open_thread(tid: int) -> int:
    """A close-on-exec descriptor of one thread (Linux 6.9; OSError EINVAL before)."""
    return syscall(NR.pidfd_open, tid, PIDFD_THREAD)


def pidfd_open_any(tid: int) -> int:
    """A close-on-exec descriptor of a thread, be it a leader or not; of another one only since Linux 6.9."""
    leader = int(procfs.status(tid)["Tgid"]) == tid
    return pidfd_open(tid) if leader else pidfd_open_thread(tid)


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A close-on-exec duplicate (same open file description) of descriptor `fd` of another process."""
    return syscall(NR.pidfd_getfd, pidfd, fd, 0)


def pidfd_send_signal(pidfd: int, signum: int) -> None:
    """kill(2) that can't hit a recycled pid."""
    syscall(NR.pidfd_send_signal, pidfd, signum, None, 0)


def has_ended(pidfd: int, timeout_s: float = 0) -> bool:
    """Whether the process has ended, waiting up to `timeout_s`."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def exit_status(pidfd: int) -> int | None:
    """How a process ended that has been waited for, as wait(2) reports it; None if the kernel doesn't tell."""
    raw = bytearray(_INFO.size)
    _INFO.pack_into(raw, 0, PIDFD_INFO_EXIT, *[0] * 13)
    try:
        fcntl.ioctl(pidfd, PIDFD_GET_INFO, raw)
    except OSError:
        return None
    mask, *_, status = _INFO.unpack(raw)
    return int(status) if mask & PIDFD_INFO_EXIT else None
