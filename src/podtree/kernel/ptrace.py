"""ptrace(2): seize, interrupt, registers, signals of one traced thread.

Constants: include/uapi/linux/ptrace.h, arch/x86/include/uapi/asm/ptrace-abi.h (Linux 6.18).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct

from podtree.kernel.sys import NR, syscall

PTRACE_PEEKDATA = 2
PTRACE_PEEKUSER = 3
PTRACE_POKEUSER = 6
PTRACE_CONT = 7
PTRACE_KILL = 8
PTRACE_ATTACH = 16
PTRACE_DETACH = 17
PTRACE_SYSCALL = 24
PTRACE_SETOPTIONS = 0x4200
PTRACE_GETEVENTMSG = 0x4201
PTRACE_GETSIGINFO = 0x4202
PTRACE_SETSIGINFO = 0x4203
PTRACE_GETREGSET = 0x4204
PTRACE_SETREGSET = 0x4205
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_LISTEN = 0x4208
PTRACE_PEEKSIGINFO = 0x4209
PTRACE_GETSIGMASK = 0x420A
PTRACE_SETSIGMASK = 0x420B
PTRACE_SECCOMP_GET_FILTER = 0x420C
PTRACE_SECCOMP_GET_METADATA = 0x420D
PTRACE_GET_SYSCALL_INFO = 0x420E
PTRACE_GET_RSEQ_CONFIGURATION = 0x420F
PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG = 0x4211

PTRACE_O_TRACESYSGOOD = 0x01
PTRACE_O_TRACEFORK = 0x02
PTRACE_O_TRACEVFORK = 0x04
PTRACE_O_TRACECLONE = 0x08
PTRACE_O_TRACEEXEC = 0x10
PTRACE_O_EXITKILL = 0x100000
PTRACE_O_SUSPEND_SECCOMP = 0x200000

PTRACE_EVENT_FORK = 1
PTRACE_EVENT_VFORK = 2
PTRACE_EVENT_CLONE = 3
PTRACE_EVENT_EXEC = 4
PTRACE_EVENT_STOP = 128

PTRACE_PEEKSIGINFO_SHARED = 1
NT_PRSTATUS = 1
NT_X86_XSTATE = 0x202
SIGINFO_SIZE = 128
WALL = 0x40000000  # __WALL
ALL_SIGNALS = 0xFFFFFFFFFFFFFFFF

_buffer = ctypes.create_string_buffer(65536)


class Regs(ctypes.Structure):
    """struct user_regs_struct of x86_64 (sys/user.h)."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in [
            "r15",
            "r14",
            "r13",
            "r12",
            "rbp",
            "rbx",
            "r11",
            "r10",
            "r9",
            "r8",
            "rax",
            "rcx",
            "rdx",
            "rsi",
            "rdi",
            "orig_rax",
            "rip",
            "cs",
            "eflags",
            "rsp",
            "ss",
            "fs_base",
            "gs_base",
            "ds",
            "es",
            "fs",
            "gs",
        ]
    )
    r15: int
    r14: int
    r13: int
    r12: int
    rbp: int
    rbx: int
    r11: int
    r10: int
    r9: int
    r8: int
    rax: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    orig_rax: int
    rip: int
    cs: int
    eflags: int
    rsp: int
    ss: int
    fs_base: int
    gs_base: int
    ds: int
    es: int
    fs: int
    gs: int

    def copy(self) -> Regs:
        """An independent copy."""
        return Regs.from_buffer_copy(self)


def _iovec(address: int, length: int) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(struct.pack("<QQ", address, length), 16)


def seize(tid: int, options: int) -> None:
    """Attach without stopping (PTRACE_SEIZE)."""
    syscall(NR.ptrace, PTRACE_SEIZE, tid, 0, options)


def set_options(tid: int, options: int) -> None:
    """Replace the options of a stopped task (PTRACE_SETOPTIONS)."""
    syscall(NR.ptrace, PTRACE_SETOPTIONS, tid, 0, options)


def interrupt(tid: int) -> None:
    """Ask for a PTRACE_EVENT_STOP."""
    syscall(NR.ptrace, PTRACE_INTERRUPT, tid, 0, 0)


def cont(tid: int, sig: int = 0) -> None:
    """Resume, delivering `sig` if the stop was a signal-delivery-stop."""
    syscall(NR.ptrace, PTRACE_CONT, tid, 0, sig)


