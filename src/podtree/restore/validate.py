"""An image is untrusted: what is checked of a manifest before anything is made of it.

Where only one kind of object is concerned its module checks what it uses, and the kernel checks what it is asked
for. Here is what they rely on: that every reference leads to something in the image, that numbers are possible ones,
and that nobody is given more than a pod may have.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec

from podtree.errors import Damaged, PodtreeError, RestoreFailed, Unsupported
from podtree.image.manifest import Manifest
from podtree.kernel import mm, procfs
from podtree.kernel.ptrace import PTRACE_O_EXITKILL, SIGINFO_SIZE, Regs
from podtree.kernel.sys import PAGE_SIZE
from podtree.objects.credentials import Credentials
from podtree.objects.descriptors import OpenFile
from podtree.objects.held import OWN_TMPFS
from podtree.objects.memory import ADVICE, MCL_FUTURE, MCL_ONFAULT, VmaKind
from podtree.objects.nesting import POD, Membership
from podtree.objects.processes import Place, Process, tables_of
from podtree.objects.scheduling import RLIM_NLIMITS, Limits, Scheduling
from podtree.objects.seccomp import MODE_FILTER, Filter, Seccomp
from podtree.objects.signals import ACTION_SIZE, NSIG
from podtree.objects.tables import KINDS, SharedTables
from podtree.objects.threads import Thread
from podtree.objects.tracing import DEBUG_REGISTERS, Mode
from podtree.pod.live import INIT

MAX_RANGES = 2 * 340  # UID_GID_MAP_MAX_EXTENTS: include/linux/user_namespace.h
MAX_PID = 1 << 22  # PID_MAX_LIMIT: include/linux/threads.h
MAX_FD = 1 << 30  # above any sysctl_nr_open_max: fs/file.c
NO_ID = (1 << 32) - 1  # (uid_t)-1: "leave it as it is"
XSTATE_SIZES = range(576, 1 << 16)  # a legacy area and a header at least: Intel SDM, XSAVE
ORDINARY_POLICIES = (0, 3, 5)  # SCHED_NORMAL, _BATCH, _IDLE: include/uapi/linux/sched.h
REALTIME_POLICIES = (1, 2)  # SCHED_FIFO, _RR
SCHED_ATTR_SIZE = 56
SEMAEM = 32767  # include/uapi/linux/sem.h
IOPRIO_CLASS_RT, IOPRIO_CLASS_SHIFT = 1, 13  # include/uapi/linux/ioprio.h
TRACE_OPTIONS = PTRACE_O_EXITKILL | 0xFF  # not PTRACE_O_SUSPEND_SECCOMP: a pod hasn't the rights
FILTER_FLAG_LOG = 1 << 1  # SECCOMP_FILTER_FLAG_LOG: all that an image can have, linux/seccomp.h
_STDIO_NAME = re.compile(r"exec-(\d{1,9}|pid-\d{1,9})")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What no process of a pod may be beyond: capabilities (a mask), and the seccomp filter that all begin with."""

    capabilities: int
    filter: bytes
    nested: bool = False  # PodSpec.nested

def confine(manifest: Manifest, bounds: Bounds) -> Manifest:
    """The manifest, checked, with the pods' own filter the oldest of every thread.

    Raises Damaged for what can't be, RestoreFailed for what a pod may not have here.
    """
    with _naming():
        _check_files(manifest)
        _check_pod(manifest)
        _check_sharing(manifest)
        _check_nesting(manifest, bounds)
        for process in manifest.processes:
            _check_process(process, {file.id for file in manifest.files}, bounds)
    processes = tuple(_filtered(process, bounds.filter) for process in manifest.processes)
    return msgspec.structs.replace(manifest, processes=processes)


def _expect(holds: object, what: str) -> None:
    if not holds:
        raise Damaged(f"the image makes no sense: {what}")


@contextlib.contextmanager
def _naming() -> Iterator[None]:
    """Whatever else a check trips over is damage, too."""
    try:
        yield
    except (LookupError, ValueError, OverflowError, TypeError) as error:
        raise Damaged(f"the image makes no sense: {type(error).__name__}: {error}") from error


# ------------------------------------------------------------------------------------------- the pod as a whole


