"""Stopping every task of a pod at one instant, and letting all go on as if nothing had happened.

Tasks are seized and interrupted with ptrace(2), so that neither their parents nor the programs
themselves see a signal (tracees.py). Here is what the stops do to system calls, and how that is undone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from podtree.errors import Problem, Refused
from podtree.kernel import mm, procfs, ptrace
from podtree.kernel.pidfd import pidfd_getfd, pidfd_open_living
from podtree.kernel.sys import NR
from podtree.objects import insight
from podtree.objects.context import FrozenProcess, FrozenTask
from podtree.script import stub
from podtree.script.task import NO_SYSCALL
from podtree.script.vdso import leave_stub
from podtree.ties import Ties
from podtree.tracees import NotStopped, Tracees, living_threads, process_of

STOP_PATIENCE_S = 0.2  # a task that doesn't stop within this is in the middle of vfork(2) or of slow I/O
ATTEMPTS = 25

# Calls on sockets, which have a timeout where SO_RCVTIMEO or SO_SNDTIMEO is set (socket(7))
_RECEIVING = (NR.accept, NR.accept4, NR.recvfrom, NR.recvmsg, NR.recvmmsg, NR.read, NR.readv)
_SENDING = (NR.connect, NR.sendto, NR.sendmsg, NR.sendmmsg, NR.write, NR.writev)
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
        *_RECEIVING,
        *_SENDING,
    )
)
# Registers with pointers to a relative struct timespec
TIMEOUT_POINTER = {NR.epoll_pwait2: "r10", NR.semtimedop: "r10", NR.rt_sigtimedwait: "rdx", NR.io_getevents: "r8"}
# What such a call gives when its time is up, where that isn't -EAGAIN
_TIMED_OUT = {NR.epoll_pwait2: 0, NR.io_getevents: 0, NR.connect: -errno.EINPROGRESS}
# Signals that do nothing unless the program has a handler for them (signal(7))
_IGNORED = sum(1 << (s - 1) for s in (signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH))
# Calls that the kernel itself restarts with what is left of their time, by restart_syscall(2)
_RESTART_BLOCK = (NR.nanosleep, NR.clock_nanosleep, NR.poll, NR.futex, NR.restart_syscall)
# Calls with a timeout that starts when they are made
TIMED_CALLS = frozenset(
    [
        *_RESTART_BLOCK,
        NR.epoll_wait,
        NR.epoll_pwait,
        *TIMEOUT_POINTER,
        *(call for call in (*_RECEIVING, *_SENDING) if call not in (NR.read, NR.readv, NR.write, NR.writev)),
    ]
)


@dataclass(slots=True)
class Frozen:
    """A pod whose tasks are all stopped and traced by this thread."""

    tracees: Tracees
    ties: Ties
    processes: list[FrozenProcess] = field(default_factory=list)

    @property
    def stopped(self) -> dict[int, ptrace.Stop]:
        """How each task stopped, by host tid."""
        return self.tracees.stopped

    def release(self) -> None:
        """Let all tasks go on. Those that are gone meanwhile are passed over. May be called again."""
        self.ties.give_back(self.tracees)
        self.tracees.release()
        for process in self.processes:
            if process.pidfd >= 0:
                os.close(process.pidfd)
                process.pidfd = -1


class Freezer:
    """Stops one pod, again and again, and remembers in between what has to be remembered.

    `list_pids` gives the host pids of the pod's processes at the moment.
    """

    def __init__(self, list_pids: Callable[[], Iterable[int]]) -> None:
        self._list_pids = list_pids
        self._restarts = Restarts()
        self._tracees = Tracees()
        self._ties = Ties()

    def freeze(self) -> Frozen:
        """Stop all tasks of the pod. Raises Refused if one can't be stopped; nothing stays stopped then."""
        self._restarts.note_sleepers(self._list_pids())
        for attempt in range(ATTEMPTS):
            frozen = Frozen(self._tracees, self._ties)
            try:
                left_behind = self._stop_all()
                if not left_behind:
                    frozen.processes = _describe(frozen, _with_zombies(self._list_pids()), self._restarts)
                    self._restarts.forget(set(frozen.stopped))
                    return frozen
                self._put_right(frozen, left_behind)
            except NotStopped as stuck:
                self._put_right(frozen)
                self._ties.give_back(self._tracees)
                if attempt == ATTEMPTS - 1:
                    self._tracees.release(self._list_pids)
                    raise Refused([_stuck_problem(stuck)]) from stuck
            except BaseException:
                self._put_right(frozen)
                self._ties.give_back(self._tracees)
                self._tracees.release(self._list_pids)
                frozen.release()
                raise
            frozen.release()
            insight.prepare()
            time.sleep(0.002 * (attempt + 1))
        raise Refused([Problem(pid=0, comm="", object="pod", reason="doesn't come to rest", hint="try again")])

    def tend(self) -> bool:
        """Let go of tasks that could not be stopped in time, if they have stopped meanwhile; whether some have not.

        Until then they are of no use to the pod: to be called again and again after a checkpoint.
        """
        return self._tracees.tend()

    def _put_right(self, frozen: Frozen, but: Collection[int] = ()) -> None:
        """An attempt has failed: the calls that it interrupted go on as if nothing had been, but for some tasks'."""
        for tid in set(frozen.stopped).difference(but):
            with contextlib.suppress(OSError, LookupError, ValueError):  # it has ended
                _describe_task(frozen, process_of(tid), tid, self._restarts)

    def _stop_all(self) -> list[int]:
        """Tasks that were still inside of a killed supervisor's script: they are on their way home.

        One that is stopped by job control, too, gets there only while it is traced.
        """
        stopped = self._tracees.stopped
        self._tracees.stop_all(self._list_pids, STOP_PATIENCE_S)
        self._look_again()
        left_behind = [tid for tid in stopped if leave_stub(tid)]
        self._tracees.run_shortly([tid for tid in left_behind if stopped[tid].is_group_stop], STOP_PATIENCE_S)
        if self._tracees.foreign and not left_behind:
            self._ties.take(self._tracees, _is_undone)
        return left_behind

    def _look_again(self) -> None:
        """A process in the midst of being stopped or continued by job control: all its threads get as far as that.

        While a task is in our stop, it shows what was the case at its beginning.
        """
        stopped = self._tracees.stopped
        for pid in self._list_pids() if any(s.is_group_stop for s in stopped.values()) else ():
            tids = [tid for tid, _ in living_threads(pid)]
            if any(stopped[tid].is_group_stop for tid in tids if tid in stopped):
                self._tracees.stop_again([tid for tid in tids if tid in stopped], STOP_PATIENCE_S)


