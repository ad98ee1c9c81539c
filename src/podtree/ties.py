"""Tasks that another task of the pod traces (strace, gdb): taken from their tracer, and given back.

A task has one tracer. So the tracer, which is stopped, is made to look at its tracee and to let go of it, by a
script; from there on the tracee is stopped and traced like all others. Afterwards the tracer takes it again, and
brings it to where it was.

In between, when nobody traces it, the tracee runs: it is in the stub, jumping on the spot, with all signals blocked.
If we die then, the next supervisor finds it there and sends it home (script/vdso.py, leave_stub()); its tracer
has lost it.

Source: ptrace(2); kernel/ptrace.c, kernel/signal.c, arch/x86/kernel/ptrace.c (Linux 6.18).
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from podtree.kernel import mm, procfs, ptrace
from podtree.kernel.kmem import Unreadable
from podtree.kernel.ptrace import ALL_SIGNALS, Regs
from podtree.kernel.sys import NR
from podtree.objects import insight
from podtree.objects.tracing import DEBUG_REGISTERS, Mode, Tracing
from podtree.script import stub
from podtree.script.task import NO_SYSCALL, Remote, Scratch, TaskLost, check, poke
from podtree.script.vdso import stub_offset
from podtree.tracees import NotStopped, Tracees

PT_SEIZED, PT_OPTION_SHIFT = 0x10000, 3  # include/linux/ptrace.h
OPTION_MASK = 0xFF | ptrace.PTRACE_O_EXITKILL | ptrace.PTRACE_O_SUSPEND_SECCOMP
SYSCALL_TRACE = 1 << 2  # include/linux/thread_info.h, SYSCALL_WORK_SYSCALL_TRACE
DEBUG_OFFSET = 848  # of u_debugreg in struct user (sys/user.h)
PIDFD_THREAD = os.O_EXCL
P_PID, STOPPED_UNWAITED = 1, 0x01000002 | 0x40000000  # WNOWAIT | WSTOPPED, __WALL
SYSCALL_INFO_ENTRY, SYSCALL_INFO_EXIT = 1, 2  # linux/ptrace.h, PTRACE_SYSCALL_INFO_*
SI_QUEUE = -1
PATIENCE_S = 0.2  # for a stop that may not come
SURE_S = 5.0  # for one that comes as soon as the task is given the CPU
AREA = 4096
_REGS = ctypes.sizeof(Regs)
_RESTARTS = (stub.ERESTARTSYS, stub.ERESTARTNOINTR, stub.ERESTARTNOHAND, stub.ERESTART_RESTARTBLOCK)
_SIGINFO, _SIGNALS, _IOVEC, _REGISTERS = 0, 128, 160, 256  # in the area


@dataclass(slots=True)
class Tie:
    """One tracee (host numbers), its number in the pod, who traces it, and how."""

    pid: int
    tid: int
    inner: int
    tracer: int
    tracing: Tracing


#: By tracee (host tid): the system call that restart_syscall(2) goes on with there, and its rip and rsp.
_calls: dict[int, tuple[int, int, int]] = {}


class Ties:
    """The tracees that were taken from their tracers."""

    def __init__(self) -> None:
        self.taken: dict[int, Tie] = {}

    def take(self, tracees: Tracees, undone: Callable[[int, int], bool]) -> None:
        """Take all of `tracees.foreign`, a tracer that is traced itself before its own. Raises NotStopped for one that
        can't be taken now.

        `undone(call, result)`: whether a system call has ended only because its task was to stop.
        """
        while tracees.foreign:
            groups = _by_tracer(tracees.foreign)
            tracer = next((tid for tid in groups if tid in tracees.stopped), None)
            if tracer is None:
                raise NotStopped(min(groups), "it is both traced and not to be found")
            with _Agent(tracer) as agent:
                for pid, tid in groups[tracer]:
                    self._take(agent, pid, tid, tracees, undone)
        for pid in {tie.pid for tie in self.taken.values()}:
            _refuse_unnoticed_ends(pid)

    def _take(
        self, agent: _Agent, pid: int, tid: int, tracees: Tracees, undone: Callable[[int, int], bool]
    ) -> None:
        tie, regs, sigmask = agent.look(pid, tid, undone)
        agent.trace(ptrace.PTRACE_DETACH, tie.inner)
        self.taken[tid] = tie
        del tracees.foreign[tid]
        tracees.adopt(pid, tid, SURE_S)
        ptrace.set_regs(tid, regs)
        ptrace.set_sigmask(tid, sigmask)

    def call_of(self, tid: int, regs: Regs) -> int:
        """What a tracee that is in restart_syscall(2) goes on with, if it was let go by us in there; else -1.

        Where it waits tells that of others (freeze.Restarts); it may not have got there yet.
        """
        call, rip, rsp = _calls.get(tid, (-1, 0, 0))
        return call if (rip, rsp) == (regs.rip, regs.rsp) else -1

    def give_back(self, tracees: Tracees | None = None) -> list[Tie]:
        """Every tracer has its tracees again, as they were. All are stopped, and traced by us.

        What was taken last is given back first. Returns those that didn't work out: they run, and have no tracer, or
        have been killed.
        """
        lost = []
        groups = _by_tracer({tie.tid: (tie.pid, tie.tracer) for tie in self.taken.values()})
        for tracer, own in reversed(groups.items()):
            ties = [self.taken[tid] for _, tid in own]
            try:
                with _Agent(tracer) as agent:
                    lost += [tie for tie in ties if not _give(agent, tie, tracees)]
            except (OSError, NotStopped, TaskLost):  # the tracer has been killed: what is left runs on, as it would
                lost += [tie for tie in ties if tie not in lost]
        self.taken.clear()
        return lost


def _give(agent: _Agent, tie: Tie, tracees: Tracees | None) -> bool:
    try:
        regs, sigmask = ptrace.get_regs(tie.tid), ptrace.get_sigmask(tie.tid)
        _plant(tie.pid, tie.tid, regs, sigmask)
        ptrace.set_sigmask(tie.tid, ALL_SIGNALS)
        ptrace.set_regs(tie.tid, _parked(tie.pid, regs))
        ptrace.detach(tie.tid)
    except ProcessLookupError:  # killed: it is still ours to notice
        return False
    if regs.rax == -stub.ERESTART_RESTARTBLOCK & NO_SYSCALL and regs.orig_rax != NR.restart_syscall:
        _calls[tie.tid] = regs.orig_rax, regs.rip, regs.rsp
    if tracees:
        tracees.stopped.pop(tie.tid, None)
    try:
        agent.take_again(tie, regs, sigmask)
    except (OSError, NotStopped):
        agent.let_go(tie, regs, sigmask)
        return False
    return True


def _refuse_unnoticed_ends(pid: int) -> None:
    """Threads that have ended, which only their tracer has still to hear of, can't be made again."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for tid in procfs.threads(pid):
            if tid != pid and procfs.stat(pid, tid).state == "Z":
                raise NotStopped(tid, "it has ended, and its tracer has not waited for that yet")


