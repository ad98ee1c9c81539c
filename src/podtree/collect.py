"""From a frozen pod to typed state: the order in which the objects are visited.

Everything here only looks (and, for unlinked files, clones them into the hidden directory). What a
task can only tell itself, it tells by a script; see `_interview`.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass, field

import msgspec

from podtree.freeze import Frozen
from podtree.image.manifest import Manifest
from podtree.kernel import mm, procfs, ptrace
from podtree.kernel.mountinfo import mounts_of
from podtree.kernel.pidfd import pidfd_getfd
from podtree.kernel.prctl import core_cookie
from podtree.kernel.procfs import MapEntry
from podtree.kernel.sys import NR
from podtree.mapcache import MapCache
from podtree.objects import (
    aio,
    credentials,
    ldt,
    memory,
    nesting,
    processes,
    scheduling,
    seccomp,
    signals,
    tables,
    threads,
    timers,
    tmpfs,
)
from podtree.objects.aio import AioRing
from podtree.objects.contents import Contents
from podtree.objects.context import CollectContext, FrozenProcess, FrozenTask
from podtree.objects.descriptors import Fd, FileTable
from podtree.objects.held import OWN_TMPFS
from podtree.objects.memory import Memory, Vma, VmaKind
from podtree.objects.nesting import POD, Membership, Nesting
from podtree.objects.processes import Place, Process, Zombie
from podtree.objects.tables import KINDS, Directories, SharedTables
from podtree.objects.threads import EndedLeader, Thread
from podtree.objects.tmpfs import TmpfsMount
from podtree.script.task import Remote, Results, Scratch, Script
from podtree.script.vdso import STUB_STRIDE, stub_offset

USER_CS = 0x33  # 64-bit code segment (arch/x86/include/asm/segment.h)
CALLS_PER_SCRIPT = 160
SCRATCH_SIZE = 64 * 1024


@dataclass(slots=True)
class ProcessView:
    """What one frozen process showed of itself, before it becomes state."""

    process: FrozenProcess
    entries: list[MapEntry] = field(default_factory=list)
    borrowed: bool = False  # its address space is another process's, which is saved with that one
    threads: list[Thread] = field(default_factory=list)
    asked: processes.Asked | None = None
    results: Results | None = None
    listed_timers: list[tuple[int, int, int, int, int, int]] = field(default_factory=list)
    uffd: int = -1  # a new userfaultfd of its address space, if one was wanted
    unreported_stops: set[int] = field(default_factory=set)  # stopped children that it hasn't waited for
    read_ns: int = 0  # our CLOCK_MONOTONIC when the script ran
    last_pid: int = 0  # of the pid namespace that it is the first process of
    lock_future: int = 0  # of mlockall(2)
    ldt: bytes = b""  # its local descriptor table
    rearranged: bool = False  # its mappings are no longer all as `entries` says

    @property
    def vdso(self) -> MapEntry | None:
        return next((e for e in self.entries if e.path == "[vdso]"), None)


def _wants_tracking(view: ProcessView) -> bool:
    """No private mapping is tracked: a new address space (fresh process, exec, or a lost supervisor)."""
    return not any("uw" in e.flags for e in view.entries if memory.is_trackable(e))


def look(frozen: Frozen, ctx: CollectContext, maps: MapCache, *, track: bool = True) -> list[ProcessView]:
    """Read the mappings of all processes and let all tasks tell their state by script."""
    views: list[ProcessView] = []
    stopped = _stopped_children(frozen)
    ctx.sharing = tables.collect(frozen.processes, ctx)
    for process in frozen.processes:
        if process.zombie:
            continue
        owner = ctx.sharing.of(process.pid).memory
        entries = next((v.entries for v in views if v.process.pid == owner), None) if owner else None
        view = ProcessView(process, maps.of(process) if entries is None else entries, bool(owner))
        if _can_run_scripts(view, ctx):
            wanted = track and not view.borrowed and _wants_tracking(view)
            _interview(view, stopped.get(process.host_pid, []), track=wanted)
            views.append(view)
    return views


def _stopped_children(frozen: Frozen) -> dict[int, list[tuple[int, int]]]:
    """Host pid of each parent -> its children that are stopped by job control: the pod's pid, what it calls them."""
    found: dict[int, list[tuple[int, int]]] = {}
    depths = {p.host_pid: len(procfs.ns_pids(p.first.status)) for p in frozen.processes if not p.zombie}
    for process in frozen.processes:
        if not process.zombie and process.first.group_stop:
            parent = procfs.stat(process.host_pid).ppid
            numbers = procfs.ns_pids(procfs.status(process.host_pid))
            number = numbers[depths[parent] - 1] if parent in depths else process.pid
            found.setdefault(parent, []).append((process.pid, number))
    return found


