"""Stopping every task of a pod at one instant, and letting all go on as if nothing had happened.

Tasks are seized and interrupted with ptrace(2), so that neither their parents nor the programs
themselves see a signal. A task that is about to create another is traced with its child from birth,
and the list of tasks is read again until nothing new appears.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from podtree.errors import Problem, Refused
from podtree.kernel import mm, procfs, ptrace
from podtree.kernel.sys import NR
from podtree.objects.context import FrozenProcess, FrozenTask
from podtree.script import stub
from podtree.script.task import NO_SYSCALL
from podtree.script.vdso import leave_stub

#: What a task is seized with. Not PTRACE_O_SUSPEND_SECCOMP: from the seizing to its stop the program still runs, and
#: could make any system call that its filter forbids.
SEIZE_OPTIONS = (
    ptrace.PTRACE_O_TRACESYSGOOD
    | ptrace.PTRACE_O_TRACEFORK
    | ptrace.PTRACE_O_TRACEVFORK
    | ptrace.PTRACE_O_TRACECLONE
)
OPTIONS = SEIZE_OPTIONS | ptrace.PTRACE_O_SUSPEND_SECCOMP  # once it is stopped: for scripts
GRACE_S = 0.02  # for what is on the way to its stop when a freeze is given up
STOP_PATIENCE_S = 0.2  # a task that doesn't stop within this is in the middle of vfork(2) or of slow I/O
ATTEMPTS = 25

# System calls that the kernel ends with EINTR, never restarts, when a task is merely stopped
# (signal(7), "Interruption of system calls and library functions by stop signals").
EINTR_ON_STOP = frozenset(
    (
        NR.epoll_wait,
        NR.epoll_pwait,
        NR.epoll_pwait2,
        NR.semop,
        NR.semtimedop,
        NR.rt_sigtimedwait,
        NR.io_getevents,
        NR.accept,
        288,  # accept4
        NR.connect,
        44,  # sendto
        NR.recvfrom,
        46,  # sendmsg
        NR.recvmsg,
        299,  # recvmmsg
        307,  # sendmmsg
        NR.read,
        NR.write,
        NR.readv,
        NR.writev,
    )
)
EINTR = 4
# Registers with pointers to a relative struct timespec
TIMEOUT_POINTER = {NR.epoll_pwait2: "r10", NR.semtimedop: "r10", NR.rt_sigtimedwait: "rdx", NR.io_getevents: "r8"}
# Calls with a timeout that starts when they are made; the kernel restarts the first four by itself.
TIMED_CALLS = frozenset(
    [
        NR.nanosleep,
        NR.clock_nanosleep,
        NR.poll,
        NR.futex,
        NR.restart_syscall,
        NR.epoll_wait,
        NR.epoll_pwait,
        *TIMEOUT_POINTER,
    ]
)


class NotStopped(Exception):
    """Some task didn't stop in time."""

    def __init__(self, tid: int) -> None:
        self.tid = tid
        super().__init__(f"task {tid} did not stop")


class Stragglers:
    """Tasks that could not be let go of, because only a stopped one can be (ptrace(2), PTRACE_DETACH).

    One that waits uninterruptibly (vfork(2), slow I/O) stops when that is over; one that was killed meanwhile has to
    be reaped by its tracer before its parent, or the pod's first process, hears of its end.
    """

    def __init__(self) -> None:
        self._tids: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._tids)

    def add(self, tid: int) -> None:
        """Note a task that we trace, and that isn't stopped."""
        self._tids.add(tid)

    def discard(self, tid: int) -> None:
        """It has stopped, and a freeze has it."""
        self._tids.discard(tid)

    def look(self, timeout_s: float = 0) -> bool:
        """Let go of those that have stopped or ended meanwhile; whether some are left after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._tids = {tid for tid in self._tids if not _let_go(tid)}
            if not self._tids or time.monotonic() >= deadline:
                return bool(self._tids)
            time.sleep(0.0005)


def _let_go(tid: int) -> bool:
    """Detach a traced task if it is stopped, reap it if it has ended; False if it is neither yet."""
    try:
        stop = ptrace.poll(tid)
    except ChildProcessError:
        return True
    if stop is None:
        return False
    if not stop.exited:
        try:
            ptrace.detach(tid, 0 if stop.event or stop.is_syscall else stop.signal)
        except ProcessLookupError:  # it was killed: its end is still to come
            return False
    return True


@dataclass(slots=True)
class Frozen:
    """A pod whose tasks are all stopped and traced by this thread."""

    stragglers: Stragglers
    stopped: dict[int, ptrace.Stop] = field(default_factory=dict)  # host tid -> how it stopped
    processes: list[FrozenProcess] = field(default_factory=list)

    def release(self) -> None:
        """Let all tasks go on. Those that were killed meanwhile become stragglers."""
        for tid in self.stopped:
            try:
                ptrace.detach(tid)
            except ProcessLookupError:
                self.stragglers.add(tid)
        self.stopped.clear()
        for process in self.processes:
            if process.pidfd >= 0:
                os.close(process.pidfd)
                process.pidfd = -1


def _alive_threads(pid: int) -> list[int]:
    """Threads of a process that can still be stopped; none for zombies and vanished processes."""
    try:
        tids = procfs.threads(pid)
        return [t for t in tids if procfs.stat(pid, t).state not in "ZX"]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _seize_all(frozen: Frozen, list_pids: Callable[[], Iterable[int]]) -> list[int]:
    """Seize and interrupt the tasks that aren't traced yet; returns their ids."""
    fresh: list[int] = []
    try:
        for pid in list_pids():
            for tid in _alive_threads(pid):
                if tid not in frozen.stopped and _seize(pid, tid):
                    fresh.append(tid)
    except BaseException:
        for tid in fresh:
            frozen.stragglers.add(tid)
        raise
    return fresh


