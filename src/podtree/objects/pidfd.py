"""Process descriptors (pidfd_open(2)): of the pod's processes and threads, zombies included, and of ended ones.

A descriptor of what has been waited for refers to nothing but the memory of how that ended. Descriptors can only be
made when the processes are there, so the builder leaves something else in their slots (see podtree.restore.late).
"""

from __future__ import annotations

import os

import msgspec

from podtree.kernel import pidfd
from podtree.objects.context import CollectContext
from podtree.objects.held import Held

NAME = "pidfd"
LINK = b"anon_inode:[pidfd]"


class PidFd(msgspec.Struct, frozen=True, tag="pidfd"):
    """Of process or thread (`thread`: PIDFD_THREAD) `pid`. 0: of one that has been waited for, whose wait status was
    `status`; `key` tells which of those are of the same."""

    pid: int
    thread: bool = False
    status: int = 0
    key: str = ""


def collect(held: Held, ctx: CollectContext) -> PidFd | None:
    """State of a pidfd; None when refused."""
    host = int(held.info.one("Pid"))  # 0: of a process that our /proc doesn't show
    thread = bool(held.flags & pidfd.PIDFD_THREAD)
    if host == -1:
        return PidFd(0, thread, pidfd.exit_status(held.fd) or 0, str(held.stat.st_ino))
    for process in ctx.processes:
        if host == process.host_pid:
            return PidFd(process.pid, thread)
        for task in process.tasks:
            if host == task.tid:
                return PidFd(task.inner_tid, thread)
    held.refuse(ctx, "it is of a process outside of the pod", "close it")
    return None


def restore() -> int:
    """What keeps the slot until the process is there."""
    return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