def resume_to_syscall(tid: int) -> None:
    """Resume until the next system call entry or exit."""
    syscall(NR.ptrace, PTRACE_SYSCALL, tid, 0, 0)


def detach(tid: int, sig: int = 0) -> None:
    """Let go of a stopped task; it goes on."""
    syscall(NR.ptrace, PTRACE_DETACH, tid, 0, sig)


def event_message(tid: int) -> int:
    """PTRACE_GETEVENTMSG: the new task's id at fork/clone events (in the tracer's pid namespace)."""
    syscall(NR.ptrace, PTRACE_GETEVENTMSG, tid, 0, _buffer)
    return int(struct.unpack_from("<Q", _buffer)[0])


def get_regs(tid: int) -> Regs:
    """General registers of a stopped task."""
    regs = Regs()
    iov = _iovec(ctypes.addressof(regs), ctypes.sizeof(regs))
    syscall(NR.ptrace, PTRACE_GETREGSET, tid, NT_PRSTATUS, iov)
    return regs


def set_regs(tid: int, regs: Regs) -> None:
    """Set the general registers, fs_base and gs_base included."""
    iov = _iovec(ctypes.addressof(regs), ctypes.sizeof(regs))
    syscall(NR.ptrace, PTRACE_SETREGSET, tid, NT_PRSTATUS, iov)


def get_xstate(tid: int) -> bytes:
    """FPU, SSE, AVX... state as the XSAVE area."""
    iov = _iovec(ctypes.addressof(_buffer), len(_buffer))
    syscall(NR.ptrace, PTRACE_GETREGSET, tid, NT_X86_XSTATE, iov)
    (length,) = struct.unpack_from("<Q", iov, 8)
    return _buffer.raw[:length]


def set_xstate(tid: int, xstate: bytes) -> None:
    """Set what get_xstate() returned, on a CPU with the same XSAVE layout."""
    data = ctypes.create_string_buffer(xstate, len(xstate))
    syscall(NR.ptrace, PTRACE_SETREGSET, tid, NT_X86_XSTATE, _iovec(ctypes.addressof(data), len(xstate)))


def get_sigmask(tid: int) -> int:
    """Blocked signals (bit n-1 = signal n); the real mask, also inside sigsuspend(2) or ppoll(2)."""
    syscall(NR.ptrace, PTRACE_GETSIGMASK, tid, 8, _buffer)
    return int(struct.unpack_from("<Q", _buffer)[0])


def set_sigmask(tid: int, mask: int) -> None:
    """Set the blocked signals."""
    syscall(NR.ptrace, PTRACE_SETSIGMASK, tid, 8, ctypes.create_string_buffer(struct.pack("<Q", mask), 8))


def pending_siginfo(tid: int, shared: bool) -> list[bytes]:
    """Queued signals of the thread or (shared) of its process: siginfo_t, 128 bytes each, oldest first."""
    found: list[bytes] = []
    batch = 32
    while True:
        args = ctypes.create_string_buffer(
            struct.pack("<QIi", len(found), PTRACE_PEEKSIGINFO_SHARED if shared else 0, batch), 16
        )
        count = syscall(NR.ptrace, PTRACE_PEEKSIGINFO, tid, args, _buffer)
        raw = _buffer.raw
        found += [raw[i * SIGINFO_SIZE : (i + 1) * SIGINFO_SIZE] for i in range(count)]
        if count < batch:
            return found


def rseq_configuration(tid: int) -> tuple[int, int, int, int]:
    """(address, size, signature, flags) of the thread's rseq area; address 0: none."""
    syscall(NR.ptrace, PTRACE_GET_RSEQ_CONFIGURATION, tid, 24, _buffer)
    address, size, signature, flags = struct.unpack_from("<QIII", _buffer)
    return address, size, signature, flags


def seccomp_filter(tid: int, index: int) -> bytes | None:
    """The index-th oldest seccomp filter as an array of struct sock_filter; None past the last."""
    try:
        count = syscall(NR.ptrace, PTRACE_SECCOMP_GET_FILTER, tid, index, 0)
    except FileNotFoundError:
        return None
    program = ctypes.create_string_buffer(count * 8)
    syscall(NR.ptrace, PTRACE_SECCOMP_GET_FILTER, tid, index, program)
    return program.raw


