"""The machine code of the stub (source: arch/x86_64.S) and the layout it agrees on with the tracer.

A test assembles the source and compares. Sizes in bytes.
"""

from __future__ import annotations

import struct

from podtree.kernel.ptrace import Regs
from podtree.kernel.sys import NR

CODE = bytes.fromhex(
    "4d8b374d8d6f404d85f6742b498b4500498b7d08498b7510498b55184d8b5520"
    "4d8b45284d8b4d300f05498945384983c54049ffceebd049c747080100000031"
    "ff31f6498d57104531d24531c0b80f0100000f05488b2525010000fc803d3501"
    "0000007401fdbf02000000488d3516010000ba0000000041ba08000000b80e00"
    "00000f058b0506010000047f9e4c8b3d6c0000004c8b356d0000004c8b2d6e00"
    "00004c8b256f000000488b2d70000000488b1d710000004c8b1d720000004c8b"
    "15730000004c8b0d740000004c8b0575000000488b0576000000488b0d770000"
    "00488b1578000000488b3579000000488b3d7a000000ff257c0000000f1f40"
)
RUN = 0x00  # offset of the entry that walks a table
ONE = 0x52  # offset of a lone `syscall`, followed by the restore path
RESTORE = 0x54  # offset of the restore path
SPIN = 0xF0  # where a jump to itself can be, behind the code
SAVE = 0x100  # offset of the save area
SIZE = 0x1A0  # code and save area

TABLE_HEADER = 64
TABLE_ENTRY = 64
#: How long a finished script waits for its tracer before the task goes on by itself. Long: a tracer that lives but
#: isn't given the CPU for so long would have let a program run with its seccomp filter suspended.
WAIT_SECONDS = 10

# include/linux/errno.h: what a system call that wants restarting leaves in rax
ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516


def save_area(regs: Regs, sigmask: int) -> bytes:
    """The save area for a task with these registers and signal mask, system call restart included."""
    rip, rax = regs.rip, regs.rax
    error = -rax & 0xFFFFFFFFFFFFFFFF
    if regs.orig_rax < 1 << 63:
        if error in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND):
            rip, rax = rip - 2, regs.orig_rax
        elif error == ERESTART_RESTARTBLOCK:
            rip, rax = rip - 2, NR.restart_syscall
    flags = regs.eflags
    overflow = flags >> 11 & 1
    return struct.pack(
        "<20Q",
        *(regs.r15, regs.r14, regs.r13, regs.r12, regs.rbp, regs.rbx, regs.r11, regs.r10, regs.r9, regs.r8),
        *(rax, regs.rcx, regs.rdx, regs.rsi, regs.rdi, rip, regs.rsp, sigmask),
        overflow | (flags & 0xFF) << 8,
        flags >> 10 & 1,
    )


def image(regs: Regs, sigmask: int) -> bytes:
    """Code and save area as they are written into the task."""
    return CODE.ljust(SAVE, b"\0") + save_area(regs, sigmask)


def table(entries: list[tuple[int, ...]]) -> bytes:
    """A script's table: each entry is a system call number and up to six arguments (64-bit values)."""
    header = struct.pack("<4Q32x", len(entries), 0, WAIT_SECONDS, 0)
    mask = 0xFFFFFFFFFFFFFFFF
    body = [struct.pack("<8Q", *(v & mask for v in e), *([0] * (8 - len(e)))) for e in entries]
    return header + b"".join(body)