def _send_home(tid: int, regs: Regs, sigmask: int) -> None:
    """A task that jumps on the spot and has no tracer goes on with its own work."""
    with suppress(OSError):
        ptrace.seize(tid, 0)
        ptrace.interrupt(tid)
        while not (stop := ptrace.wait(tid)).is_interrupt:
            if stop.exited:
                return
            ptrace.cont(tid)
        ptrace.set_sigmask(tid, sigmask)
        ptrace.set_regs(tid, regs)
        ptrace.detach(tid)


def _by_tracer(foreign: dict[int, tuple[int, int]]) -> dict[int, list[tuple[int, int]]]:
    """(process, thread) of tracees by their tracer."""
    found: dict[int, list[tuple[int, int]]] = {}
    for tid, (pid, tracer) in foreign.items():
        found.setdefault(tracer, []).append((pid, tid))
    return found


def _stub_of(pid: int) -> int:
    start = next((entry.start for entry in procfs.maps(pid) if entry.path == "[vdso]"), None)
    if start is None:
        raise NotStopped(pid, "it has no vdso")
    return start + stub_offset()


def _plant(pid: int, tid: int, regs: Regs, sigmask: int) -> None:
    """Put the stub into a tracee, with its way home."""
    image = bytearray(stub.image(regs, sigmask))
    image[stub.SPIN : stub.SPIN + 2] = b"\xeb\xfe"  # jmp to itself
    poke(tid, _stub_of(pid), bytes(image))


