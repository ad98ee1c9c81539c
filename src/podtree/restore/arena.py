"""The arena: an area in a task under construction that holds the stub, a script's table and its data.

All processes of a pod use the same address, free in each of them, so that children made by fork have
it already. It is unmapped at the very end, by a system call instruction of the task's own vdso.
"""

from __future__ import annotations

import struct

from podtree.errors import RestoreFailed
from podtree.kernel import mm, ptrace
from podtree.kernel.sys import NR, PAGE_SIZE
from podtree.script.task import NO_SYSCALL, Remote, Script

STUB_PAGE = PAGE_SIZE
SIZE = 2 << 20
CAPACITY = 4096
CLONE_ARGS = struct.Struct("<11Q")  # struct clone_args, linux/sched.h


def stem_elf(address: int) -> bytes:
    """A program of one page that never runs: the tracer takes over at its first instruction.

    It is linked at `address`. Static ELF64, one executable segment.
    """
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, address + 0x80, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, address, address, PAGE_SIZE, PAGE_SIZE, PAGE_SIZE)
    code = b"\xeb\xfe"  # jmp to itself
    return (header + segment).ljust(0x80, b"\0") + code.ljust(PAGE_SIZE - 0x80, b"\0")


class Body:
    """One task under construction: acts through the arena."""

    def __init__(self, tid: int, arena: int, family: list[int]) -> None:
        self.tid = tid
        self.arena = arena
        self.family = family  # host tids of all that descend from one stem; the tracer has to reap them
        self.remote = Remote(tid, arena, keep=True).__enter__()

    def script(self) -> Script:
        """An empty script in this task's arena."""
        return Script(self.arena + STUB_PAGE, SIZE - STUB_PAGE, CAPACITY)

    def run(self, script: Script, timeout_s: float = 60.0) -> None:
        """Execute a script; any failure of a named call is the end of the restore."""
        try:
            script.execute(self.remote, timeout_s)
        except OSError as error:
            raise RestoreFailed(f"restoring task {self.tid}: {error.strerror or error}") from error

    def do(self, nr: NR, *args: int) -> int:
        """One system call; returns its result. Raises RestoreFailed."""
        try:
            return self.remote.do(nr, *args)
        except OSError as error:
            raise RestoreFailed(f"restoring task {self.tid}: {error.strerror or error}") from error

    def put(self, data: bytes) -> int:
        """Place bytes at the start of the arena's data area; returns their address."""
        address = self.arena + STUB_PAGE
        mm.write_memory(self.tid, address, data)
        return address

    def clone(self, flags: int, exit_signal: int, pid: int) -> int:
        """clone3(2) with the pid that the child shall have; returns its host tid. It is traced and stopped."""
        return self.clone_numbered(flags, exit_signal, (pid,))

    def clone_numbered(self, flags: int, exit_signal: int, pids: tuple[int, ...]) -> int:
        """Likewise with a pid for each of the innermost pid namespaces, innermost first; the kernel chooses others."""
        place = self.put(struct.pack("<4i", *(*pids, 0, 0, 0, 0)[:4]))
        args = CLONE_ARGS.pack(flags, 0, 0, 0, exit_signal, 0, 0, 0, place if pids else 0, len(pids), 0)
        mm.write_memory(self.tid, place + 16, args)
        self.do(NR.clone3, place + 16, len(args))
        child = self.remote.born.pop()
        self.family.append(child)
        stop = ptrace.wait(child)
        if not stop.is_interrupt:
            raise RestoreFailed(f"new task {pids} did not stop as expected ({stop})")
        return child


def enter_arena(tid: int, stem: int, arena: int, family: list[int]) -> Body:
    """Turn a freshly executed stem into a body: map the arena, move there, drop everything else."""
    with_stem = Remote(tid, stem, keep=True).__enter__()
    prot = mm.PROT_READ | mm.PROT_WRITE | mm.PROT_EXEC
    flags = mm.MAP_PRIVATE | mm.MAP_ANONYMOUS | mm.MAP_FIXED_NOREPLACE
    with_stem.do(NR.mmap, arena, SIZE, prot, flags, NO_SYSCALL, 0)
    body = Body(tid, arena, family)
    body.do(NR.munmap, PAGE_SIZE, arena - PAGE_SIZE)
    body.do(NR.munmap, arena + SIZE, mm.TASK_SIZE - arena - SIZE)
    return body