def _seize(pid: int, tid: int) -> bool:
    """Seize and interrupt one task; False if it is gone. Raises Refused if somebody else traces it."""
    try:
        ptrace.seize(tid, SEIZE_OPTIONS)
    except ProcessLookupError:
        return False
    except PermissionError as error:
        if tid not in _alive_threads(pid):
            return False
        tracer = procfs.status(pid, tid).get("TracerPid", "0")
        if tracer != str(os.getpid()):
            reason = f"is traced by another process (host pid {tracer})"
            raise _refuse_traced(pid, tid, reason, "end the debugger or strace first") from error
    try:
        ptrace.interrupt(tid)
    except ProcessLookupError:
        return False
    except OSError as error:  # EIO: not seized. Neither a newborn nor a straggler: it did it itself
        reason = "has asked to be traced by its parent (PTRACE_TRACEME), which is outside of the pod"
        raise _refuse_traced(pid, tid, reason, "") from error
    return True


def _refuse_traced(pid: int, tid: int, reason: str, hint: str) -> Refused:
    comm = procfs.read_text(f"/proc/{pid}/task/{tid}/comm").strip()
    inner = procfs.ns_pids(procfs.status(pid))[-1]
    return Refused([Problem(pid=inner, comm=comm, object="ptrace", reason=reason, hint=hint)])


def _await_stop(frozen: Frozen, tid: int, deadline: float) -> list[int]:
    """Wait until `tid` is in a PTRACE_EVENT_STOP; returns ids of tasks born on the way."""
    born: list[int] = []
    spins = 0
    while True:
        try:
            stop = ptrace.poll(tid)
        except ChildProcessError:
            return born  # ended and was reaped by its parent
        if stop is None:
            spins += 1
            if spins > 50:
                if time.monotonic() > deadline:
                    raise NotStopped(tid)
                time.sleep(0.0001)
            continue
        if stop.exited:
            return born
        with contextlib.suppress(ProcessLookupError):  # killed: the next stop that we hear of is its end
            if stop.is_interrupt:
                ptrace.set_options(tid, OPTIONS)
                frozen.stopped[tid] = stop
                frozen.stragglers.discard(tid)
                return born
            if stop.event in (ptrace.PTRACE_EVENT_FORK, ptrace.PTRACE_EVENT_VFORK, ptrace.PTRACE_EVENT_CLONE):
                born.append(ptrace.event_message(tid))
            # what isn't an event is a signal-delivery-stop: deliver, then it traps
            ptrace.cont(tid, 0 if stop.event else stop.signal)


def _try_freeze(frozen: Frozen, list_pids: Callable[[], Iterable[int]]) -> None:
    deadline = time.monotonic() + STOP_PATIENCE_S
    waiting: list[int] = []
    try:
        while True:
            waiting = _seize_all(frozen, list_pids)
            if not waiting:
                return
            while waiting:
                born = _await_stop(frozen, waiting[0], deadline)
                waiting.pop(0)
                waiting += [t for t in born if t not in frozen.stopped and t not in waiting]
    except BaseException:
        for tid in waiting:
            frozen.stragglers.add(tid)
        frozen.release()
        frozen.stragglers.look(GRACE_S)
        raise


