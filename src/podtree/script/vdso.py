"""The vdso: the one piece of code that every task has, and the room in it for the stub (vdso(7))."""

from __future__ import annotations

import functools
import hashlib
import os

from podtree.kernel import mm, procfs, ptrace
from podtree.kernel.sys import PAGE_SIZE
from podtree.script import stub

STUB_STRIDE = (stub.SIZE + 63) & -64
_P_FILESZ = 64 + 32  # in the ELF header's first program header, elf(5)


@functools.cache
def _own() -> tuple[bytes, int]:
    entry = next(e for e in procfs.maps(os.getpid()) if e.path == "[vdso]")
    return mm.read_memory(os.getpid(), entry.start, entry.length), entry.length


@functools.cache
def stub_offset() -> int:
    """Where in the vdso there is room for two stubs: behind what its ELF header says is loaded."""
    code, length = _own()
    load_size = int.from_bytes(code[_P_FILESZ : _P_FILESZ + 8], "little")
    offset = (load_size + 63) & -64
    if offset + 2 * STUB_STRIDE > length:
        raise OSError("the vdso of this kernel leaves no room for two stubs")
    return offset


@functools.cache
def digest() -> str:
    """Identifies this kernel's vdso: a program may be stopped inside it."""
    return hashlib.blake2b(_own()[0], digest_size=16).hexdigest()


def leave_stub(tid: int) -> bool:
    """If a tracer that is gone left this stopped task in the stub, send it home; True if so.

    The save area is still valid, so the restore path can be started over from any point. The caller
    lets the task run and stops it again later.
    """
    regs = ptrace.get_regs(tid)
    page, first = regs.rip & -PAGE_SIZE, stub_offset() % PAGE_SIZE
    for start in (page + first, page + first + STUB_STRIDE):
        if start <= regs.rip < start + stub.SAVE and _is_stub(tid, start):
            regs.rip = start + stub.RESTORE
            regs.orig_rax = (1 << 64) - 1
            ptrace.set_regs(tid, regs)
            return True
    return False


def _is_stub(tid: int, address: int) -> bool:
    try:
        return mm.read_memory(tid, address, len(stub.CODE)) == stub.CODE
    except OSError:
        return False
