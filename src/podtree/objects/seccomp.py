"""Seccomp mode and filters of a thread (seccomp(2), PTRACE_SECCOMP_GET_FILTER)."""

from __future__ import annotations

import struct

import msgspec

from podtree.kernel import ptrace
from podtree.kernel.sys import NR
from podtree.script.task import Script

MODE_STRICT, MODE_FILTER = 1, 2
SECCOMP_SET_MODE_STRICT, SECCOMP_SET_MODE_FILTER = 0, 1
RET_USER_NOTIF = 0x7FC00000
_BPF_RET_K = 0x06


class Filter(msgspec.Struct, frozen=True):
    """A filter program (array of struct sock_filter) and its SECCOMP_FILTER_FLAG_*."""

    program: bytes
    flags: int


class Seccomp(msgspec.Struct, frozen=True):
    """Mode 0 is off; filters oldest first."""

    mode: int
    filters: tuple[Filter, ...] = ()


def needs_listener(seccomp: Seccomp) -> bool:
    """Whether some filter hands calls to a supervisor process (SECCOMP_RET_USER_NOTIF)."""
    return any(
        code == _BPF_RET_K and k & 0xFFFF0000 == RET_USER_NOTIF
        for f in seccomp.filters
        for code, _jt, _jf, k in struct.iter_unpack("<HBBI", f.program)
    )


def collect(tid: int, status: dict[str, str]) -> Seccomp:
    """Of a stopped thread."""
    mode = int(status.get("Seccomp", "0"))
    filters: list[Filter] = []
    if mode == MODE_FILTER:
        while (program := ptrace.seccomp_filter(tid, len(filters))) is not None:
            filters.append(Filter(program, ptrace.seccomp_flags(tid, len(filters))))
    return Seccomp(mode, tuple(filters))


def restore(seccomp: Seccomp, script: Script) -> None:
    """Add the calls that install the filters; the tracer suspends their effect until it lets go."""
    if seccomp.mode == MODE_STRICT:
        script.add(NR.seccomp, SECCOMP_SET_MODE_STRICT, 0, 0, name="seccomp strict")
    for one in seccomp.filters:
        program = script.put(one.program)
        fprog = script.put(struct.pack("<HxxxxxxQ", len(one.program) // 8, program))
        script.add(NR.seccomp, SECCOMP_SET_MODE_FILTER, one.flags, fprog, name="seccomp filter")
