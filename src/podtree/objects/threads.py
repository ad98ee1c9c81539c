"""One thread: registers, extended state, and what the kernel keeps for the C library.

Sources: ptrace(2), get_robust_list(2), set_tid_address(2), rseq(2), prctl(2).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

import msgspec

from podtree.kernel import procfs, ptrace
from podtree.kernel.ptrace import Regs
from podtree.kernel.sys import NR, syscall
from podtree.objects import attributes, credentials, scheduling, seccomp, signals
from podtree.objects.attributes import Attributes
from podtree.objects.context import FrozenTask
from podtree.objects.credentials import Credentials
from podtree.objects.descriptors import Fd
from podtree.objects.nesting import POD_DEPTH
from podtree.objects.scheduling import Scheduling
from podtree.objects.seccomp import Seccomp
from podtree.objects.signals import AltStack
from podtree.objects.tables import Directories
from podtree.objects.tracing import Tracing
from podtree.script import stub
from podtree.script.task import NO_SYSCALL, Results, Script

EINTR = 4

PR_SET_PDEATHSIG, PR_GET_PDEATHSIG, PR_SET_NAME, PR_GET_TID_ADDRESS = 1, 2, 15, 40
RESTART_BLOCK = -stub.ERESTART_RESTARTBLOCK & NO_SYSCALL


class Thread(msgspec.Struct, frozen=True, kw_only=True):
    """`tid` is the number inside the pod. `regs` is struct user_regs_struct, `xstate` the XSAVE area."""

    tid: int
    comm: bytes
    regs: bytes
    xstate: bytes
    sigmask: int
    waited_ns: int  # how long the timed call that it was stopped in had been waiting
    pending: tuple[bytes, ...]
    altstack: AltStack
    robust_list: tuple[int, int]  # head, length
    tid_address: int
    rseq: tuple[int, int, int, int]  # address, size, signature, flags
    parent_death_signal: int
    credentials: Credentials
    seccomp: Seccomp
    scheduling: Scheduling
    fds: tuple[Fd, ...] | None = None  # descriptors of its own; null: those of the process
    directories: Directories | None = None  # likewise
    attributes: Attributes = Attributes()
    own_undo: bool = False  # likewise: adjustments of semaphores (SEM_UNDO) that others don't have
    tracing: Tracing | None = None  # by another task of the pod
    inner_tids: tuple[int, ...] = ()  # its numbers in pid namespaces that were made inside, outermost first

    @property
    def own_tables(self) -> set[str]:
        """Which tables it has for itself."""
        own = {"files": self.fds is not None, "directories": self.directories is not None, "undo": self.own_undo}
        return {name for name, has in own.items() if has}


class EndedLeader(msgspec.Struct, frozen=True, kw_only=True):
    """The leader of a thread group that has ended while other threads live on. `status`: how, as wait(2) reports it."""

    comm: bytes
    status: int
    credentials: Credentials
    scheduling: Scheduling


class Asked(msgspec.Struct):
    """Where a thread's script will leave its results."""

    altstack: int
    tid_address: int
    pdeathsig: int
    securebits: int
    attributes: attributes.Asked


def ask(script: Script) -> Asked:
    """Add the calls that a thread has to make itself to tell its state."""
    asked = Asked(
        altstack=signals.ask_altstack(script),
        tid_address=script.space(8),
        pdeathsig=script.space(8),
        securebits=credentials.ask_securebits(script),
        attributes=attributes.ask(script),
    )
    script.add(NR.prctl, PR_GET_TID_ADDRESS, asked.tid_address, 0, 0, 0, name="PR_GET_TID_ADDRESS")
    script.add(NR.prctl, PR_GET_PDEATHSIG, asked.pdeathsig, 0, 0, 0, name="PR_GET_PDEATHSIG")
    return asked


def _robust_list(tid: int) -> tuple[int, int]:
    head, length = ctypes.create_string_buffer(8), ctypes.create_string_buffer(8)
    syscall(NR.get_robust_list, tid, head, length)
    return struct.unpack("<Q", head.raw)[0], struct.unpack("<Q", length.raw)[0]


def collect(task: FrozenTask, asked: Asked, results: Results, comm: bytes) -> Thread:
    """State of a stopped thread from the kernel and its finished script."""
    return Thread(
        tid=task.inner_tid,
        comm=comm,
        regs=bytes(_image_regs(task)),
        xstate=ptrace.get_xstate(task.tid),
        sigmask=task.sigmask,
        waited_ns=task.waited_ns,
        pending=tuple(signals.collect_pending(task.tid, shared=False)),
        altstack=signals.read_altstack(asked.altstack, results),
        robust_list=_robust_list(task.tid),
        tid_address=results.u64(asked.tid_address),
        rseq=ptrace.rseq_configuration(task.tid),
        parent_death_signal=results.i32(asked.pdeathsig),
        credentials=credentials.collect(task.status, credentials.read_securebits(asked.securebits, results)),
        seccomp=seccomp.collect(task.tid, task.status),
        scheduling=scheduling.collect(task.tid),
        attributes=attributes.collect(asked.attributes, results),
        tracing=task.tracing,
        inner_tids=tuple(procfs.ns_pids(task.status)[POD_DEPTH:]),
    )


