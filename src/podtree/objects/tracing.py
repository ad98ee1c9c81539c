"""Who is traced by another task of the pod, and how: a debugger's or strace's side of ptrace(2).

Nobody else can trace such a task meanwhile, so the tracer is made to let go of it and to take it again
(podtree.ties). What it knew of the task has to be true again afterwards: that is this state.
"""

from __future__ import annotations

import enum

import msgspec

DEBUG_REGISTERS = (0, 1, 2, 3, 7)  # addresses, then what they are for: arch/x86/include/asm/debugreg.h


class Mode(enum.StrEnum):
    """What a traced task was doing."""

    RAN = "ran"  # on its own, after PTRACE_CONT
    TO_CALL = "to-call"  # likewise, up to its next system call: PTRACE_SYSCALL
    IN_CALL = "in-call"  # in a system call whose begin its tracer knows of
    STOPPED = "stopped"  # by a signal, before its delivery
    ENTERED = "entered"  # stopped at the begin of a system call
    LEFT = "left"  # stopped at its end


class Tracing(msgspec.Struct, frozen=True, kw_only=True):
    """The tracer is a thread, by its number in the pod. `options` as of PTRACE_SETOPTIONS.

    `seized`: by PTRACE_SEIZE; else by PTRACE_ATTACH or PTRACE_TRACEME. `siginfo`: of who is stopped by a signal.
    `news`: the tracer has not waited for the stop yet. Who is at a call's begin has the registers of before the call.
    `debug`: its debug registers (hardware breakpoints) in the order of DEBUG_REGISTERS.
    """

    tracer: int
    seized: bool
    options: int
    mode: Mode
    siginfo: bytes = b""
    news: bool = False
    debug: tuple[int, ...] = ()