def _check_pod(manifest: Manifest) -> None:
    places = [p.place for p in manifest.processes] + [z.place for z in manifest.zombies]
    pids = [place.pid for place in places]
    tids = [t.tid for p in manifest.processes for t in p.threads] + [z.place.pid for z in manifest.zombies]
    tids += [p.place.pid for p in manifest.processes if p.ended_leader]
    _expect(len(set(pids)) == len(pids) and len(set(tids)) == len(tids), "two processes or threads of one number")
    for place in places:
        _check_place(place)
    living = {thread.tid: thread for process in manifest.processes for thread in process.threads}
    for thread in living.values():
        if thread.tracing:
            _check_tracing(thread, living)
    _expect(all(0 < tid < MAX_PID for tid in tids), "a thread of an impossible number")
    adjustments = [by for undo in manifest.ipc.undo for by in undo.adjustments]
    _expect(all(abs(by) <= SEMAEM for by in adjustments), "an adjustment of a semaphore that no process can have")
    _expect(0 <= manifest.last_pid < MAX_PID, f"the last pid {manifest.last_pid}")
    _expect(len(manifest.hostname.encode()) <= 64, "a host name that is too long")
    points = [mount.point for mount in manifest.tmpfs]
    _expect(set(points) <= set(OWN_TMPFS) and len(set(points)) == len(points), f"tmpfs mounts {points}")
    names = [one.name for one in manifest.stdio]
    _expect(names[:1] == [INIT] and len(set(names)) == len(names), f"standard input and output of {names}")
    _expect(all(_STDIO_NAME.fullmatch(name) for name in names[1:]), f"standard input and output of {names}")


def _check_sharing(manifest: Manifest) -> None:
    """A process shares with its parent, which has what is shared from the same owner, or owns it."""
    by_pid = {process.place.pid: process for process in manifest.processes}
    for process in manifest.processes:
        pid, parent = process.place.pid, by_pid.get(process.place.ppid)
        for kind in KINDS:
            owner = getattr(process.shared, kind)
            if owner:
                above = parent and (getattr(parent.shared, kind) or parent.place.pid)
                _expect(owner == above, f"process {pid} shares its {kind} with {owner}, which isn't its parent")
        if process.shared.actions:
            _expect(process.shared.memory, f"process {pid} shares signal actions, but not the memory of the handlers")
            _expect(not process.actions.by_signal, f"process {pid} has signal actions, and shares them")
        _expect(not (process.shared.files and process.fds), f"process {pid} has descriptors, and shares them")
        if process.shared.memory:
            space = process.memory
            _expect(not (space.vmas or space.rings or space.guards), f"process {pid} has memory, and shares it")
            pages = by_pid[process.shared.memory].memory.pages
            _expect(space.pages == pages, f"process {pid} shares its memory, and has other pages")
    _check_tables(manifest)


def _check_tables(manifest: Manifest) -> None:
    for holder, fds in tables_of(manifest.processes):
        numbers = [fd.fd for fd in fds]
        _expect(len(set(numbers)) == len(numbers), f"process {holder} has one descriptor twice")
        _expect(all(0 <= number < MAX_FD for number in numbers), f"process {holder} has impossible descriptors")


def _check_tracing(thread: Thread, living: dict[int, Thread]) -> None:
    tracing, who = thread.tracing, f"thread {thread.tid}, which another one traces,"
    assert tracing is not None
    above, seen = living[tracing.tracer], {thread.tid}
    while above.tracing and above.tid not in seen:
        seen.add(above.tid)
        above = living[above.tracing.tracer]
    _expect(above.tid not in seen, f"{who} has an impossible tracer")
    _expect(0 <= tracing.options <= TRACE_OPTIONS, f"{who} has impossible options")
    _expect(len(tracing.debug) in (0, len(DEBUG_REGISTERS)), f"{who} has impossible debug registers")
    _expect(len(tracing.siginfo) == (SIGINFO_SIZE if tracing.mode is Mode.STOPPED else 0), f"{who} has no siginfo")