def _parked(pid: int, regs: Regs) -> Regs:
    parked = regs.copy()
    parked.rip, parked.orig_rax = _stub_of(pid) + stub.SPIN, NO_SYSCALL
    return parked


def _before_call(regs: Regs) -> Regs:
    """Registers of before the system call at whose begin a task is stopped."""
    before = regs.copy()
    before.rip, before.rax, before.orig_rax = regs.rip - 2, regs.orig_rax, NO_SYSCALL
    return before


def _harmless_call(pid: int, regs: Regs) -> Regs:
    """Registers that make a system call, in the stub, which changes nothing."""
    call = regs.copy()
    call.rip, call.rax, call.orig_rax = _stub_of(pid) + stub.ONE, NR.getpid, NO_SYSCALL
    return call


def _within_call(regs: Regs) -> Regs:
    """Registers that make the interrupted system call again."""
    again = regs.copy()
    error = -regs.rax & NO_SYSCALL
    if regs.orig_rax < 1 << 63 and error in _RESTARTS:
        again.rip -= 2
        again.rax = NR.restart_syscall if error == stub.ERESTART_RESTARTBLOCK else regs.orig_rax
    again.orig_rax = NO_SYSCALL
    return again


class _Agent:
    """A stopped tracer that makes ptrace(2) calls for us. A context manager: the tracer notices nothing of it."""

    def __init__(self, tid: int) -> None:
        self.tid = tid
        status = procfs.status(tid)
        self.inner = procfs.ns_pids(status)[-1]
        pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
        self._had_news = bool(pending >> (signal.SIGCHLD - 1) & 1)
        self._remote = Remote(tid, _stub_of(int(status["Tgid"])))
        self._scratch = Scratch(self._remote, AREA)

    def __enter__(self) -> _Agent:
        self._remote.__enter__()
        self._scratch.__enter__()
        self.area = self._scratch.address
        return self

    def __exit__(self, *error: object) -> None:
        lost = isinstance(error[1], TaskLost)
        if not lost:
            if not self._had_news:  # stops of its tracees have told it by SIGCHLD
                mask = struct.pack("<QQQ", 1 << (signal.SIGCHLD - 1), 0, 0)
                mm.write_memory(self.tid, self.area, mask)
                self._remote.call(NR.rt_sigtimedwait, self.area, 0, self.area + 8, 8)
            self._scratch.__exit__(None, None, None)
        self._remote.__exit__(None, error[1] if lost else None, None)  # type: ignore[arg-type]

    # --- calls

    def trace(self, request: int, inner: int, address: int = 0, data: int = 0) -> int:
        """ptrace(2), by the tracer. OSError if it fails."""
        return check(self._remote.call(NR.ptrace, request, inner, address, data), f"ptrace request {request:#x}")

    def _read(self, offset: int, size: int) -> bytes:
        return mm.read_memory(self.tid, self.area + offset, size)

    def _write(self, offset: int, data: bytes) -> int:
        mm.write_memory(self.tid, self.area + offset, data)
        return self.area + offset

    def _iovec(self) -> int:
        return self._write(_IOVEC, struct.pack("<QQ", self.area + _REGISTERS, _REGS))

    def regs(self, inner: int) -> Regs:
        """Registers of a tracee."""
        self.trace(ptrace.PTRACE_GETREGSET, inner, ptrace.NT_PRSTATUS, self._iovec())
        return Regs.from_buffer_copy(self._read(_REGISTERS, _REGS))

    def sigmask(self, inner: int) -> int:
        """Its blocked signals."""
        self.trace(ptrace.PTRACE_GETSIGMASK, inner, 8, self.area + _SIGNALS)
        return int.from_bytes(self._read(_SIGNALS, 8), "little")

    def set_registers(self, inner: int, regs: Regs, sigmask: int) -> None:
        """Set both."""
        self._write(_REGISTERS, bytes(regs))
        self.trace(ptrace.PTRACE_SETREGSET, inner, ptrace.NT_PRSTATUS, self._iovec())
        self.set_sigmask(inner, sigmask)

    def set_sigmask(self, inner: int, sigmask: int) -> None:
        """Set the blocked signals alone."""
        self.trace(ptrace.PTRACE_SETSIGMASK, inner, 8, self._write(_SIGNALS, struct.pack("<Q", sigmask)))

    def _debug(self, inner: int) -> tuple[int, ...]:
        found = []
        for number in DEBUG_REGISTERS:
            self.trace(ptrace.PTRACE_PEEKUSER, inner, DEBUG_OFFSET + 8 * number, self.area + _SIGNALS)
            found.append(int.from_bytes(self._read(_SIGNALS, 8), "little"))
        return tuple(found) if any(found) else ()

    def _news(self, inner: int) -> int:
        """The wait status of a tracee's stop that the tracer has not waited for; 0: there is none."""
        self._write(_SIGINFO, bytes(ptrace.SIGINFO_SIZE))
        self._remote.call(NR.waitid, P_PID, inner, self.area, STOPPED_UNWAITED | os.WNOHANG, 0)
        number, _, code, _, _, _, status = struct.unpack("<iiiiiIi", self._read(_SIGINFO, 28))
        return status if number == signal.SIGCHLD and code == os.CLD_TRAPPED else 0

    def _hear(self, inner: int) -> None:
        """Wait for a stop that there is."""
        check(self._remote.call(NR.wait4, inner, 0, os.WNOHANG | ptrace.WALL, 0), "wait4")

    # --- taking

    def look(self, pid: int, tid: int, undone: Callable[[int, int], bool]) -> tuple[Tie, Regs, int]:
        """Learn how a tracee is traced, with its registers and signal mask. It is stopped then, and that has been
        waited for. Raises NotStopped.
        """
        inner = procfs.ns_pids(procfs.status(pid, tid))[-1]
        flags, to_call = _traced_how(tid)
        self._may_attach(pid, tid, inner)
        seized, siginfo, news, signalled = bool(flags & PT_SEIZED), b"", False, False
        mode = None
        if procfs.stat(pid, tid).state != "t":
            if seized:
                mode = self._interrupt(pid, tid, inner, to_call, undone)
            else:
                mode, signalled = self._signal(pid, tid, inner, to_call), True
        if mode is None:
            mode, siginfo, news = self._stop(pid, tid, inner)
        regs, sigmask = self.regs(inner), self.sigmask(inner)
        if mode is Mode.ENTERED:
            regs = _before_call(regs)
        tracing = Tracing(
            tracer=self.inner, seized=seized, options=flags >> PT_OPTION_SHIFT & OPTION_MASK, mode=mode,
            siginfo=siginfo, news=news, debug=self._debug(inner),
        )  # fmt: skip
        tie = Tie(pid, tid, inner, self.tid, tracing)
        self._park(tie, regs, sigmask)
        if signalled and siginfo:  # something else stopped it first: our SIGSTOP is still to come
            self.trace(ptrace.PTRACE_CONT, inner)
            _await_stop(pid, tid)
            self._hear(inner)
        return tie, regs, sigmask

    def _park(self, tie: Tie, regs: Regs, sigmask: int) -> None:
        """Once it runs it shall jump on the spot."""
        _plant(tie.pid, tie.tid, regs, sigmask)
        self.set_registers(tie.inner, _parked(tie.pid, regs), ALL_SIGNALS)

    def _may_attach(self, pid: int, tid: int, inner: int) -> None:
        """Whether the tracer could trace it again, as the kernel also asks when somebody reads its memory."""
        ranges = struct.pack("<QQQQ", self.area + _REGISTERS, 8, _stub_of(pid), 8)
        at = self._write(_IOVEC, ranges)
        if self._remote.call(NR.process_vm_readv, inner, at, 1, at + 16, 1, 0) != 8:
            raise NotStopped(tid, "its tracer would not be allowed to trace it again")

    def _stop(self, pid: int, tid: int, inner: int) -> tuple[Mode, bytes, bool]:
        """Where a tracee is stopped, by what signal, and whether its tracer has that still to hear; it has, then."""
        try:
            self.trace(ptrace.PTRACE_GETSIGINFO, inner, 0, self.area)
        except OSError as error:
            raise NotStopped(tid, "its tracer keeps it in a group-stop") from error
        siginfo = self._read(_SIGINFO, ptrace.SIGINFO_SIZE)
        number, _, code = struct.unpack_from("<iii", siginfo)
        mode = Mode.STOPPED
        if code > 0xFF or (number == signal.SIGTRAP and code == signal.SIGTRAP):
            raise NotStopped(tid, "its tracer keeps it at a ptrace event")
        if number == signal.SIGTRAP and code == signal.SIGTRAP | 0x80:
            mode, siginfo = self._at_call(pid, tid, inner), b""
        news = bool(self._news(inner))
        if news:
            self._hear(inner)
        return mode, siginfo, news

    def _at_call(self, pid: int, tid: int, inner: int) -> Mode:
        self.trace(ptrace.PTRACE_GET_SYSCALL_INFO, inner, _SIGNALS, self.area)
        operation = self._read(_SIGINFO, 1)[0]
        if operation == SYSCALL_INFO_ENTRY and self.regs(inner).orig_rax < 1 << 63:
            return Mode.ENTERED
        if operation == SYSCALL_INFO_EXIT and not _has_own_filter(pid, tid, self.tid):
            return Mode.LEFT
        raise NotStopped(tid, "its tracer keeps it at a system call that can't be made again")

    def _interrupt(
        self, pid: int, tid: int, inner: int, to_call: bool, undone: Callable[[int, int], bool]
    ) -> Mode | None:
        """Stop a seized tracee that runs. None: it had just stopped for another reason."""
        self.trace(ptrace.PTRACE_INTERRUPT, inner)
        _await_stop(pid, tid)
        status = self._news(inner)
        if status == signal.SIGTRAP | ptrace.PTRACE_EVENT_STOP << 8:
            mode = Mode.TO_CALL if to_call else Mode.RAN
        elif status == signal.SIGTRAP | 0x80 and to_call and self._was_undone(inner, undone):
            mode = Mode.IN_CALL
        else:
            return None
        self._hear(inner)
        return mode

    def _signal(self, pid: int, tid: int, inner: int, to_call: bool) -> Mode | None:
        """Stop one that isn't seized, by a signal that nobody but its tracer hears of. None as of _interrupt."""
        if to_call:
            raise NotStopped(tid, "its tracer lets it run to its next system call; interrupt it (^C)")
        self._send_stop(pid, inner)
        _await_stop(pid, tid)
        if self._news(inner) != signal.SIGSTOP:
            return None
        self._hear(inner)
        return Mode.RAN

    def _send_stop(self, pid: int, inner: int) -> None:
        group = procfs.ns_pids(procfs.status(pid))[-1]
        check(self._remote.call(NR.tgkill, group, inner, signal.SIGSTOP), "tgkill")

    def _was_undone(self, inner: int, undone: Callable[[int, int], bool]) -> bool:
        regs = self.regs(inner)
        error = -regs.rax & NO_SYSCALL
        return error in _RESTARTS or undone(regs.orig_rax, error)

    # --- giving back

    def take_again(self, tie: Tie, regs: Regs, sigmask: int) -> None:
        """Trace a task that jumps on the spot, and bring it to where it was."""
        inner, tracing = tie.inner, tie.tracing
        if not tracing.seized:
            self.trace(ptrace.PTRACE_ATTACH, inner)
        else:
            self.trace(ptrace.PTRACE_SEIZE, inner, 0, tracing.options)
            if tracing.mode is Mode.STOPPED:
                self._send_stop(tie.pid, inner)
            else:
                self.trace(ptrace.PTRACE_INTERRUPT, inner)
        _await_stop(tie.pid, tie.tid, SURE_S)
        self._hear(inner)
        if not tracing.seized:
            self.trace(ptrace.PTRACE_SETOPTIONS, inner, 0, tracing.options)
        for number, value in zip(DEBUG_REGISTERS, tracing.debug, strict=bool(tracing.debug)):
            self.trace(ptrace.PTRACE_POKEUSER, inner, DEBUG_OFFSET + 8 * number, value)
        match tracing.mode:
            case Mode.STOPPED:
                self._stop_again(tie, regs, sigmask)
            case Mode.ENTERED:
                self.set_registers(inner, regs, ALL_SIGNALS)
                self._to_call(tie, SYSCALL_INFO_ENTRY, hear=not tracing.news)
                self.set_sigmask(inner, sigmask)
            case Mode.LEFT:
                self.set_registers(inner, _harmless_call(tie.pid, regs), ALL_SIGNALS)
                self._to_call(tie, SYSCALL_INFO_ENTRY)
                self._to_call(tie, SYSCALL_INFO_EXIT, hear=not tracing.news)
                self.set_registers(inner, regs, sigmask)
            case Mode.IN_CALL:
                self.set_registers(inner, _within_call(regs), ALL_SIGNALS)
                self._to_call(tie, SYSCALL_INFO_ENTRY)
                self.set_sigmask(inner, sigmask)
                self.trace(ptrace.PTRACE_SYSCALL, inner)
            case Mode.TO_CALL | Mode.RAN:
                self.set_registers(inner, regs, sigmask)
                self.trace(ptrace.PTRACE_SYSCALL if tracing.mode is Mode.TO_CALL else ptrace.PTRACE_CONT, inner)

    def _to_call(self, tie: Tie, operation: int, *, hear: bool = True) -> None:
        """Have it run to the begin or end of a system call. Raises NotStopped if it stops for something else."""
        self.trace(ptrace.PTRACE_SYSCALL, tie.inner)
        _await_stop(tie.pid, tie.tid, SURE_S)
        self.trace(ptrace.PTRACE_GET_SYSCALL_INFO, tie.inner, _SIGNALS, self.area)
        if self._read(_SIGINFO, 1)[0] != operation:
            raise NotStopped(tie.tid, "it has not come to a system call")
        if hear:
            self._hear(tie.inner)

    def let_go(self, tie: Tie, regs: Regs, sigmask: int) -> None:
        """Have it go on with its own work without a tracer: what it had can't be had again."""
        try:
            self.set_registers(tie.inner, regs, sigmask)
            self.trace(ptrace.PTRACE_DETACH, tie.inner)
        except OSError:
            _send_home(tie.tid, regs, sigmask)

    def _stop_again(self, tie: Tie, regs: Regs, sigmask: int) -> None:
        """In the stop before the delivery of its signal. What of it the tracer has still to hear is the real one."""
        inner, siginfo = tie.inner, tie.tracing.siginfo
        if tie.tracing.news:
            (number,) = struct.unpack_from("<i", siginfo)
            self.set_sigmask(inner, ALL_SIGNALS & ~(1 << (number - 1)))
            group = procfs.ns_pids(procfs.status(tie.pid))[-1]
            info = self._write(_SIGINFO, struct.pack("<iii", number, 0, SI_QUEUE).ljust(ptrace.SIGINFO_SIZE, b"\0"))
            check(self._remote.call(NR.rt_tgsigqueueinfo, group, inner, number, info), "rt_tgsigqueueinfo")
            self.trace(ptrace.PTRACE_CONT, inner)
            _await_stop(tie.pid, tie.tid, SURE_S)
        self.trace(ptrace.PTRACE_SETSIGINFO, inner, 0, self._write(_SIGINFO, siginfo))
        self.set_registers(inner, regs, sigmask)