def _can_run_scripts(view: ProcessView, ctx: CollectContext) -> bool:
    process = view.process
    if view.vdso is None:
        ctx.refuse(process, "vdso", "is not mapped; podtree needs it to act inside the process")
        return False
    for task in process.tasks:
        if task.regs.cs != USER_CS:
            ctx.refuse(process, f"thread {task.inner_tid}", "runs 32-bit code")
            return False
        if ptrace.syscall_dispatch_is_on(task.tid):  # a script's calls would be dispatched to the program
            ctx.refuse(process, f"thread {task.inner_tid}", "uses syscall user dispatch")
            return False
    return True


def _interview(view: ProcessView, stopped_children: list[tuple[int, int]], *, track: bool) -> None:
    """Run the scripts of one process: the first thread's, which tells for the process too, then each other's."""
    process = view.process
    assert view.vdso is not None
    address = view.vdso.start + stub_offset()
    view.listed_timers = timers.list_posix_timers(process.living)
    timer_ids = [t[0] for t in view.listed_timers]
    with Remote(process.living, address) as remote:
        capacity = CALLS_PER_SCRIPT + len(timer_ids) + len(stopped_children)
        size = SCRATCH_SIZE + (len(timer_ids) + len(stopped_children)) * 256
        with Scratch(remote, size) as area:
            script = Script(area.address, area.size, capacity)
            asked_thread = threads.ask(script)
            view.asked = processes.ask(script, timer_ids)
            asked_stops = processes.ask_stops(script, stopped_children)
            uffd = script.add(NR.userfaultfd, os.O_CLOEXEC | os.O_NONBLOCK | mm.UFFD_USER_MODE_ONLY) if track else -1
            view.results = script.execute(remote)
            view.read_ns = time.monotonic_ns()
            if track and view.results.ok(uffd):
                number = view.results.values[uffd]
                view.uffd = _take_uffd(process.pidfd, number)
                remote.do(NR.close, number)
            if not view.borrowed and view.results.ok(view.asked.ldt) and view.results.values[view.asked.ldt]:
                view.ldt = ldt.collect(remote, area.address)
            if not view.borrowed:
                view.lock_future = memory.future_locks(process.living, view.entries, area.address)
            view.unreported_stops = processes.read_stops(asked_stops, view.results)
            if process.pid == 1 or procfs.inner_id(process.first.status) == 1:
                view.last_pid = _ask_last_pid(remote, area)
            _add_thread(view, 0, asked_thread, view.results)
            if len(process.tasks) > 1:
                _interview_threads(view, address + STUB_STRIDE, area.address)


def _ask_last_pid(remote: Remote, area: Scratch) -> int:
    """The last pid given out in the pod (pid_namespaces(7), ns_last_pid); 0 if the process can't tell."""
    mm.write_memory(remote.tid, area.address, b"/proc/sys/kernel/ns_last_pid\0")
    fd = remote.call(NR.open, area.address, os.O_RDONLY | os.O_CLOEXEC)
    if fd >= 1 << 31:
        return 0
    count = remote.call(NR.read, fd, area.address, 32)
    remote.do(NR.close, fd)
    text = mm.read_memory(remote.tid, area.address, count) if count <= 32 else b""
    return int(text) if text.strip().isdigit() else 0


def close_leftovers(frozen: Frozen) -> None:
    """Close userfaultfds that a killed supervisor had its tasks make; programs of a pod can't make any."""
    for process in frozen.processes:
        if process.zombie:
            continue
        for number in _descriptors_named(process.living, "anon_inode:[userfaultfd]"):
            vdso = next((e for e in procfs.maps(process.living) if e.path == "[vdso]"), None)
            if vdso:
                with Remote(process.living, vdso.start + stub_offset()) as remote:
                    remote.do(NR.close, number)