def freeze(list_pids: Callable[[], Iterable[int]], restarts: Restarts) -> Frozen:
    """Stop all tasks of a pod. `list_pids` gives the host pids of its processes at the moment.

    Raises Refused if a task can't be stopped; nothing is stopped then, and what is on its way to a stop is among
    `restarts.stragglers`, which have to be looked after.
    """
    restarts.note_sleepers(list_pids())
    for attempt in range(ATTEMPTS):
        frozen = Frozen(restarts.stragglers)
        try:
            _try_freeze(frozen, list_pids)
        except NotStopped as stuck:
            if attempt == ATTEMPTS - 1:
                raise Refused([_stuck_problem(stuck.tid)]) from stuck
            time.sleep(0.002 * (attempt + 1))
            continue
        left_behind = [leave_stub(tid) for tid in frozen.stopped]
        if any(left_behind):
            frozen.release()
            time.sleep(0.001)
            continue
        try:
            frozen.processes = _describe(frozen, _with_zombies(list_pids()), restarts)
            restarts.forget(set(frozen.stopped))
        except ProcessLookupError:  # something was killed, or replaced itself by execve(2) from a thread
            frozen.release()
            continue
        except BaseException:
            frozen.release()
            raise
        return frozen
    raise Refused([Problem(pid=0, comm="", object="pod", reason="doesn't come to rest", hint="try again")])


def _stuck_problem(tid: int) -> Problem:
    try:
        text = procfs.status(tid)
        wchan = procfs.read_text(f"/proc/{tid}/wchan")
        pid, comm = procfs.ns_pids(text)[-1], text["Name"]
    except OSError:
        pid, comm, wchan = 0, "", "?"
    return Problem(
        pid=pid,
        comm=comm,
        object="task",
        reason=f"doesn't stop (waits uninterruptibly in the kernel, in {wchan})",
        hint="it is inside vfork or slow I/O; try again",
    )


def _with_zombies(pids: Iterable[int]) -> list[int]:
    """Control groups don't list zombies; their parents do."""
    found = list(pids)
    for pid in list(found):
        for tid in _alive_threads(pid):
            with contextlib.suppress(OSError):
                found += [int(p) for p in procfs.read_text(f"/proc/{pid}/task/{tid}/children").split()]
    return sorted(set(found))


