"""One process (thread group): its place in the tree, its threads, and what they share.

Sources: proc_pid_stat(5), clone(2), setsid(2), setpgid(2), prctl(2), umask(2).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator

import msgspec

from podtree.kernel import procfs
from podtree.kernel.sys import NR
from podtree.objects import ldt, nesting, signals, timers
from podtree.objects.context import CollectContext, FrozenProcess
from podtree.objects.descriptors import Fd
from podtree.objects.memory import Memory
from podtree.objects.nesting import POD, POD_DEPTH, Inner, Membership
from podtree.objects.scheduling import Limits
from podtree.objects.signals import Actions
from podtree.objects.tables import SharedTables
from podtree.objects.threads import EndedLeader, Thread
from podtree.objects.timers import IntervalTimers, PosixTimer
from podtree.script.task import Results, Script

PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4
PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37
PR_GET_THP_DISABLE, PR_SET_THP_DISABLE = 42, 41
PR_SET_MDWE, PR_GET_MDWE = 65, 66
PR_SET_MEMORY_MERGE, PR_GET_MEMORY_MERGE = 67, 68
MEMBARRIER_GET_REGISTRATIONS = 1 << 9  # membarrier(2), linux/membarrier.h (6.3)
P_PID = 1  # linux/wait.h
WSTOPPED, WNOWAIT = 2, 0x01000000  # linux/wait.h
BRK_QUERY = 0
PERSONALITY_QUERY = 0xFFFFFFFF


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a process stands: pids as inside the pod; ppid 0: started from outside (`podtree exec`)."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    exit_signal: int  # sent to the parent at its end
    tty: int = 0  # device number of the controlling terminal
    foreground: int = -1  # that terminal's foreground process group
    space: int = POD  # id of its pid namespace
    inner: tuple[Inner, ...] = ()  # its numbers there and in those above that aren't the pod's, outermost first


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """A living process; zombies have no more than their place (see Zombie)."""

    place: Place
    threads: tuple[Thread, ...]  # those that live, leader first
    memory: Memory
    fds: tuple[Fd, ...]
    cwd: int  # OpenFile.id
    root: int  # OpenFile.id; -1: the pod's own root
    exe: int  # OpenFile.id
    umask: int
    actions: Actions
    pending: tuple[bytes, ...]  # siginfo queued for the process as a whole
    read_ns: int  # the pod's CLOCK_MONOTONIC when timers and waits were read
    interval_timers: IntervalTimers
    posix_timers: tuple[PosixTimer, ...]
    limits: Limits
    personality: int
    dumpable: int
    child_subreaper: bool
    thp_disable: bool
    membarrier: int  # MEMBARRIER_CMD_REGISTER_* commands in force
    stopped_by: int  # the signal if stopped by job control, else 0
    stop_reported: bool = True  # the parent has waited for that already
    member: Membership = Membership()  # which namespaces it is in
    mdwe: int = 0  # PR_MDWE_*: no memory that can be written and executed
    merge_memory: bool = False  # PR_SET_MEMORY_MERGE
    ldt: bytes = b""  # local descriptor table, see podtree.objects.ldt
    shared: SharedTables = SharedTables()  # what is another process's is empty here, or a copy of its
    ended_leader: EndedLeader | None = None  # its leader isn't among `threads` then

    @property
    def comm(self) -> bytes:
        """Its name: the leader's."""
        return self.ended_leader.comm if self.ended_leader else self.threads[0].comm


class Zombie(msgspec.Struct, frozen=True, kw_only=True):
    """A process that ended and that its parent has not waited for."""

    place: Place
    comm: bytes
    status: int  # as wait(2) reports it


def tables_of(processes: Iterable[Process]) -> Iterator[tuple[int, tuple[Fd, ...]]]:
    """All descriptor tables, each with who holds it: the process that owns it, or the thread that has it for itself."""
    for process in processes:
        if not process.shared.files:
            yield process.place.pid, process.fds
        for thread in process.threads:
            if thread.fds is not None:
                yield thread.tid, thread.fds


class AskedStops(msgspec.Struct):
    """Where a parent's script tells which of its stopped children it has still to hear of."""

    infos: dict[int, int]  # inner pid of the child -> address of a siginfo_t


def ask_stops(script: Script, children: list[tuple[int, int]]) -> AskedStops:
    """Add the calls that ask, without consuming, for unreported stops of these children (waitid(2)).

    Each by the pod's number and what its parent calls it.
    """
    infos = {}
    for pid, number in children:
        infos[pid] = script.space(128)
        script.add(NR.waitid, P_PID, number, infos[pid], WSTOPPED | os.WNOHANG | WNOWAIT, 0, name="waitid")
    return AskedStops(infos)


def read_stops(asked: AskedStops, results: Results) -> set[int]:
    """Children whose stop is unreported."""
    return {pid for pid, address in asked.infos.items() if results.i32(address) == signal.SIGCHLD}


class Asked(msgspec.Struct):
    """Where the leader's script leaves what concerns the whole process."""

    actions: list[tuple[int, int]]
    interval_timers: list[int]
    posix_timers: list[int]
    brk: int
    personality: int
    dumpable: int
    subreaper: int
    thp: int
    mdwe: int
    merge: int
    ldt: int
    membarrier: int