def _descriptors_named(tid: int, name: str) -> list[int]:
    base = f"/proc/{tid}/fd"
    return [int(n) for n in os.listdir(base) if os.readlink(f"{base}/{n}") == name]


def _take_uffd(pidfd: int, number: int) -> int:
    fd = pidfd_getfd(pidfd, number)
    try:
        mm.uffd_enable(fd)
    except OSError:
        os.close(fd)
        return -1
    return fd


def _interview_threads(view: ProcessView, address: int, scratch: int) -> None:
    """The other threads, one after the other. They use the first's scratch area, but a stub of their own:
    that one's save area must stay valid all along."""
    for index in range(1, len(view.process.tasks)):
        task = view.process.tasks[index]
        with Remote(task.tid, address) as remote:
            script = Script(scratch, SCRATCH_SIZE, 16)
            asked = threads.ask(script)
            results = script.execute(remote)
        _add_thread(view, index, asked, results)


def _add_thread(view: ProcessView, index: int, asked: threads.Asked, results: Results) -> None:
    process = view.process
    task = process.tasks[index]
    view.threads.append(threads.collect(task, asked, results, _read_comm(process.host_pid, task.tid)))


def _read_comm(host_pid: int, tid: int) -> bytes:
    with open(f"/proc/{host_pid}/task/{tid}/comm", "rb") as file:
        return file.read().removesuffix(b"\n")


@dataclass(slots=True)
class Collected:
    """The state of all processes, still without pages."""

    processes: list[Process]
    zombies: list[Zombie]
    last_pid: int
    nesting: Nesting


def collect_processes(
    frozen: Frozen, views: list[ProcessView], ctx: CollectContext, table: FileTable
) -> Collected:
    """Turn what was seen into state; problems go to `ctx`."""
    living = [p for p in frozen.processes if not p.zombie]
    nested = nesting.collect(living, ctx, {v.process.pid: v.last_pid for v in views})
    places = processes.collect_places(frozen.processes, nested, ctx)
    inner_tid = {t.tid: t.inner_tid for p in frozen.processes for t in p.tasks}
    mapped: dict[tuple[tuple[int, int], int, str, bool], int | None] = {}
    unreported = {pid for v in views for pid in v.unreported_stops}
    # Before all else: requests under way, which are waited for, count in eventfds and write to shared memory.
    rings = {v.process.pid: () if v.borrowed else aio.collect(v.process, v.entries, ctx) for v in views}
    found = [
        _collect_process(v, places[v.process.pid], ctx, table, inner_tid, mapped, unreported, rings[v.process.pid])
        for v in views
    ]
    zombies = [_collect_zombie(p, places[p.pid]) for p in frozen.processes if p.zombie]
    found = [msgspec.structs.replace(p, member=nested.of(p.place.pid)) for p in found]
    last_pid = next((v.last_pid for v in views if v.process.pid == 1), 0)
    return Collected(found, zombies, last_pid, nested.nesting)