def _has_own_filter(pid: int, tid: int, tracer: int) -> bool:
    """Whether it has a seccomp filter that its tracer hasn't: it may forbid any call."""
    name = "Seccomp_filters"
    return procfs.status(pid, tid).get(name) != procfs.status(tracer).get(name)


def _traced_how(tid: int) -> tuple[int, bool]:
    """task_struct's `ptrace`, and whether the task stops at system calls. Raises NotStopped if nobody tells."""
    memory = insight.memory()
    if memory is None:
        raise NotStopped(tid, insight.why_not() or "how it is traced only kernel memory shows")
    pidfd = os.pidfd_open(tid, PIDFD_THREAD)
    try:
        task = memory.task(pidfd)
        return task.number("ptrace"), bool(task.number("thread_info.syscall_work") & SYSCALL_TRACE)
    except Unreadable as error:
        raise NotStopped(tid, str(error)) from error
    finally:
        os.close(pidfd)


def _await_stop(pid: int, tid: int, patience_s: float = PATIENCE_S) -> None:
    """Until a task is in a ptrace stop."""
    deadline = time.monotonic() + patience_s
    while procfs.stat(pid, tid).state != "t":
        if time.monotonic() > deadline:
            raise NotStopped(tid, "it doesn't stop for its tracer")