def seccomp_flags(tid: int, index: int) -> int:
    """SECCOMP_FILTER_FLAG_* of the index-th filter (the kernel reports LOG only)."""
    data = ctypes.create_string_buffer(struct.pack("<QQ", index, 0), 16)
    syscall(NR.ptrace, PTRACE_SECCOMP_GET_METADATA, tid, 16, data)
    return int(struct.unpack_from("<Q", data, 8)[0])


def syscall_dispatch_is_on(tid: int) -> bool:
    """Whether the thread has its system calls dispatched to itself (prctl(2), PR_SET_SYSCALL_USER_DISPATCH)."""
    config = ctypes.create_string_buffer(32)
    try:
        syscall(NR.ptrace, PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, 32, config)
    except OSError:
        return False  # a kernel before 6.4 can't tell
    return bool(struct.unpack_from("<Q", config)[0])


class Stop:
    """A decoded wait status of a traced task."""

    __slots__ = ("event", "exited", "signal", "status")

    def __init__(self, status: int) -> None:
        self.status = status
        self.exited = not os.WIFSTOPPED(status)
        self.signal = os.WSTOPSIG(status) if not self.exited else 0
        self.event = status >> 16 if not self.exited else 0

    @property
    def is_interrupt(self) -> bool:
        """Stopped by PTRACE_INTERRUPT, or in a group-stop."""
        return self.event == PTRACE_EVENT_STOP

    @property
    def is_group_stop(self) -> bool:
        """Stopped by SIGSTOP, SIGTSTP, SIGTTIN or SIGTTOU (job control)."""
        return self.is_interrupt and self.signal in (
            signal.SIGSTOP,
            signal.SIGTSTP,
            signal.SIGTTIN,
            signal.SIGTTOU,
        )

    @property
    def is_syscall(self) -> bool:
        """System call entry or exit (PTRACE_O_TRACESYSGOOD)."""
        return self.event == 0 and self.signal == signal.SIGTRAP | 0x80

    def __repr__(self) -> str:
        return f"Stop(status={self.status:#x}, signal={self.signal}, event={self.event}, exited={self.exited})"


_ENDS = (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED)


def _decode(found: os.waitid_result) -> Stop:
    """A wait status from what waitid(2) tells."""
    if found.si_code not in _ENDS:
        return Stop(found.si_status << 8 | 0x7F)  # with the event, where wait(2) has it
    return Stop(found.si_status << 8 if found.si_code == os.CLD_EXITED else found.si_status)


def _look(tid: int, options: int) -> Stop | None:
    found = os.waitid(os.P_PID, tid, os.WSTOPPED | os.WEXITED | os.WNOWAIT | WALL | options)
    if found is not None and found.si_code not in _ENDS:
        try:
            found = os.waitid(os.P_PID, tid, os.WSTOPPED | os.WNOHANG | WALL)
        except ChildProcessError:  # killed between the two: there is an end to wait for, and nothing else
            return None
    return _decode(found) if found else None


def wait(tid: int) -> Stop:
    """Wait for the next stop (or the end) of one traced task. An end is only looked at: see `reap`.

    ChildProcessError if the task isn't traced by this thread any more, or is gone.
    """
    while (stop := _look(tid, 0)) is None:
        pass
    return stop


def poll(tid: int) -> Stop | None:
    """The next stop, or the end, if there is one already; otherwise as `wait`."""
    return _look(tid, os.WNOHANG)


def has_ended(tid: int) -> bool:
    """Whether a traced task has ended and that is still to be noticed (`reap`). A stop is left as it is."""
    try:
        found = os.waitid(os.P_PID, tid, os.WEXITED | os.WNOHANG | os.WNOWAIT | WALL)
    except ChildProcessError:
        return False
    return found is not None and found.si_code in _ENDS  # without WSTOPPED, too, stops of traced tasks are told


def reap(tid: int) -> None:
    """Take note of the end of a traced task that `has_ended`. Only now its parent is told, and can wait for it.
    If we are the parent ourselves, that was all: its wait status is lost.
    """
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, tid, os.WEXITED | os.WNOHANG | WALL)


def trap_signal(tid: int) -> int:
    """The signal in whose name a task is in a PTRACE_EVENT_STOP: SIGTRAP, or the one that stopped its process.

    ProcessLookupError when it isn't stopped. The stop tells what it was when it began: a SIGCONT since then shows
    only after the task was resumed.
    """
    syscall(NR.ptrace, PTRACE_GETSIGINFO, tid, 0, _buffer)
    return int(struct.unpack_from("<i", _buffer)[0])