def _describe(frozen: Frozen, pids: Iterable[int], restarts: Restarts) -> list[FrozenProcess]:
    found: list[FrozenProcess] = []
    for pid in pids:
        try:
            text = procfs.status(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(text["Tgid"]) != pid:
            continue
        inner = procfs.ns_pids(text)[-1]
        if text["State"][0] in "ZX":
            leaderless = any(t in frozen.stopped for t in procfs.threads(pid))
            if leaderless:
                problem = Problem(
                    pid=inner,
                    comm=text["Name"],
                    object="thread group",
                    reason="its leader thread has ended while other threads live on",
                )
                raise Refused([problem])
            found.append(FrozenProcess(pid, inner, text["Name"], -1, zombie=True))
            continue
        tids = [t for t in procfs.threads(pid) if t in frozen.stopped]
        tasks = [_describe_task(frozen, pid, t, restarts) for t in sorted(tids, key=lambda t: (t != pid, t))]
        found.append(FrozenProcess(pid, inner, text["Name"], os.pidfd_open(pid), tasks))
    return sorted(found, key=lambda p: p.pid)


def _describe_task(frozen: Frozen, pid: int, tid: int, restarts: Restarts) -> FrozenTask:
    text = procfs.status(pid, tid)
    stop = frozen.stopped[tid]
    task = FrozenTask(
        tid=tid,
        inner_tid=procfs.ns_pids(text)[-1],
        regs=ptrace.get_regs(tid),
        sigmask=ptrace.get_sigmask(tid),
        status=text,
        group_stop=stop.signal if stop.is_group_stop else 0,
    )
    restarts.look(task)
    _leave_rseq_section(task)
    return task


def _leave_rseq_section(task: FrozenTask) -> None:
    """A thread stopped inside a restartable sequence goes on at its abort handler, as after any preemption.

    The kernel would see to that only if the thread went straight on; scripts come in between.
    struct rseq: rseq_cs at offset 8; struct rseq_cs: start, length, abort address at 8 (linux/rseq.h).
    """
    address, _, _, _ = ptrace.rseq_configuration(task.tid)
    if not address:
        return
    with contextlib.suppress(OSError):
        (section,) = struct.unpack("<Q", mm.read_memory(task.tid, address + 8, 8))
        if section:
            start, length, abort = struct.unpack("<QQQ", mm.read_memory(task.tid, section + 8, 24))
            if 0 <= task.regs.rip - start < length:
                task.regs.rip = abort
                ptrace.set_regs(task.tid, task.regs)


def _scheduler_lags(cpus: set[int]) -> dict[int, int]:
    """By CPU: CLOCK_MONOTONIC less its scheduler's clock, in ns; those where we may not run are left out."""
    lags: dict[int, int] = {}
    allowed = os.sched_getaffinity(0)
    try:
        for cpu in cpus & allowed:
            os.sched_setaffinity(0, {cpu})
            ran = procfs.last_ran_ns(os.getpid())  # when we came to this CPU, just now
            if ran >= 0:
                lags[cpu] = time.monotonic_ns() - ran
    finally:
        os.sched_setaffinity(0, allowed)
    return lags


class Restarts:
    """What has to be remembered from stop to stop: of system calls that our stops interrupt, and of stragglers."""

    def __init__(self) -> None:
        self.stragglers = Stragglers()
        self._calls: dict[int, tuple[int, int, int]] = {}  # tid -> call, rip, rsp
        self._channels: dict[int, str] = {}  # tid -> where in the kernel it waits, if in restart_syscall(2)
        self._asleep: dict[int, int] = {}  # tid -> CLOCK_MONOTONIC when it went to sleep
        self._started: dict[int, tuple[int, int, int]] = {}  # tid -> rip, rsp, begin of its timed call
        self._again: dict[int, tuple[int, int, int]] = {}  # tid -> rip, rsp, begin, as _started
        self._waits: dict[int, tuple[int, int, int, float]] = {}  # tid -> rip, rsp, timeout set, deadline

    def note_sleepers(self, pids: Iterable[int]) -> None:
        """Before stopping: since when the threads that are in a timed call have been asleep in it.

        Our stop wakes them; afterwards nobody can tell. Each CPU's scheduler has a clock of its own, which
        lags more and more behind CLOCK_MONOTONIC: what it has lagged since makes a wait longer, never shorter.
        """
        self._asleep.clear()
        self._channels.clear()
        ran: dict[int, tuple[int, int]] = {}
        for pid in pids:
            for tid in _alive_threads(pid):
                with contextlib.suppress(OSError, IndexError):
                    call = procfs.current_call(tid)
                    if call == NR.restart_syscall and tid not in self._calls:
                        self._channels[tid] = procfs.read_text(f"/proc/{tid}/wchan")
                    if call in TIMED_CALLS:
                        ran[tid] = (procfs.last_ran_ns(tid), procfs.stat(tid).processor)
        lags = _scheduler_lags({cpu for _, cpu in ran.values()})
        self._asleep = {tid: at + lags[cpu] for tid, (at, cpu) in ran.items() if at >= 0 and cpu in lags}

    def look(self, task: FrozenTask) -> None:
        """Put right what the stop did to the task's system call, and learn what it was."""
        self._remember_call(task)
        self._undo_eintr(task)

    def forget(self, alive: set[int]) -> None:
        """Drop what is known of tasks that are gone."""
        for known in (self._calls, self._waits, self._started, self._again):
            for tid in known.keys() - alive:
                del known[tid]

    def _remember_call(self, task: FrozenTask) -> None:
        """A stopped nanosleep(2) goes on as restart_syscall(2); the image needs the real call."""
        regs = task.regs
        if regs.rax != -stub.ERESTART_RESTARTBLOCK & NO_SYSCALL or regs.orig_rax > 1 << 32:
            self._calls.pop(task.tid, None)
            self._started.pop(task.tid, None)
            return
        self._measure(task)
        if regs.orig_rax != NR.restart_syscall:
            self._calls[task.tid] = (regs.orig_rax, regs.rip, regs.rsp)
            return
        call, rip, rsp = self._calls.get(task.tid, (-1, 0, 0))
        task.restart_nr = call if (rip, rsp) == (regs.rip, regs.rsp) else self._guess_call(task)

    def _guess_call(self, task: FrozenTask) -> int:
        """What restart_syscall(2) goes on with, when the first stop was seen by a supervisor that is gone.

        Four calls go on so. Which one tells where the thread was waiting, and its arguments; -1 if it can't be told.
        """
        channel = self._channels.get(task.tid, "")
        if "futex" in channel:
            return NR.futex
        if "poll" in channel:
            return NR.poll
        if channel:  # clock numbers are small, pointers aren't
            return NR.clock_nanosleep if task.regs.rdi < 64 else NR.nanosleep
        return _decode_call(task)

    def _measure(self, task: FrozenTask) -> None:
        """How long the call has been waiting, over all our stops of it."""
        now, regs = time.monotonic_ns(), task.regs
        rip, rsp, begun = self._started.get(task.tid, (0, 0, 0))
        if (rip, rsp) != (regs.rip, regs.rsp) or regs.orig_rax != NR.restart_syscall:
            begun = self._asleep.get(task.tid, now)
            self._started[task.tid] = (regs.rip, regs.rsp, begun)
        task.waited_ns = max(0, now - begun)

    def _undo_eintr(self, task: FrozenTask) -> None:
        """Our stop makes some system calls fail with EINTR; have them run again instead.

        Only if no signal is about to be delivered: then EINTR is what the program must see.
        """
        regs = task.regs
        if regs.orig_rax not in EINTR_ON_STOP or regs.rax != -EINTR & NO_SYSCALL:
            self._waits.pop(task.tid, None)
            self._again.pop(task.tid, None)
            return
        pending = int(task.status["SigPnd"], 16) | int(task.status["ShdPnd"], 16)
        if pending & ~task.sigmask:
            return
        if regs.orig_rax in TIMEOUT_POINTER and not self._has_time_left(task):
            return
        if regs.orig_rax in (NR.epoll_wait, NR.epoll_pwait):
            self._shorten_wait(task)
        regs.rax = -stub.ERESTARTNOHAND & NO_SYSCALL
        ptrace.set_regs(task.tid, regs)

    def _has_time_left(self, task: FrozenTask) -> bool:
        """Whether a call whose timeout lies in the program's memory may start again with all of it.

        Only for as long as it hasn't waited that long already: then it sees EINTR, as the manual allows,
        rather than wait for ever in a pod that is checkpointed often.
        """
        regs = task.regs
        pointer = getattr(regs, TIMEOUT_POINTER[NR(regs.orig_rax)])
        if not pointer:
            return True
        now = time.monotonic_ns()
        rip, rsp, begun = self._again.get(task.tid, (0, 0, 0))
        if (rip, rsp) != (regs.rip, regs.rsp):
            begun = self._asleep.get(task.tid, now)
            self._again[task.tid] = (regs.rip, regs.rsp, begun)
        try:
            seconds, nanoseconds = struct.unpack("<qq", mm.read_memory(task.tid, pointer, 16))
        except OSError:
            return False
        if now - begun < seconds * 1_000_000_000 + nanoseconds:
            return True
        del self._again[task.tid]
        return False

    def _shorten_wait(self, task: FrozenTask) -> None:
        """Run a call with a timeout in milliseconds (r10) again with what is left of it.

        What is left differs from the timeout, if only by one millisecond; that marks the call, so that the
        next stop knows it again.
        """
        regs = task.regs
        timeout = regs.r10 & 0xFFFFFFFF
        if timeout == 0 or timeout >= 1 << 31:
            return
        now = time.monotonic()
        rip, rsp, mark, deadline = self._waits.get(task.tid, (0, 0, 0, 0.0))
        if (rip, rsp, mark) == (regs.rip, regs.rsp, timeout):
            timeout = max(0, int((deadline - now) * 1000))
        else:
            deadline = self._asleep.get(task.tid, time.monotonic_ns()) / 1e9 + timeout / 1000
            timeout = min(timeout - 1, max(0, int((deadline - now) * 1000)))
        self._waits[task.tid] = (regs.rip, regs.rsp, timeout, deadline)
        regs.r10 = timeout


def _decode_call(task: FrozenTask) -> int:
    """The number that `mov $N, %eax` loads right before the task's `syscall`; -1 if it isn't so."""
    try:
        code = mm.read_memory(task.tid, task.regs.rip - 7, 7)
    except OSError:
        return -1
    return int.from_bytes(code[1:5], "little") if code[0] == 0xB8 and code[5:] == b"\x0f\x05" else -1


@contextlib.contextmanager
def frozen_pod(list_pids: Callable[[], Iterable[int]], restarts: Restarts) -> Iterator[Frozen]:
    """Scope in which a pod is stopped."""
    frozen = freeze(list_pids, restarts)
    try:
        yield frozen
    finally:
        frozen.release()
