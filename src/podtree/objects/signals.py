"""Signals: actions, masks, pending siginfo, alternate stacks (sigaction(2), sigaltstack(2), signal(7))."""

from __future__ import annotations

import struct

import msgspec

from podtree.kernel import ptrace
from podtree.kernel.sys import NR
from podtree.script.task import Results, Script

SIGKILL, SIGSTOP, NSIG = 9, 19, 64
ACTION_SIZE = 32  # struct kernel_sigaction: handler, flags, restorer, mask
SS_AUTODISARM, SS_DISABLE, SS_ONSTACK = 1 << 31, 2, 1
SI_TKILL = -6


class AltStack(msgspec.Struct, frozen=True):
    """stack_t: base, flags, size in bytes."""

    base: int
    flags: int
    size: int


class Actions(msgspec.Struct, frozen=True):
    """Signal actions that aren't the default, by signal number, as struct kernel_sigaction."""

    by_signal: dict[int, bytes]


def ask_actions(script: Script) -> list[tuple[int, int]]:
    """Add the calls that read all actions; returns (signal, address) pairs."""
    asked = []
    for number in range(1, NSIG + 1):
        if number not in (SIGKILL, SIGSTOP):
            address = script.space(ACTION_SIZE)
            script.add(NR.rt_sigaction, number, 0, address, 8, name="read signal action")
            asked.append((number, address))
    return asked


def read_actions(asked: list[tuple[int, int]], results: Results) -> Actions:
    """The actions from a finished script."""
    raw = {number: results.bytes_at(address, ACTION_SIZE) for number, address in asked}
    return Actions({n: a for n, a in raw.items() if a != bytes(ACTION_SIZE)})


def restore_actions(actions: Actions, script: Script) -> None:
    """Add the calls that set the actions; a new process starts with all at their default."""
    for number, action in sorted(actions.by_signal.items()):
        script.add(NR.rt_sigaction, number, script.put(action), 0, 8, name=f"set action of signal {number}")


def ask_altstack(script: Script) -> int:
    """Add the call that reads the alternate stack; returns the address."""
    address = script.space(24)
    script.add(NR.sigaltstack, 0, address, name="read alternate stack")
    return address


def read_altstack(address: int, results: Results) -> AltStack:
    """The alternate stack from a finished script."""
    base, flags, size = struct.unpack("<QI4xQ", results.bytes_at(address, 24))
    return AltStack(base, flags, size)


def restore_altstack(stack: AltStack, script: Script) -> None:
    """Add the call that sets the alternate stack (SS_ONSTACK is a state, not a setting)."""
    if stack.flags & SS_DISABLE:
        return
    data = struct.pack("<QIiQ", stack.base, stack.flags & ~SS_ONSTACK & 0xFFFFFFFF, 0, stack.size)
    script.add(NR.sigaltstack, script.put(data), 0, name="set alternate stack")


def number_of(info: bytes) -> int:
    """Which signal a siginfo_t is of."""
    return int(struct.unpack_from("<i", info)[0])


def collect_pending(tid: int, *, shared: bool) -> list[bytes]:
    """Queued siginfo of a stopped thread or its process."""
    return ptrace.pending_siginfo(tid, shared)


def restore_pending(pending: list[bytes], script: Script, pid: int, tid: int, *, shared: bool) -> None:
    """Add the calls that queue signals to oneself, with any siginfo (rt_sigqueueinfo(2)).

    All signals are blocked while this runs.
    """
    for info in pending:
        number = number_of(info)
        address = script.put(info)
        if shared:
            script.add(NR.rt_sigqueueinfo, pid, number, address, name=f"queue signal {number}")
        else:
            script.add(NR.rt_tgsigqueueinfo, pid, tid, number, address, name=f"queue signal {number}")
