"""Process descriptors: pidfd_open(2), pidfd_getfd(2), pidfd_send_signal(2)."""

from __future__ import annotations

import select

from podtree.kernel.sys import NR, syscall


def pidfd_open(pid: int) -> int:
    """A close-on-exec descriptor of the process; readable once it has ended."""
    return syscall(NR.pidfd_open, pid, 0)


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