def _check_nesting(manifest: Manifest, bounds: Bounds) -> None:
    """Every namespace belongs to a user namespace that was told before; processes are in such as there are."""
    users, kinds = {POD}, {"uts": {POD}, "ipc": {POD}, "net": {POD}, "pid": {POD}}
    for user in manifest.nesting.users:
        _expect(user.parent in users and user.id not in users, f"user namespace {user.id}")
        ranges = (*user.uids, *user.gids)
        possible = all(0 <= value <= NO_ID for one in ranges for value in one) and 0 <= user.owner < NO_ID
        _expect(possible and len(ranges) <= MAX_RANGES, f"the ids of user namespace {user.id}")
        users.add(user.id)
    for space in manifest.nesting.spaces:
        _expect(space.kind in ("uts", "ipc", "net"), f"a namespace of kind {space.kind!r}")
        kinds[space.kind].add(space.id)
        _expect(len(space.hostname.encode()) <= 64 and len(space.domainname.encode()) <= 64, "a host name too long")
    for one in manifest.nesting.pids:
        _expect(one.parent in kinds["pid"], f"pid namespace {one.id}")
        kinds["pid"].add(one.id)
    numbers = [n for p in manifest.processes for i in p.place.inner for n in (i.pid, i.pgid, i.sid)]
    for process in manifest.processes:
        depth = len(process.place.inner)
        _expect(all(len(t.inner_tids) == depth for t in process.threads), f"threads of process {process.place.pid}")
    numbers += [n for p in manifest.processes for t in p.threads for n in t.inner_tids]
    _expect(all(0 <= n < MAX_PID for n in numbers), "a process of an impossible number")
    owners = [space.user for space in manifest.nesting.spaces] + [one.user for one in manifest.nesting.pids]
    _expect(set(owners) <= users - {POD}, "a namespace that belongs to nobody")
    ids = [i for i in (users | kinds["uts"] | kinds["ipc"] | kinds["net"] | kinds["pid"]) if i != POD]
    _expect(len(ids) == len(users) - 1 + len(owners), "two namespaces of one number")
    _expect(all(0 < i <= len(ids) for i in ids), f"namespaces {ids}")
    if ids and not bounds.nested:
        raise RestoreFailed("the image has namespaces that programs made, which this pod's may not", "run --nested")
    _expect(all(0 <= one.last_pid < MAX_PID for one in manifest.nesting.pids), "a last pid")
    firsts = {one.id: one.first for one in manifest.nesting.pids}
    for process in manifest.processes:
        place, member = process.place, process.member
        _expect(member.user in users, f"the namespaces of process {place.pid}")
        _expect(all(getattr(member, kind) in found for kind, found in kinds.items()), f"process {place.pid}")
        _expect(member.children in kinds["pid"] and member.pid == place.space, f"process {place.pid}")
        alone = process.shared == SharedTables() and not process.ended_leader
        _expect(alone or member == Membership(), f"process {place.pid} shares tables, and is in namespaces made inside")
        if place.inner and place.inner[-1].pid == 1:
            _expect(firsts.get(place.space) == place.pid, f"process {place.pid} is the first of nothing")
    for place in [p.place for p in manifest.processes] + [z.place for z in manifest.zombies]:
        whole = len(place.inner) == len(manifest.nesting.chain(place.space))
        _expect(whole and place.space in kinds["pid"], f"the pid namespace of process {place.pid}")


def _check_place(place: Place) -> None:
    ids = (place.ppid, place.pgid, place.sid)
    _expect(0 < place.pid < MAX_PID and all(0 <= number < MAX_PID for number in ids), f"process {place}")
    _expect(0 <= place.exit_signal <= NSIG and place.tty >= 0, f"process {place}")


def _check_files(manifest: Manifest) -> None:
    for file in manifest.files:
        _expect(0 <= file.pos < 1 << 63 and 0 <= file.flags < 1 << 32, f"open file {file.id}")
        for lock in file.locks:
            _expect(lock.kind in ("posix", "flock", "ofd"), f"a lock of kind {lock.kind!r}")
            _expect(0 <= lock.start < 1 << 63, f"a lock from {lock.start}")
            _expect(lock.end is None or lock.start <= lock.end < 1 << 63, f"a lock to {lock.end}")
        _check_owner(file)


def _check_owner(file: OpenFile) -> None:
    owner = file.owner
    if owner is not None:
        _expect(owner.type in (0, 1, 2) and 0 <= owner.id < MAX_PID, f"the owner of open file {file.id}")
        _expect(0 <= owner.signal <= NSIG and 0 <= owner.fd < MAX_FD, f"the owner of open file {file.id}")


# ------------------------------------------------------------------------------------------------- one process


def _check_process(process: Process, files: set[int], bounds: Bounds) -> None:
    pid = process.place.pid
    _expect(process.threads, f"process {pid} has no threads")
    led = process.threads[0].tid == pid
    _expect(led != bool(process.ended_leader), f"process {pid} has no thread of its number, or two")
    missing = [number for number in _references(process) if number not in files]
    _expect(not missing, f"process {pid} refers to open files {missing[:3]}, which aren't in the image")
    _expect(0 <= process.umask <= 0o7777 and 0 <= process.stopped_by <= NSIG, f"process {pid}")
    if not process.shared.memory:
        _check_memory(process)
    _check_signals(process)
    _expect(0 <= process.mdwe < 4, f"process {pid} has impossible rules for its memory")
    _check_limits(pid, process.limits)
    for thread in process.threads:
        _check_thread(pid, thread, bounds, nested=process.member.user != POD)
    if process.ended_leader:
        who = f"the leader of process {pid}"
        _expect(0 <= process.ended_leader.status < 1 << 16 and not process.ended_leader.status & 0xFF, who)
        _check_credentials(who, process.ended_leader.credentials, bounds, nested=False)
        _check_scheduling(who, process.ended_leader.scheduling)