def _image_regs(task: FrozenTask) -> Regs:
    """Registers for the image: no mention of restart_syscall(2), which only this kernel's task can follow."""
    regs = task.regs.copy()
    if regs.orig_rax == NR.restart_syscall:
        regs.orig_rax = task.restart_nr & NO_SYSCALL
        if task.restart_nr < 0:
            regs.rax = -EINTR & NO_SYSCALL
    return regs


def restore(thread: Thread, script: Script, last_cap: int, seen: credentials.Seen | None = None) -> None:
    """Add the calls that give a new thread its state, all but pending signals and the one of its parent's end.

    `seen` as in credentials.
    """
    script.add(NR.prctl, PR_SET_NAME, script.put(thread.comm[:15].ljust(16, b"\0")), 0, 0, 0, name="PR_SET_NAME")
    script.add(NR.set_tid_address, thread.tid_address)
    head, length = thread.robust_list
    if head:
        script.add(NR.set_robust_list, head, length, name="set_robust_list")
    address, size, signature, _flags = thread.rseq
    if address:
        script.add(NR.rseq, address, size, 0, signature, name="rseq")
    signals.restore_altstack(thread.altstack, script)
    seccomp.restore(thread.seccomp, script)
    attributes.restore(thread.attributes, script)
    credentials.restore(thread.credentials, script, last_cap, seen)


def restore_ended(ended: EndedLeader, script: Script, last_cap: int) -> None:
    """Add the calls that give a leader that is about to end what will still be seen of it."""
    script.add(NR.prctl, PR_SET_NAME, script.put(ended.comm[:15].ljust(16, b"\0")), 0, 0, 0, name="PR_SET_NAME")
    script.add(NR.set_tid_address, 0)
    credentials.restore(ended.credentials, script, last_cap)


class TimedCall(msgspec.Struct, frozen=True):
    """A half-way relative wait: the call with what is left of its time.

    `timeout` is the index of the argument that points to a struct timespec, -1 for poll(2)'s milliseconds.
    """

    nr: int
    args: tuple[int, int, int, int, int, int]
    timeout: int
    rest_ns: int


FUTEX_WAIT, FUTEX_COMMAND = 0, 0x7F  # linux/futex.h
TIMER_ABSTIME = 1


def timed_call(thread: Thread, read: Callable[[int, int], bytes]) -> TimedCall | None:
    """The relative wait that a thread was stopped in, if any; `read(address, size)` reads its memory.

    Where the program wants to know what is left (nanosleep's second pointer), the kernel has written it
    there at the stop; else it is the timeout less the time waited.
    """
    regs = Regs.from_buffer_copy(thread.regs)
    if regs.rax != RESTART_BLOCK or regs.orig_rax >= 1 << 32:
        return None
    args = (regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9)
    if regs.orig_rax == NR.poll:
        whole = struct.unpack("<i", struct.pack("<I", regs.rdx & 0xFFFFFFFF))[0] * 1_000_000
        return TimedCall(NR.poll, args, -1, max(0, whole - thread.waited_ns)) if whole >= 0 else None
    left = 0
    if regs.orig_rax == NR.nanosleep:
        index, left = 0, regs.rsi
    elif regs.orig_rax == NR.clock_nanosleep and not regs.rsi & TIMER_ABSTIME:
        index, left = 2, regs.r10
    elif regs.orig_rax == NR.futex and regs.rsi & FUTEX_COMMAND == FUTEX_WAIT and regs.r10:
        index = 3
    else:
        return None
    seconds, nanoseconds = struct.unpack("<qq", read(left or args[index], 16))
    rest = seconds * 1_000_000_000 + nanoseconds
    return TimedCall(regs.orig_rax, args, index, rest if left else max(0, rest - thread.waited_ns))


def resume_regs(thread: Thread, planted: int | None = None) -> Regs:
    """Registers with which a restored thread goes on.

    `planted` is the result of its half-way timed call, made anew with the time that was left (the kernel
    remembers the rest of that one). Without, such a call starts again with its whole timeout.
    """
    regs = Regs.from_buffer_copy(thread.regs)
    if planted is not None:
        regs.rax = planted
        if planted != RESTART_BLOCK:
            regs.orig_rax = NO_SYSCALL  # it is over
        return regs
    if regs.orig_rax < 1 << 63 and regs.rax == RESTART_BLOCK:
        regs.rax = -stub.ERESTARTNOHAND & NO_SYSCALL
    return regs
