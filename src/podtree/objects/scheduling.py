"""Scheduling of a thread, and what else is set from outside: policy, nice, affinity, I/O priority,
timer slack; per process: resource limits, OOM score (sched_setattr(2), prlimit(2), ioprio_set(2))."""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from collections.abc import Callable

import msgspec

from podtree.kernel import procfs
from podtree.kernel.sys import NR, syscall

RLIM_NLIMITS = 16  # asm-generic/resource.h
IOPRIO_WHO_PROCESS = 1
_ATTR_SIZE = 56  # SCHED_ATTR_SIZE_VER1, linux/sched/types.h


class Scheduling(msgspec.Struct, frozen=True):
    """`attr` is struct sched_attr; `affinity` the allowed CPUs; `io_priority` 0 if never set."""

    attr: bytes
    affinity: tuple[int, ...]
    io_priority: int
    timer_slack: int  # nanoseconds


def collect(tid: int) -> Scheduling:
    """Of a stopped thread (host tid)."""
    attr = ctypes.create_string_buffer(_ATTR_SIZE)
    syscall(NR.sched_getattr, tid, attr, _ATTR_SIZE, 0)
    try:
        with open(f"/proc/{tid}/timerslack_ns") as file:
            slack = int(file.read())
    except OSError:
        slack = 0
    return Scheduling(
        attr=attr.raw,
        affinity=tuple(sorted(os.sched_getaffinity(tid))),
        io_priority=syscall(NR.ioprio_get, IOPRIO_WHO_PROCESS, tid),
        timer_slack=slack,
    )


def restore(state: Scheduling, tid: int) -> None:
    """Apply to a thread of a pod that is being restored (host tid).

    CPUs that this machine doesn't have are left out; with none of them left, all are allowed.
    """
    attr = bytearray(state.attr)
    struct.pack_into("<I", attr, 0, _ATTR_SIZE)
    current = ctypes.create_string_buffer(_ATTR_SIZE)
    syscall(NR.sched_getattr, tid, current, _ATTR_SIZE, 0)
    if current.raw[4:48] != state.attr[4:48]:
        syscall(NR.sched_setattr, tid, bytes(attr), 0)
    (nice,) = struct.unpack_from("<i", state.attr, 16)
    if nice != os.getpriority(os.PRIO_PROCESS, tid):  # sched_setattr(2) ignores it for SCHED_IDLE
        os.setpriority(os.PRIO_PROCESS, tid, nice)
    here = os.sched_getaffinity(tid)
    wanted = set(state.affinity) & set(range(os.cpu_count() or 1))
    if wanted and wanted != here:
        os.sched_setaffinity(tid, wanted)
    if state.io_priority != syscall(NR.ioprio_get, IOPRIO_WHO_PROCESS, tid):
        syscall(NR.ioprio_set, IOPRIO_WHO_PROCESS, tid, state.io_priority)
    if state.timer_slack:
        with open(f"/proc/{tid}/timerslack_ns", "w") as file:
            file.write(str(state.timer_slack))


class Limits(msgspec.Struct, frozen=True):
    """Resource limits (soft, hard; -1 is unlimited) by RLIMIT_* number, and two settings of /proc/PID."""

    limits: tuple[tuple[int, int], ...]
    oom_score_adj: int
    coredump_filter: int  # core(5)


def parse_limits(text: str) -> tuple[tuple[int, int], ...]:
    """The table of /proc/PID/limits, which has one line per RLIMIT_* number, in their order (proc_pid_limits(5)).

    prlimit(2) would need CAP_SYS_RESOURCE to look at a process of another user.
    """
    rows = [(line[26:46].strip(), line[47:67].strip()) for line in text.splitlines()[1:]]
    if len(rows) != RLIM_NLIMITS:
        raise RuntimeError(f"/proc/PID/limits has {len(rows)} lines instead of {RLIM_NLIMITS}")
    return tuple((_limit(soft), _limit(hard)) for soft, hard in rows)


def _limit(word: str) -> int:
    return resource.RLIM_INFINITY if word == "unlimited" else int(word)


def collect_limits(pid: int) -> Limits:
    """Of a stopped process (host pid)."""
    return Limits(
        limits=parse_limits(procfs.read_text(f"/proc/{pid}/limits")),
        oom_score_adj=int(procfs.read_text(f"/proc/{pid}/oom_score_adj")),
        coredump_filter=int(procfs.read_text(f"/proc/{pid}/coredump_filter"), 16),
    )


def restore_limits(state: Limits, pid: int, limit_itself: Callable[[int, tuple[int, int]], None] | None = None) -> None:
    """Apply to a process of a pod that is being restored (host pid).

    `limit_itself`: has it set one of its resource limits; for a process of another user, as prlimit(2) wants.
    """
    here = parse_limits(procfs.read_text(f"/proc/{pid}/limits"))
    for number, limit in enumerate(state.limits):
        if here[number] != limit:
            limit_itself(number, limit) if limit_itself else resource.prlimit(pid, number, limit)
    if int(procfs.read_text(f"/proc/{pid}/oom_score_adj")) != state.oom_score_adj:
        with open(f"/proc/{pid}/oom_score_adj", "w") as file:
            file.write(str(state.oom_score_adj))
    with open(f"/proc/{pid}/coredump_filter", "w") as file:
        file.write(f"{state.coredump_filter:#x}")
