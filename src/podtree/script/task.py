"""Scripts: making a traced task run system calls on itself, at native speed, and undoing it.

A `Remote` is a scope in which one stopped task is disturbed. The stub (stub.py) lies in a place
that the task never executes; it restores the task by itself should the tracer die at any
instruction. Within the scope single calls and whole tables of calls can be run; leaving it puts
registers and signal mask back.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
import time
from types import TracebackType
from typing import Self

from podtree.errors import PodtreeError
from podtree.kernel import mm, ptrace
from podtree.kernel.ptrace import ALL_SIGNALS, Regs, Stop
from podtree.kernel.sys import NR, PAGE_SIZE
from podtree.script import stub

NO_SYSCALL = 0xFFFFFFFFFFFFFFFF  # orig_rax of a task that isn't in a system call
MAX_ERRNO = 4095


class TaskLost(PodtreeError):
    """The task ended (or got away from its tracer) in the middle of a script."""


def poke(tid: int, address: int, data: bytes) -> None:
    """Write into a traced task whatever the page's protection (a private copy is made of the page)."""
    fd = os.open(f"/proc/{tid}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.pwrite(fd, data, address) != len(data):
            raise OSError(errno.EFAULT, f"cannot write {len(data)} bytes at {address:#x} of task {tid}")
    finally:
        os.close(fd)


def check(result: int, what: str) -> int:
    """A raw system call result as a non-negative value, or OSError."""
    if result > NO_SYSCALL - MAX_ERRNO:
        code = NO_SYSCALL - result + 1
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


class Remote:
    """One stopped, traced task that acts for us. Use as a context manager.

    `stub_address` is where the stub goes (stub.SIZE bytes, executable). The task must be in a
    PTRACE_EVENT_STOP (or be newborn). On a clean exit it is in a PTRACE_EVENT_STOP again, with the
    registers and the signal mask it had.
    """

    def __init__(self, tid: int, stub_address: int, *, keep: bool = False) -> None:
        self.tid = tid
        self.stub = stub_address
        self.keep = keep  # don't put anything back (a task under construction)
        self.born: list[int] = []  # host ids of tasks that this one created in its last calls
        self.regs: Regs = ptrace.get_regs(tid)
        self.sigmask = ptrace.get_sigmask(tid)

    def __enter__(self) -> Self:
        poke(self.tid, self.stub, stub.image(self.regs, self.sigmask))
        self._enter(stub.RESTORE)
        ptrace.set_sigmask(self.tid, ALL_SIGNALS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.keep or isinstance(error, TaskLost):
            return
        self.park()
        self._enter(stub.RESTORE)
        ptrace.set_sigmask(self.tid, self.sigmask)
        ptrace.set_regs(self.tid, self.regs)

    def _enter(self, offset: int, **registers: int) -> None:
        regs = self.regs.copy()
        regs.orig_rax = NO_SYSCALL
        regs.rip = self.stub + offset
        for name, value in registers.items():
            setattr(regs, name, value & NO_SYSCALL)
        ptrace.set_regs(self.tid, regs)

    def call(self, nr: int, *args: int) -> int:
        """Run one system call; returns its raw result (negative errno as a 64-bit value)."""
        names = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
        self._enter(stub.ONE, rax=nr, **dict(zip(names, args + (0,) * (6 - len(args)), strict=True)))
        self.step_syscall()
        return ptrace.get_regs(self.tid).rax

    def leave_by(self, nr: NR, *args: int) -> None:
        """Let the task go into a system call from which it doesn't return. It isn't traced any more."""
        names = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
        self._enter(stub.ONE, rax=nr, **dict(zip(names, args, strict=False)))
        ptrace.detach(self.tid)

    def step_syscall(self) -> None:
        """Run the system call that the registers are set up for; stops at its exit."""
        for _ in range(2):
            ptrace.resume_to_syscall(self.tid)
            self._expect_syscall()

    def do(self, nr: NR, *args: int) -> int:
        """Run one system call; returns its result or raises OSError."""
        return check(self.call(nr, *args), nr.name)

    def call_interrupted(self, nr: int, *args: int) -> int:
        """Enter a blocking system call and be interrupted in it at once; returns its raw result.

        The kernel keeps what it needs to restart it (-ERESTART_RESTARTBLOCK); the task is stopped as
        after a PTRACE_INTERRUPT.
        """
        names = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
        self._enter(stub.ONE, rax=nr, **dict(zip(names, args, strict=True)))
        ptrace.resume_to_syscall(self.tid)
        self._expect_syscall()
        ptrace.interrupt(self.tid)
        ptrace.cont(self.tid)
        while not (stop := ptrace.wait(self.tid)).is_interrupt:
            self._lost_unless_stop(stop)
            ptrace.cont(self.tid)
        return ptrace.get_regs(self.tid).rax

    def _expect_syscall(self) -> None:
        while True:
            stop = ptrace.wait(self.tid)
            if stop.is_syscall:
                return
            self._lost_unless_stop(stop)
            if stop.event in (ptrace.PTRACE_EVENT_FORK, ptrace.PTRACE_EVENT_VFORK, ptrace.PTRACE_EVENT_CLONE):
                self.born.append(ptrace.event_message(self.tid))
            ptrace.resume_to_syscall(self.tid)

    def _lost_unless_stop(self, stop: Stop) -> None:
        if stop.exited:
            raise TaskLost(f"task {self.tid} ended inside a script ({stop})")
        if stop.signal in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL) and stop.event == 0:
            regs = ptrace.get_regs(self.tid)
            raise TaskLost(f"task {self.tid} faulted inside a script at {regs.rip:#x} (signal {stop.signal})")

    def park(self) -> None:
        """Bring the task from any ptrace stop to a PTRACE_EVENT_STOP without running its code.

        Only there does the kernel do its own restart of an interrupted system call on resume.
        """
        self._enter(stub.RESTORE)
        ptrace.interrupt(self.tid)
        ptrace.cont(self.tid)
        while not (stop := ptrace.wait(self.tid)).is_interrupt:
            self._lost_unless_stop(stop)
            ptrace.cont(self.tid)

    def run(self, table_address: int, calls: list[tuple[int, ...]], timeout_s: float = 60.0) -> list[int]:
        """Run a table of (number, arguments...) at native speed; returns the raw results.

        `table_address` is writable memory of the task with room for the table.
        Raises TaskLost if the task ends, or restored itself because we were too slow.
        """
        if not calls:
            return []
        table = stub.table(calls)
        mm.write_memory(self.tid, table_address, table)
        self._enter(stub.RUN, r15=table_address)
        ptrace.cont(self.tid)
        self._await_done(table_address, timeout_s)
        ptrace.interrupt(self.tid)
        while not (stop := ptrace.wait(self.tid)).is_interrupt:
            self._lost_unless_stop(stop)
            ptrace.cont(self.tid)
        regs = ptrace.get_regs(self.tid)
        if not self.stub <= regs.rip < self.stub + stub.SAVE:
            raise TaskLost(f"task {self.tid} went on by itself: this machine is too busy")
        raw = mm.read_memory(self.tid, table_address + stub.TABLE_HEADER, len(calls) * stub.TABLE_ENTRY)
        return [entry[7] for entry in struct.iter_unpack("<8Q", raw)]

    def _await_done(self, table_address: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        spins = 0
        while True:
            try:
                if mm.read_memory(self.tid, table_address + 8, 8) != b"\0" * 8:
                    return
            except OSError as error:
                raise TaskLost(f"task {self.tid} is gone: {error}") from error
            spins += 1
            if spins < 200:
                continue
            stop = ptrace.poll(self.tid)
            if stop is not None:
                self._lost_unless_stop(stop)
                ptrace.cont(self.tid)
            if time.monotonic() > deadline:
                raise TaskLost(f"task {self.tid} did not finish a script in {timeout_s} s")
            time.sleep(0.00005 if spins < 2000 else 0.002)


class Scratch:
    """A writable area in the task for tables and results, mapped for the duration of a scope."""

    def __init__(self, remote: Remote, size: int) -> None:
        self.remote = remote
        self.size = (size + PAGE_SIZE - 1) & -PAGE_SIZE
        self.address = 0

    def __enter__(self) -> Self:
        flags = mm.MAP_PRIVATE | mm.MAP_ANONYMOUS
        self.address = self.remote.do(
            NR.mmap, 0, self.size, mm.PROT_READ | mm.PROT_WRITE, flags, NO_SYSCALL, 0
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, TaskLost):
            self.remote.do(NR.munmap, self.address, self.size)


class Script:
    """Composes a table of system calls together with the data that they point to.

    The area at `base` in the task holds the table (room for `capacity` calls) and then the data.
    """

    def __init__(self, base: int, size: int, capacity: int = 256) -> None:
        self.base = base
        self.size = size
        self.capacity = capacity
        self._data_start = base + stub.TABLE_HEADER + capacity * stub.TABLE_ENTRY
        self._data = bytearray()
        self._calls: list[tuple[int, ...]] = []
        self._names: list[str] = []

    def put(self, data: bytes) -> int:
        """Place bytes in the area; returns their address in the task (8-aligned)."""
        address = self._data_start + len(self._data)
        self._data += data + b"\0" * (-len(data) % 8)
        if address + len(data) > self.base + self.size:
            raise ValueError("script data does not fit its area")
        return address

    def space(self, size: int) -> int:
        """Room for a result of `size` bytes; returns its address."""
        return self.put(bytes(size))

    def add(self, nr: int, *args: int, name: str = "") -> int:
        """Append a call; returns its index. With `name`, its failure is an error that says so."""
        if len(self._calls) >= self.capacity:
            raise ValueError("too many calls for one script")
        self._calls.append((nr, *args))
        self._names.append(name)
        return len(self._calls) - 1

    @property
    def full(self) -> bool:
        """Little room left: time to execute and start the next script."""
        used = len(self._data) + (self._data_start - self.base)
        return len(self._calls) >= self.capacity - 16 or used > self.size - 4096

    def execute(self, remote: Remote, timeout_s: float = 60.0) -> Results:
        """Run the calls in `remote`. Raises OSError naming the first named call that failed."""
        if self._data:
            mm.write_memory(remote.tid, self._data_start, bytes(self._data))
        values = remote.run(self.base, self._calls, timeout_s)
        for value, name, call in zip(values, self._names, self._calls, strict=True):
            if name and value > NO_SYSCALL - MAX_ERRNO:
                arguments = ", ".join(f"{a & NO_SYSCALL:#x}" for a in call[1:])
                check(value, f"{name} ({NR(call[0]).name}({arguments}))")
        data = mm.read_memory(remote.tid, self._data_start, len(self._data)) if self._data else b""
        return Results(values, self._data_start, data)


class Results:
    """What a script brought back: raw results by index, bytes by address."""

    def __init__(self, values: list[int], data_start: int, data: bytes) -> None:
        self.values = values
        self._start = data_start
        self._data = data

    def ok(self, index: int) -> bool:
        """Whether the call succeeded."""
        return self.values[index] <= NO_SYSCALL - MAX_ERRNO

    def bytes_at(self, address: int, size: int) -> bytes:
        """Data of the area after the run."""
        offset = address - self._start
        return self._data[offset : offset + size]

    def u64(self, address: int) -> int:
        """One 64-bit value of the area after the run."""
        return int(struct.unpack_from("<Q", self._data, address - self._start)[0])

    def i32(self, address: int) -> int:
        """One signed 32-bit value of the area after the run."""
        return int(struct.unpack_from("<i", self._data, address - self._start)[0])