def _references(process: Process) -> Iterator[int]:
    """Every OpenFile.id that a process names. What else lies in the slots behind them is for nobody."""
    yield from (fd.file for fd in process.fds)
    yield process.exe
    own = [(place.cwd, place.root) for place in (thread.directories for thread in process.threads) if place]
    yield from (number for pair in ((process.cwd, process.root), *own) for number in pair if number != -1)
    yield from (fd.file for thread in process.threads for fd in thread.fds or ())
    yield from (vma.file for vma in process.memory.vmas if vma.kind is VmaKind.FILE)


def _check_memory(process: Process) -> None:
    pid, end = process.place.pid, 0
    for vma in process.memory.vmas:
        what = f"process {pid} has a mapping {vma.start:#x}-{vma.end:#x}"
        _expect(end <= vma.start < vma.end <= mm.TASK_SIZE, f"{what} that can't be, or overlaps another")
        _expect(not (vma.start | vma.end | vma.offset) % PAGE_SIZE, f"{what} that isn't made of pages")
        _expect(0 <= vma.prot <= 7 and 0 <= vma.offset < 1 << 63, f"{what} with impossible properties")
        _expect(set(vma.advice) <= ADVICE.keys(), f"{what} with unknown advice {vma.advice}")
        end = vma.end
    future = process.memory.lock_future
    _expect(future in (0, MCL_FUTURE, MCL_FUTURE | MCL_ONFAULT), f"process {pid} locks memory to come in no known way")
    vdsos = sum(vma.kind is VmaKind.VDSO for vma in process.memory.vmas)
    _expect(vdsos == 1, f"process {pid} has {vdsos} vdsos")
    mapped = [(vma.start, vma.end - vma.start) for vma in process.memory.vmas if vma.kind is VmaKind.AIO]
    rings = sorted((ring.start, len(ring.data)) for ring in process.memory.rings)
    _expect(rings == mapped, f"process {pid} has AIO contexts elsewhere than it has their rings")
    for ring in process.memory.rings:
        possible = 0 <= ring.prot <= 7 and 0 < ring.requests < 1 << 32
        _expect(possible, f"process {pid} has an impossible AIO context at {ring.start:#x}")
    for start, length in process.memory.guards:
        _expect(0 <= start < start + length <= mm.TASK_SIZE, f"process {pid} has guard pages at {start:#x}")


def _check_signals(process: Process) -> None:
    pid = process.place.pid
    for number, action in process.actions.by_signal.items():
        _expect(0 < number <= NSIG and len(action) == ACTION_SIZE, f"process {pid} has an action of signal {number}")
    infos: Iterable[bytes] = (*process.pending, *(info for t in process.threads for info in t.pending))
    for info in infos:
        number = int.from_bytes(info[:4], "little", signed=True)
        _expect(len(info) == SIGINFO_SIZE and 0 < number <= NSIG, f"process {pid} has a pending signal {number}")
    sizes = {len(value) for value in process.interval_timers.values} | {len(t.remaining) for t in process.posix_timers}
    _expect(sizes == {32}, f"process {pid} has impossible timers")


def _check_thread(pid: int, thread: Thread, bounds: Bounds, *, nested: bool) -> None:
    who = f"thread {thread.tid} of process {pid}"
    _expect(len(thread.regs) == ctypes.sizeof(Regs), f"{who} has {len(thread.regs)} bytes of registers")
    _expect(len(thread.xstate) in XSTATE_SIZES, f"{who} has {len(thread.xstate)} bytes of FPU state")
    _expect(0 <= thread.parent_death_signal <= NSIG, f"{who}")
    _expect(not thread.directories or 0 <= thread.directories.umask <= 0o7777, f"{who}")
    _check_credentials(who, thread.credentials, bounds, nested=nested)
    _check_seccomp(who, thread.seccomp)
    _check_scheduling(who, thread.scheduling)


# ------------------------------------------------------------------------------------------------- privileges