def _is_undone(call: int, error: int) -> bool:
    """Whether a call ended with EINTR just because its task was to stop."""
    return error == errno.EINTR and call in EINTR_ON_STOP


def _stuck_problem(stuck: NotStopped) -> Problem:
    try:
        text = procfs.status(stuck.tid)
        pid, comm = procfs.pod_id(text), text["Name"]
    except OSError:
        pid, comm = 0, ""
    return Problem(
        pid=pid, comm=comm, object="task", reason=f"doesn't stop: {stuck.why}", hint="try again when it is past that"
    )


def _with_zombies(pids: Iterable[int]) -> list[int]:
    """Control groups don't list zombies; their parents do."""
    found = list(pids)
    for pid in list(found):
        for tid, _ in living_threads(pid):
            with contextlib.suppress(OSError):
                found += [int(p) for p in procfs.read_text(f"/proc/{pid}/task/{tid}/children").split()]
    return sorted(set(found))


def _describe(frozen: Frozen, pids: Iterable[int], restarts: Restarts) -> list[FrozenProcess]:
    found = frozen.processes  # whatever happens here: what is in there is released
    for pid in pids:
        try:
            text = procfs.status(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(text["Tgid"]) != pid:
            continue
        inner = procfs.pod_id(text)
        tids = [t for t in procfs.threads(pid) if t in frozen.stopped]
        if text["State"][0] in "ZX" and not tids:
            _refuse_strange_tracer(pid, text)
            found.append(FrozenProcess(pid, inner, text["Name"], -1, zombie=True))
            continue
        tasks = [_describe_task(frozen, pid, t, restarts) for t in sorted(tids, key=lambda t: (t != pid, t))]
        found.append(FrozenProcess(pid, inner, text["Name"], _open_pidfd(pid, inner, text["Name"]), tasks))
    found.sort(key=lambda p: p.pid)
    return found


def _refuse_strange_tracer(pid: int, text: dict[str, str]) -> None:
    """A process that has ended is made again for its parent to hear of; nobody else would."""
    tracer = int(text["TracerPid"])
    if tracer not in (0, os.getpid()) and process_of(tracer) != int(text["PPid"]):
        raise NotStopped(pid, "it has ended, and its tracer has not waited for that yet")


def _open_pidfd(pid: int, inner: int, comm: str) -> int:
    """By which what a process has can be had. Raises Refused."""
    try:
        return pidfd_open_living(pid)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        reason = "its leader thread has ended while other threads live on"
        problem = Problem(pid=inner, comm=comm, object="thread group", reason=reason, hint="this takes Linux 6.9")
        raise Refused([problem]) from error


def _describe_task(frozen: Frozen, pid: int, tid: int, restarts: Restarts) -> FrozenTask:
    text = procfs.status(pid, tid)
    stop = frozen.stopped[tid]
    task = FrozenTask(
        tid=tid,
        inner_tid=procfs.pod_id(text),
        regs=ptrace.get_regs(tid),
        sigmask=ptrace.get_sigmask(tid),
        status=text,
        group_stop=stop.signal if stop.is_group_stop else 0,
        tracing=frozen.ties.taken[tid].tracing if tid in frozen.ties.taken else None,
    )
    restarts.look(task)
    if task.tracing and task.restart_nr < 0:
        task.restart_nr = frozen.ties.call_of(tid, task.regs)
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
    """What has to be remembered from stop to stop about system calls that our stops interrupt."""

    def __init__(self) -> None:
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
            for tid, _ in living_threads(pid):
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
        self._step_back(task)
        self._remember_call(task)
        self._undo_eintr(task)

    def forget(self, alive: set[int]) -> None:
        """Drop what is known of tasks that are gone."""
        for known in (self._calls, self._waits, self._started, self._again):
            for tid in known.keys() - alive:
                del known[tid]

    def _step_back(self, task: FrozenTask) -> None:
        """A thread that hasn't run since the last stop, but for the kernel's part, is about to make restart_syscall(2).

        Nobody could make that call in a branch, so it goes back to where it was: in the call that wants restarting.
        Only there has a thread this number in rax and a call's in orig_rax (arch/x86/kernel/signal.c).
        """
        regs = task.regs
        if regs.rax != NR.restart_syscall or regs.orig_rax not in _RESTART_BLOCK:
            return
        regs.rip += 2
        regs.rax = -stub.ERESTART_RESTARTBLOCK & NO_SYSCALL
        if self._calls.get(task.tid, (0, 0, 0))[1:] == (regs.rip, regs.rsp):
            regs.orig_rax = NR.restart_syscall
        ptrace.set_regs(task.tid, regs)

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
        if regs.orig_rax not in EINTR_ON_STOP or regs.rax != -errno.EINTR & NO_SYSCALL:
            for known in (self._waits, self._again):
                if known.get(task.tid, (0, 0))[:2] != (_return_address(regs), regs.rsp):
                    known.pop(task.tid, None)
            return
        if _is_interrupting(task.status):
            return
        if regs.orig_rax in (NR.epoll_wait, NR.epoll_pwait):
            self._shorten_wait(task)
        if self._is_timed_out(task):
            regs.rax = _TIMED_OUT.get(NR(regs.orig_rax), -errno.EAGAIN) & NO_SYSCALL
            regs.orig_rax = NO_SYSCALL  # it has returned
        else:
            regs.rax = -stub.ERESTARTNOHAND & NO_SYSCALL
        ptrace.set_regs(task.tid, regs)

    def _is_timed_out(self, task: FrozenTask) -> bool:
        """Whether a call that would start again with its whole timeout has waited that long already.

        Its time has to be up then, or in a pod that is checkpointed often it would wait for ever.
        """
        regs = task.regs
        timeout = _timeout_ns(task)
        if timeout is None:
            return False
        now = time.monotonic_ns()
        rip, rsp, begun = self._again.get(task.tid, (0, 0, 0))
        if (rip, rsp) != (regs.rip, regs.rsp):
            begun = self._asleep.get(task.tid, now)
            self._again[task.tid] = (regs.rip, regs.rsp, begun)
        if now - begun < timeout:
            return False
        del self._again[task.tid]
        return True

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


def _return_address(regs: ptrace.Regs) -> int:
    """Where the call returns to that a stop has interrupted, if the thread has not begun it again since; else -1."""
    if regs.rax == regs.orig_rax:  # the kernel has done its part
        return regs.rip + 2
    return regs.rip if regs.rax == -stub.ERESTARTNOHAND & NO_SYSCALL else -1


def _is_interrupting(status: dict[str, str]) -> bool:
    """Whether a signal is about to be delivered: one that is pending, isn't blocked and isn't ignored.

    SigBlk is what is blocked within epoll_pwait(2) and its like. While a task is traced, signals that it ignores
    become pending, too; nothing comes of them.
    """
    pending, blocked, ignored, caught = (
        int(status[key], 16) | int(status.get(other, "0"), 16)
        for key, other in (("SigPnd", "ShdPnd"), ("SigBlk", ""), ("SigIgn", ""), ("SigCgt", ""))
    )
    return bool(pending & ~blocked & ~ignored & ~(_IGNORED & ~caught))


def _timeout_ns(task: FrozenTask) -> int | None:
    """The timeout of a call for which it lies outside of the registers; None without one."""
    regs = task.regs
    if regs.orig_rax in TIMEOUT_POINTER:
        pointer = getattr(regs, TIMEOUT_POINTER[NR(regs.orig_rax)])
        if not pointer:
            return None
        seconds, nanoseconds = struct.unpack("<qq", mm.read_memory(task.tid, pointer, 16))
        return int(seconds * 1_000_000_000 + nanoseconds)
    if regs.orig_rax in (*_RECEIVING, *_SENDING):
        option = socket.SO_RCVTIMEO if regs.orig_rax in _RECEIVING else socket.SO_SNDTIMEO
        return _socket_timeout_ns(int(task.status["Tgid"]), regs.rdi & 0xFFFFFFFF, option)
    return None


def _socket_timeout_ns(pid: int, number: int, option: int) -> int | None:
    """SO_RCVTIMEO or SO_SNDTIMEO of a process's descriptor; None where none is set, or it is no socket."""
    with contextlib.ExitStack() as stack:
        pidfd = pidfd_open_living(pid)
        stack.callback(os.close, pidfd)
        try:
            sock = stack.enter_context(socket.socket(fileno=pidfd_getfd(pidfd, number)))
        except OSError:
            return None
        seconds, microseconds = struct.unpack("<qq", sock.getsockopt(socket.SOL_SOCKET, option, 16))
        return int(seconds * 1_000_000_000 + microseconds * 1000) or None


def _decode_call(task: FrozenTask) -> int:
    """The number that `mov $N, %eax` loads right before the task's `syscall`; -1 if it isn't so."""
    try:
        code = mm.read_memory(task.tid, task.regs.rip - 7, 7)
    except OSError:
        return -1
    return int.from_bytes(code[1:5], "little") if code[0] == 0xB8 and code[5:] == b"\x0f\x05" else -1
