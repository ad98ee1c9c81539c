"""The pod's clocks: a time namespace that its processes enter when it is known from when they go on.

A process's own namespace can be changed as long as it has one thread and its memory is nobody else's (setns(2),
kernel/time/namespace.c, timens_install); the offsets only until somebody is in it. Source: time_namespaces(7).
"""

from __future__ import annotations

import os

from podtree.errors import RestoreFailed
from podtree.kernel.namespaces import Clone, set_time_offsets
from podtree.kernel.sys import NR
from podtree.pod.live import ClockOffsets
from podtree.restore.arena import Body


def enter_new_time(body: Body, clock: ClockOffsets, proc_slot: int) -> None:
    """Put a task into a new time namespace. `proc_slot`: its descriptor of the host's /proc. Raises RestoreFailed."""
    body.do(NR.unshare, Clone.NEWTIME)
    try:
        set_time_offsets(clock.monotonic_ns, clock.boottime_ns, body.tid)
    except OSError as error:
        raise RestoreFailed(f"the pod's clocks can't be set: {error.strerror}") from error
    path = body.put(b"self/ns/time_for_children\0")
    fd = body.do(NR.openat, proc_slot, path, os.O_RDONLY | os.O_CLOEXEC, 0)
    body.do(NR.setns, fd, Clone.NEWTIME)
    body.do(NR.close, fd)


def join_time(body: Body) -> None:
    """Put a task into that of the pod's first process. Raises RestoreFailed."""
    first = body.do(NR.pidfd_open, 1, 0)
    body.do(NR.setns, first, Clone.NEWTIME)
    body.do(NR.close, first)