def _collect_process(
    view: ProcessView,
    place: Place,
    ctx: CollectContext,
    table: FileTable,
    inner_tid: dict[int, int],
    mapped: dict[tuple[tuple[int, int], int, str, bool], int | None],
    unreported: set[int],
    rings: tuple[AioRing, ...],
) -> Process:
    process, asked, results = view.process, view.asked, view.results
    assert asked is not None and results is not None
    living = process.living
    _refuse_task_state(view, ctx, results)
    shared = ctx.sharing.of(process.pid)
    fds: list[Fd] = [] if shared.files else table.add_process(process)
    for index, task in enumerate(process.tasks):
        if own := ctx.sharing.own.get(task.inner_tid):
            view.threads[index] = _with_own_tables(view.threads[index], process, task, own, table)
    directories = _directories(process.living, process.first.status, table)
    if results.values[asked.brk] >> 47:
        ctx.refuse(process, "brk", "the program break can't be read")
    return Process(
        place=place,
        threads=tuple(view.threads),
        memory=_collect_memory(view, ctx, table, results.values[asked.brk], mapped, rings),
        fds=tuple(fds),
        cwd=directories.cwd,
        root=directories.root,
        exe=_add_link(f"/proc/{living}/exe", os.O_RDONLY, table),
        umask=directories.umask,
        actions=signals.Actions({}) if shared.actions else signals.read_actions(asked.actions, results),
        pending=tuple(signals.collect_pending(living, shared=True)),
        read_ns=view.read_ns + ctx.clock_offset_ns,
        interval_timers=timers.read_interval_timers(asked.interval_timers, results),
        posix_timers=tuple(processes.collect_posix_timers(view.listed_timers, asked, results, inner_tid)),
        limits=scheduling.collect_limits(living),
        personality=results.values[asked.personality],
        dumpable=results.values[asked.dumpable],
        child_subreaper=bool(results.i32(asked.subreaper)),
        thp_disable=bool(results.values[asked.thp]),
        mdwe=results.values[asked.mdwe] if results.ok(asked.mdwe) else 0,
        merge_memory=results.ok(asked.merge) and bool(results.values[asked.merge]),
        ldt=view.ldt,
        membarrier=results.values[asked.membarrier] if results.ok(asked.membarrier) else 0,
        stopped_by=process.first.group_stop,
        stop_reported=process.pid not in unreported,
        shared=shared,
        ended_leader=_ended_leader(view, ctx) if process.leaderless else None,
    )


def _ended_leader(view: ProcessView, ctx: CollectContext) -> EndedLeader:
    """The leader of a process of which only other threads live."""
    host = view.process.host_pid
    ended = EndedLeader(
        comm=_read_comm(host, host),
        status=procfs.stat(host, host).exit_code,
        credentials=credentials.collect(procfs.status(host, host), view.threads[0].credentials.securebits),
        scheduling=scheduling.collect(host),
    )
    if ended.status & 0x7F:  # SECCOMP_RET_KILL_THREAD: any other signal ends the whole process
        ctx.refuse(view.process, "thread group", "its leader was killed by a seccomp filter, and other threads live on")
    return ended


def _collect_memory(
    view: ProcessView,
    ctx: CollectContext,
    table: FileTable,
    brk: int,
    mapped: dict[tuple[tuple[int, int], int, str, bool], int | None],
    rings: tuple[AioRing, ...],
) -> Memory:
    process = view.process
    layout = memory.collect_layout(process.living, brk)
    if view.borrowed:
        return Memory(vmas=(), layout=layout, pages=str(ctx.sharing.of(process.pid).memory))

    def file_of(entry: MapEntry, writable: bool) -> int | None:
        key = (entry.device, entry.inode, entry.path, writable)
        if key not in mapped:
            mapped[key] = _add_mapped_file(process, entry, writable, ctx, table)
        return mapped[key]

    vmas: list[Vma] = memory.collect_vmas(view.entries, file_of, functools.partial(ctx.refuse, process))
    return Memory(
        vmas=tuple(vmas),
        layout=layout,
        pages=str(process.pid),
        rings=rings,
        lock_future=view.lock_future,
    )


def _add_mapped_file(
    process: FrozenProcess, entry: MapEntry, writable: bool, ctx: CollectContext, table: FileTable
) -> int | None:
    name = f"mapping {entry.start:x}-{entry.end:x} {entry.path}"
    if entry.path.startswith("anon_inode:") or entry.path.startswith("socket:"):
        ctx.refuse(process, name, "maps kernel memory that can't be made again")
        return None
    path = f"/proc/{process.living}/map_files/{entry.start:x}-{entry.end:x}"
    try:
        return _add_link(path, os.O_RDWR if writable else os.O_RDONLY, table)
    except OSError as error:
        ctx.refuse(process, name, f"the mapped file can't be opened: {error.strerror}")
        return None


def _add_link(path: str, access: int, table: FileTable) -> int:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return table.add_local(fd, os.readlink(path), access)
    finally:
        os.close(fd)


def _directories(tid: int, status: dict[str, str], table: FileTable) -> Directories:
    """Of a thread (host tid). The pod's own root isn't registered."""
    access = os.O_PATH | os.O_DIRECTORY
    rooted = os.readlink(f"/proc/{tid}/root") != "/"
    return Directories(
        cwd=_add_link(f"/proc/{tid}/cwd", access, table),
        root=_add_link(f"/proc/{tid}/root", access, table) if rooted else -1,
        umask=int(status["Umask"], 8),
    )