def ask(script: Script, timer_ids: list[int]) -> Asked:
    """Add the calls that the leader has to make to tell the process's state."""
    subreaper = script.space(8)
    script.add(NR.prctl, PR_GET_CHILD_SUBREAPER, subreaper, 0, 0, 0, name="PR_GET_CHILD_SUBREAPER")
    return Asked(
        actions=signals.ask_actions(script),
        interval_timers=timers.ask_interval_timers(script),
        posix_timers=timers.ask_posix_timers(timer_ids, script),
        brk=script.add(NR.brk, BRK_QUERY, name="brk"),
        personality=script.add(NR.personality, PERSONALITY_QUERY, name="personality"),
        dumpable=script.add(NR.prctl, PR_GET_DUMPABLE, 0, 0, 0, 0, name="PR_GET_DUMPABLE"),
        subreaper=subreaper,
        thp=script.add(NR.prctl, PR_GET_THP_DISABLE, 0, 0, 0, 0, name="PR_GET_THP_DISABLE"),
        mdwe=script.add(NR.prctl, PR_GET_MDWE, 0, 0, 0, 0),
        merge=script.add(NR.prctl, PR_GET_MEMORY_MERGE, 0, 0, 0, 0),
        ldt=script.add(NR.modify_ldt, ldt.READ, script.space(64), 64),
        membarrier=script.add(NR.membarrier, MEMBARRIER_GET_REGISTRATIONS, 0, 0),
    )


def collect_posix_timers(
    listed: list[tuple[int, int, int, int, int, int]], asked: Asked, results: Results, inner_tid: dict[int, int]
) -> list[PosixTimer]:
    """POSIX timers from /proc and the finished script; `inner_tid` maps host thread ids."""
    found = []
    for (number, clock, notify, signo, value, target), address in zip(listed, asked.posix_timers, strict=True):
        found.append(
            PosixTimer(
                id=number,
                clock=clock,
                notify=notify,
                signal=signo,
                value=value,
                thread=inner_tid.get(target, 0),
                remaining=results.bytes_at(address, 32),
            )
        )
    return found


def collect_places(
    processes: list[FrozenProcess], nested: nesting.Collected, ctx: CollectContext
) -> dict[int, Place]:
    """Places by inner pid.

    /proc shows this process's numbering; the pod's comes from NSpid, NSpgid and NSsid. A parent that
    isn't in the pod is 0, as is a session or group from outside of it.
    """
    inner = {p.host_pid: p.pid for p in processes}
    places: dict[int, Place] = {}
    for process in processes:
        stat = procfs.stat(process.host_pid)
        text = procfs.status(process.host_pid)
        places[process.pid] = Place(
            pid=process.pid,
            ppid=inner.get(stat.ppid, 0),
            pgid=procfs.pod_id(text, "NSpgid"),
            sid=procfs.pod_id(text, "NSsid"),
            exit_signal=stat.exit_signal,
            tty=stat.tty_nr,
            foreground=_inner_group(stat.tpgid, processes),
            inner=_inner_numbers(text),
            space=nested.of(process.pid).pid,
        )
        if process.zombie and places[process.pid].inner:
            space = nested.of(places[process.pid].ppid).children
            places[process.pid] = msgspec.structs.replace(places[process.pid], space=space)
            if len(nested.nesting.chain(space)) != len(places[process.pid].inner):
                ctx.refuse(process, "pid namespace", "has ended with it", "when its parent has waited for it")
    return places


def _inner_numbers(text: dict[str, str]) -> tuple[Inner, ...]:
    """What the pid namespaces made inside call a process, the outermost first."""
    levels = [[int(number) for number in text[key].split()][POD_DEPTH:] for key in ("NSpid", "NSpgid", "NSsid")]
    return tuple(Inner(*numbers) for numbers in zip(*levels, strict=True))


def _inner_group(host_group: int, processes: list[FrozenProcess]) -> int:
    """Inner number of a process group given by its host number; -1 if none of its members is here."""
    if host_group <= 0:
        return -1
    for process in processes:
        if process.host_pid == host_group:
            return process.pid
    for process in processes:
        if procfs.stat(process.host_pid).pgrp == host_group:
            return procfs.pod_id(procfs.status(process.host_pid), "NSpgid")
    return -1


def restore_attributes(process: Process, script: Script, late_ns: int, number: Callable[[int], int]) -> None:
    """Add the calls for what the leader sets for the whole process; `number`: what it calls a thread of the pod's."""
    if process.child_subreaper:
        script.add(NR.prctl, PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0, name="PR_SET_CHILD_SUBREAPER")
    if process.ldt and not process.shared.memory:
        ldt.restore(process.ldt, script)
    if process.thp_disable:
        script.add(NR.prctl, PR_SET_THP_DISABLE, 1, 0, 0, 0, name="PR_SET_THP_DISABLE")
    for bit in range(32):
        if process.membarrier >> bit & 1:
            script.add(NR.membarrier, 1 << bit, 0, 0, name="membarrier registration")
    if not process.shared.actions:
        signals.restore_actions(process.actions, script)
    timers.restore_posix_timers(list(process.posix_timers), script, late_ns, number)


def restore_rules_for_memory(process: Process, script: Script) -> None:
    """Add the calls that come last: what limits or changes all that is mapped from then on, and the dumpable flag."""
    if process.dumpable in (0, 1):
        script.add(NR.prctl, PR_SET_DUMPABLE, process.dumpable, 0, 0, 0, name="PR_SET_DUMPABLE")
    if process.merge_memory:
        script.add(NR.prctl, PR_SET_MEMORY_MERGE, 1, 0, 0, 0, name="PR_SET_MEMORY_MERGE")
    if process.mdwe:
        script.add(NR.prctl, PR_SET_MDWE, process.mdwe, 0, 0, 0, name="PR_SET_MDWE")