def _check_credentials(who: str, creds: Credentials, bounds: Bounds, *, nested: bool) -> None:
    """`nested`: in a user namespace of its own, in which it may have all."""
    ids = (*creds.uid, *creds.gid, *creds.groups)
    _expect(all(0 <= number < NO_ID for number in ids) and len(creds.groups) <= 1 << 16, f"{who} has impossible ids")
    has = creds.inheritable | creds.permitted | creds.effective | creds.bounding | creds.ambient
    _expect(has >= 0, f"{who} has impossible capabilities")
    if has & ~bounds.capabilities and not nested:
        raise RestoreFailed(f"{who} has capabilities that no pod may have ({has & ~bounds.capabilities:#x})")


def _check_seccomp(who: str, state: Seccomp) -> None:
    _expect(state.mode in (0, MODE_FILTER), f"{who} is in seccomp mode {state.mode}, besides the pods' own filter")
    for one in state.filters:
        _expect(one.program and len(one.program) % 8 == 0, f"{who} has a seccomp filter of {len(one.program)} bytes")
        _expect(not one.flags & ~FILTER_FLAG_LOG, f"{who} has a seccomp filter with flags {one.flags:#x}")


def _check_scheduling(who: str, state: Scheduling) -> None:
    """What would take the CPU from the whole machine wants the right to do so: ours, as the pod's is ours."""
    _expect(len(state.attr) == SCHED_ATTR_SIZE, f"{who} has {len(state.attr)} bytes of scheduling")
    _expect(all(0 <= cpu < 1 << 16 for cpu in state.affinity), f"{who} may run on impossible CPUs")
    policy = int.from_bytes(state.attr[4:8], "little")
    priority = int.from_bytes(state.attr[20:24], "little")
    _expect(0 <= state.io_priority < 1 << 16 and 0 <= state.timer_slack < 1 << 63, f"{who}")
    allowed = _hard_limit(resource.RLIMIT_RTPRIO)
    if policy not in ORDINARY_POLICIES and not (policy in REALTIME_POLICIES and priority <= allowed):
        raise RestoreFailed(
            f"{who} has scheduling policy {policy} with priority {priority}, which isn't allowed here",
            "raise the limit of real-time priorities (ulimit -r)",
        )
    if policy in ORDINARY_POLICIES and state.io_priority >> IOPRIO_CLASS_SHIFT == IOPRIO_CLASS_RT:
        raise RestoreFailed(f"{who} has a real-time I/O priority, which no pod may have")


def _check_limits(pid: int, state: Limits) -> None:
    _expect(len(state.limits) == RLIM_NLIMITS, f"process {pid} has {len(state.limits)} resource limits")
    for soft, hard in state.limits:
        _expect(all(-1 <= value < 1 << 64 for value in (soft, hard)), f"process {pid} has impossible limits")
    _expect(-1000 <= state.oom_score_adj <= 1000, f"process {pid} has an impossible oom_score_adj")
    _expect(0 <= state.coredump_filter < 1 << 32, f"process {pid} has an impossible core dump filter")
    priority = state.limits[resource.RLIMIT_RTPRIO][1]
    if (1 << 63 if priority < 0 else priority) > _hard_limit(resource.RLIMIT_RTPRIO):
        raise RestoreFailed(f"process {pid} may have real-time priorities, which isn't allowed here", "ulimit -r")
    own = int(procfs.read_text("/proc/self/oom_score_adj"))
    if state.oom_score_adj < min(own, 0):
        raise RestoreFailed(
            f"process {pid} is spared by the OOM killer (oom_score_adj {state.oom_score_adj}): not allowed here",
            f"choom -n {state.oom_score_adj} podtree ... gives that right",
        )


def _hard_limit(which: int) -> int:
    hard = resource.getrlimit(which)[1]
    return 1 << 63 if hard == resource.RLIM_INFINITY else hard


def _filtered(process: Process, program: bytes) -> Process:
    """The process with `program` the oldest filter of each thread.

    An image of another version's begins with another one, and then has both.
    """

    def begin(thread: Thread) -> Thread:
        filters = thread.seccomp.filters
        if not filters or filters[0].program != program:
            filters = (Filter(program, 0), *filters)
        return msgspec.structs.replace(thread, seccomp=Seccomp(MODE_FILTER, filters))

    return msgspec.structs.replace(process, threads=tuple(begin(thread) for thread in process.threads))


def explained(error: BaseException) -> BaseException:
    """What is to be raised for whatever a restore met: one of its own errors, with what there is to say."""
    if isinstance(error, (Damaged, RestoreFailed, Unsupported)) or not isinstance(error, Exception):
        return error
    if isinstance(error, PodtreeError):
        return RestoreFailed(error.message, error.hint)
    if isinstance(error, OSError):
        return RestoreFailed(f"restore failed: {error}")
    return RestoreFailed(f"restore failed: {type(error).__name__}: {error}")