def _with_own_tables(
    thread: Thread, process: FrozenProcess, task: FrozenTask, own: set[str], table: FileTable
) -> Thread:
    return msgspec.structs.replace(
        thread,
        fds=tuple(table.add_thread(process, task)) if "files" in own else None,
        directories=_directories(task.tid, task.status, table) if "directories" in own else None,
        own_undo="undo" in own,
    )


def _collect_zombie(process: FrozenProcess, place: Place) -> Zombie:
    stat = procfs.stat(process.host_pid)
    return Zombie(place=place, comm=os.fsencode(process.comm), status=stat.exit_code)


def _refuse_task_state(view: ProcessView, ctx: CollectContext, results: Results) -> None:
    """What a task can have and this engine does not save."""
    process, asked = view.process, view.asked
    assert asked is not None
    for task in process.tasks:
        if core_cookie(task.tid):
            ctx.refuse(process, f"thread {task.inner_tid}", "has a core scheduling cookie (PR_SCHED_CORE)")
    for thread in view.threads:
        if seccomp.needs_listener(thread.seccomp):
            ctx.refuse(process, f"thread {thread.tid}", "has a seccomp filter that notifies another process")
        if thread.xstate == b"":
            ctx.refuse(process, f"thread {thread.tid}", "its FPU state can't be read")


def refuse_what_nesting_forbids(manifest: Manifest, ctx: CollectContext) -> None:
    """What a process in a user namespace of its own could not be given again: it has no rights over the pod's."""
    frozen = {p.pid: p for p in ctx.processes}
    spaces = {p.place.pid: p.place.space for p in manifest.processes}
    apart = {p.place.pid for p in manifest.processes if p.member != Membership()}
    tracers = {t.tid for p in manifest.processes if p.place.pid in apart for t in p.threads}
    for process in manifest.processes:
        one, member = frozen[process.place.pid], process.member
        owners = {process.place.pid} if member != Membership() and process.shared != SharedTables() else set()
        owners |= {getattr(process.shared, kind) for kind in KINDS}
        if owners & apart:
            ctx.refuse(one, "tables in common", "are shared by processes of which one is in a namespace made inside")
        for thread in process.threads:
            inside = member != Membership()
            if (inside and thread.own_tables) or (thread.tracing and (inside or thread.tracing.tracer in tracers)):
                reason = "is traced, or has tables for itself, with a namespace made inside"
                ctx.refuse(one, f"thread {thread.tid}", reason)
        if member != Membership() and process.ended_leader:
            ctx.refuse(one, "thread group", "its leader has ended, in a namespace made inside")
        if member.user == POD:
            continue
        if any(vma.kind is VmaKind.SYSV for vma in process.memory.vmas):
            ctx.refuse(one, "System V shared memory", "is attached in a user namespace of its own")
    for file in manifest.files:
        owner = file.owner
        space = spaces.get(owner.pid, POD) if owner else POD  # a thread with descriptors of its own is in none
        if owner and space != POD and spaces.get(owner.id, POD) != space:
            ctx.refuse(frozen[owner.pid], f"fd {owner.fd}", "has an owner (F_SETOWN) outside of the pid namespace")


def collect_tmpfs_mounts(living: int, ctx: CollectContext, contents: Contents) -> tuple[TmpfsMount, ...]:
    """The contents of the pod's own memory file systems, by mount point.

    `living`: a thread of the pod's first process. Something could lie over a mount point: what is opened must be on
    the device that mountinfo names.
    """
    found = []
    for mount in mounts_of(living).values():
        point = os.fsdecode(mount.point)
        if mount.fstype != "tmpfs" or point not in OWN_TMPFS:
            continue
        path = f"/proc/{living}/root".encode() + mount.point
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_dev == mount.device:
                found.append(tmpfs.collect_tmpfs(point, fd, ctx, contents))
            else:
                ctx.refuse(None, f"tmpfs {point}", "can't be reached: something is in its way")
        finally:
            os.close(fd)
    return tuple(found)
