"""One process under construction: from a copy of the stem to what it was, all but its last registers."""

from __future__ import annotations

import fcntl
import functools
import os
import resource
import signal
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from podtree.errors import RestoreFailed
from podtree.image.pages import load_map
from podtree.image.verify import SavedPages
from podtree.kernel import fdops, mm, mqueue, procfs, ptrace, userfaultfd
from podtree.kernel.pageruns import Run
from podtree.kernel.pidfd import pidfd_getfd, pidfd_open
from podtree.kernel.sys import NR, PAGE_SIZE
from podtree.objects import aio, memory, processes, scheduling, signals, sysvipc, tables, threads, timers
from podtree.objects.descriptors import Deferred, Fd
from podtree.objects.epoll import OwnWatch
from podtree.objects.memory import Vma, VmaKind
from podtree.objects.processes import Process
from podtree.objects.sysvipc import IpcState
from podtree.objects.tables import Directories
from podtree.objects.threads import Thread
from podtree.restore import pager
from podtree.restore.arena import SIZE, Body
from podtree.restore.nest import Nest
from podtree.restore.pager import Lazy, Piece
from podtree.restore.tree import end_thread
from podtree.script.task import NO_SYSCALL, Remote, Script, check

EPOLL_CTL_ADD = 1
READ_MAX = 1 << 30  # bytes per pread; the kernel's limit is a little below 2 GiB
READ_BYTES_PER_S = 50 << 20  # what the slowest disk is trusted with, for time limits
THREAD_FLAGS = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000  # VM FS FILES SIGHAND THREAD SYSVSEM


@dataclass(slots=True)
class Shared:
    """What all processes of the restore have in common."""

    slot_base: int
    page_slots: dict[str, int]  # page file name -> descriptor in every body
    image_dir_fd: int
    deferred: Deferred
    flags: dict[int, int]  # OpenFile.id -> F_GETFL
    holders: dict[tuple[int, int], int]  # (descriptor, OpenFile.id) -> the first process that has it so
    epoll_holders: dict[int, int]  # OpenFile.id -> the first process that has it at all
    segments: dict[int, int]  # size in bytes of System V shared memory by id
    last_cap: int
    lazily: bool  # large memory may come in when the process runs already
    ipc: IpcState
    nest: Nest
    settled: set[tuple[int, int]]  # (pid, OpenFile.id) of roots and working directories that are in effect already
    clock_offset_ns: int = 0  # the pod's CLOCK_MONOTONIC less ours; set when the pod's clocks are

    def late_ns(self, read_ns: int) -> int:
        """Time that has passed for the pod since `read_ns` of its CLOCK_MONOTONIC, the restore's own included."""
        return max(0, time.monotonic_ns() + self.clock_offset_ns - read_ns)

    def watch_owner(self, own: OwnWatch) -> int:
        """The process that most likely made a registration: it has the watched file at that number."""
        return self.holders.get((own.watch.fd, own.watch.file), self.epoll_holders.get(own.epoll, 1))


@dataclass(frozen=True, slots=True)
class Table:
    """One descriptor table. `id`: the process that owns it, or the thread that has it for itself; `body`: who acts."""

    id: int
    fds: tuple[Fd, ...]
    body: Body


class ProcessRestorer:
    """Brings one process back, step by step; `finish` is the last before it runs.

    `owners`: all processes by pid. What the process shares with another is made by that one, its owner.
    """

    def __init__(self, process: Process, body: Body, shared: Shared, owners: Mapping[int, Process]) -> None:
        self.process = process
        self.tables = process.shared
        self.memory = owners[self.tables.memory].memory if self.tables.memory else process.memory
        self.fds = owners[self.tables.files].fds if self.tables.files else process.fds
        self.body = body
        self.shared = shared
        self.pid = process.place.pid
        self.bodies: list[Body] = [] if process.ended_leader else [body]  # one per thread
        self.later: Lazy | None = None  # memory that is still to come

    def _number(self, pid: int) -> int:
        """What this process calls a process, group or thread that is `pid` in the pod."""
        return self.shared.nest.number(self.pid, pid)

    # --- memory

    def map_memory(self) -> None:
        """Make all mappings and fill in the pages that were saved, but for those that come later (`later`)."""
        if self.tables.memory:
            return
        runs = load_map(self.shared.image_dir_fd, f"mem/{self.process.memory.pages}")
        filled = _filled_vmas(self.process.memory.vmas, runs)
        pieces: list[Piece] = []
        apart = self.shared.nest.is_apart(self.pid)
        if apart:  # without the right to lock memory; the limits it had come later
            _, hard = scheduling.collect_limits(self.body.tid).limits[resource.RLIMIT_MEMLOCK]
            self._limit(resource.RLIMIT_MEMLOCK, (hard, hard))
        # The pager's number would be taken twice in one table; userfaultfd(2) of faults in the kernel wants a right.
        if self.shared.lazily and not self.tables.files and not apart:
            runs, pieces, waiting = pager.split(self.process.memory.vmas, runs)
        for ring in self.process.memory.rings:  # first: the kernel chooses where they are made
            arena = (self.body.arena, self.body.arena + SIZE)
            aio.restore(ring, self.body, memory.free_gap(self.process.memory.vmas, len(ring.data), [arena]))
        script = self.body.script()
        for index, vma in enumerate(self.process.memory.vmas):
            memory.restore_vma(vma, script, self.shared.slot_base, index in filled)
            script = self._flush(script)
        self.body.run(script)
        for parts in memory.attachments(self.process.memory.vmas):
            self._attach(parts)
        self._fill(runs)
        script = self.body.script()
        for index, vma in enumerate(self.process.memory.vmas):
            memory.settle_vma(vma, script, index in filled)
            script = self._flush(script)
        for start, length in self.process.memory.guards:
            script.add(NR.madvise, start, length, memory.MADV_GUARD_INSTALL, name="madvise guard")
            script = self._flush(script)
        self.body.run(script)
        self._lock_memory([v for v in self.process.memory.vmas if v.locked])
        if pieces:
            self.later = self._leave_missing(pieces, waiting)
        self._seal_memory()

    def _seal_memory(self) -> None:
        script = self.body.script()
        for vma in self.process.memory.vmas:
            if vma.sealed:
                what = f"mseal {vma.start:#x}-{vma.end:#x}"
                script.add(NR.mseal, vma.start, vma.end - vma.start, 0, name=what)
                script = self._flush(script)
        self.body.run(script)

    def _lock_memory(self, vmas: list[Vma]) -> None:
        script = self.body.script()
        for vma in vmas:
            memory.lock_vma(vma, script)
            script = self._flush(script)
        if self.process.memory.lock_future:
            script.add(NR.mlockall, self.process.memory.lock_future, name="mlockall of what is to come")
        self.body.run(script)
        if vmas and (left := memory.unlocked(self.body.tid, vmas)):
            raise RestoreFailed(f"process {self.pid}: {left[0].start:#x}-{left[0].end:#x} can't be locked in memory")

    def _leave_missing(self, pieces: list[Piece], vmas: list[Vma]) -> Lazy:
        """Have the pager answer for pages of these mappings."""
        hidden = self.shared.slot_base - 1
        number = self.body.do(NR.userfaultfd, os.O_CLOEXEC | os.O_NONBLOCK)
        pidfd = pidfd_open(self.body.tid)
        try:
            uffd = pidfd_getfd(pidfd, number)
        finally:
            os.close(pidfd)
        self.body.do(NR.dup3, number, hidden, os.O_CLOEXEC)
        self.body.do(NR.close, number)
        userfaultfd.enable_missing(uffd)
        for vma in vmas:
            userfaultfd.register_missing(uffd, vma.start, vma.end)
        return Lazy(uffd, SavedPages(self.shared.image_dir_fd, f"mem/{self.process.memory.pages}"), pieces)

    def _attach(self, parts: list[Vma]) -> None:
        """System V shared memory."""
        size = self.shared.segments.get(parts[0].file)
        if size is None:
            raise RestoreFailed(f"the image has a mapping of segment {parts[0].file}, but not the segment")
        arena = (self.body.arena, self.body.arena + SIZE)
        spare = memory.free_gap(self.process.memory.vmas, size + PAGE_SIZE, [arena])
        script = self.body.script()
        for number, words, name in memory.attachment_calls(parts, size, spare):
            script.add(number, *words, name=name)
            script = self._flush(script)
        self.body.run(script)

    def _flush(self, script: Script, body: Body | None = None) -> Script:
        if not script.full:
            return script
        body = body or self.body
        body.run(script)
        return body.script()

    def _fill(self, runs: list[Run]) -> None:
        """Read the saved pages into place; every byte that was saved must come."""
        slot = self.shared.page_slots[self.process.memory.pages]
        pending: list[tuple[int, int]] = []
        for first, count in runs:
            address, left = first * PAGE_SIZE, count * PAGE_SIZE
            while left:
                size = min(left, READ_MAX)
                pending.append((address, size))
                address, left = address + size, left - size
        for start in range(0, len(pending), 2000):
            batch = pending[start : start + 2000]
            script = self.body.script()
            for address, size in batch:
                script.add(NR.pread64, slot, address, size, address, name=f"read pages at {address:#x}")
            timeout = 60 + sum(size for _, size in batch) / READ_BYTES_PER_S
            results = script.execute(self.body.remote, timeout)
            for (address, size), got in zip(batch, results.values, strict=True):
                if got != size:
                    raise RestoreFailed(f"process {self.pid}: {got} of {size} bytes of pages at {address:#x}")

    # --- what the process shares among its threads

    def set_attributes(self) -> None:
        """Layout, directories, signal actions, timers; all that needs the slots. Needs the memory in place."""
        script = self.body.script()
        base = self.shared.slot_base
        if not self.tables.memory:
            memory.restore_layout(self.process.memory.layout, script, base + self.process.exe)
        if not self.tables.directories:
            own = Directories(cwd=self.process.cwd, root=self.process.root, umask=self.process.umask)
            settled = {file for pid, file in self.shared.settled if pid == self.pid}
            tables.restore_directories(own, script, base, settled)
        late = self.shared.late_ns(self.process.read_ns)
        processes.restore_attributes(self.process, script, late, self._number)
        sysvipc.undo_again(self.shared.ipc, self.pid, script)
        self.body.run(script)
        self._register_watches(self.pid, self.body)
        for thread, body in self._loners():
            script = body.script()
            if thread.directories:
                tables.restore_directories(thread.directories, script, base)
            sysvipc.undo_again(self.shared.ipc, thread.tid, script)
            body.run(script)
            self._register_watches(thread.tid, body)

    def _loners(self) -> Iterator[tuple[Thread, Body]]:
        """The threads that have tables for themselves."""
        for thread, body in zip(self.process.threads, self.bodies, strict=True):
            if thread.own_tables:
                yield thread, body

    def _register_watches(self, holder: int, body: Body) -> None:
        """epoll registrations that wake the process that makes them: this one, if it is their owner."""
        script = body.script()
        base = self.shared.slot_base
        for own in self.shared.deferred.watches:
            if self.shared.watch_owner(own) != holder:
                continue
            watch, what = own.watch, f"epoll registration of descriptor {own.watch.fd}"
            event = script.put(struct.pack("<IQ", watch.events & 0xFFFFFFFF, watch.data & (1 << 64) - 1))
            script.add(NR.dup3, base + watch.file, watch.fd, os.O_CLOEXEC, name=what)
            script.add(NR.epoll_ctl, base + own.epoll, EPOLL_CTL_ADD, watch.fd, event, name=what)
            script.add(NR.close, watch.fd)
            script = self._flush(script, body)
        body.run(script)

    def place_descriptors(self) -> None:
        """When nobody needs the slots any more: the numbers of each table of its own, and what goes with them."""
        if not self.tables.files:
            self._place(Table(self.pid, self.process.fds, self.body))
        for thread, body in self._loners():
            if thread.fds is not None:
                self._place(Table(thread.tid, thread.fds, body))

    def _place(self, table: Table) -> None:
        """Own numbers for all, then owners of I/O signals, and locks last: closing a slot would drop them."""
        script = table.body.script()
        base = self.shared.slot_base
        for fd in table.fds:
            flags = os.O_CLOEXEC if fd.cloexec else 0
            script.add(NR.dup3, base + fd.file, fd.fd, flags, name=f"descriptor {fd.fd}")
            script = self._flush(script, table.body)
        first = base if table.id == self.pid else base - 1  # the pager's number is open in the process, not in copies
        script.add(NR.close_range, first, 0xFFFFFFFF, 0, name="close_range")
        self._set_owners(table, script)
        self._ask_for_notifications(table, script)
        self._take_locks(table, script)
        table.body.run(script)

    def _set_owners(self, table: Table, script: Script) -> None:
        for file, owner in self.shared.deferred.owners:
            if owner.pid != table.id:
                continue
            what = f"I/O signals of descriptor {owner.fd}"
            script.add(NR.fcntl, owner.fd, fdops.F_SETSIG, owner.signal, name=what)
            if owner.id:
                target = script.put(struct.pack("<ii", owner.type, self._number(owner.id)))
                script.add(NR.fcntl, owner.fd, fdops.F_SETOWN_EX, target, name=what)
            if owner.asynchronous:
                flags = self.shared.flags[file]
                script.add(NR.fcntl, owner.fd, fcntl.F_SETFL, flags | os.O_ASYNC, name=what)

    def _ask_for_notifications(self, table: Table, script: Script) -> None:
        numbers = {fd.file: fd.fd for fd in table.fds}
        for file, one in self.shared.deferred.notifications:
            if one.pid != table.id or file not in numbers:
                continue
            signal, value = one.signal, one.value[:8].ljust(8, b"\0")
            if one.method == mqueue.SIGEV_THREAD:
                signal = numbers.get(one.socket, -1)
                cookie = one.cookie[: mqueue.COOKIE_SIZE].ljust(mqueue.COOKIE_SIZE, b"\0")
                value = struct.pack("<Q", script.put(cookie))
            event = script.put(mqueue.notification(value, signal, one.method))
            script.add(NR.mq_notify, numbers[file], event, name=f"mq_notify of descriptor {numbers[file]}")

    def _take_locks(self, table: Table, script: Script) -> None:
        number = {fd.file: fd.fd for fd in table.fds}
        for lock in self.shared.deferred.locks:
            if lock.pid == table.id and lock.file in number:
                length = 0 if lock.end is None else lock.end - lock.start + 1
                kind = fcntl.F_WRLCK if lock.write else fcntl.F_RDLCK
                flock = script.put(struct.pack("<hhxxxxqqi4x", kind, os.SEEK_SET, lock.start, length, 0))
                script.add(NR.fcntl, number[lock.file], fcntl.F_SETLK, flock, name="file lock")

    # --- threads

    def clone_threads(self, bodies: dict[int, Body]) -> None:
        """Create the other threads with their ids, early: timers and descriptors may refer to them.

        A leader that is to have ended makes them all, and is the one that acts for the process until `end_leader`.
        """
        for thread in self.process.threads[len(self.bodies) :]:
            flags = THREAD_FLAGS & ~tables.thread_flags(thread.own_tables)
            child = self.shared.nest.clone_thread(bodies, self.pid, flags, thread)
            self.bodies.append(Body(child, self.body.arena, self.body.family))

    def set_threads(self) -> None:
        """Give every thread but the leader its own state."""
        for thread, body in zip(self.process.threads, self.bodies, strict=True):
            if body is not self.body:
                self._set_thread(thread, body)

    def _set_thread(self, thread: threads.Thread, body: Body) -> None:
        script = body.script()
        if self.process.personality:
            script.add(NR.personality, self.process.personality, name="personality")
        threads.restore(thread, script, self.shared.last_cap, self.shared.nest.seen(self.pid))
        body.run(script)

    def change_semaphores_last(self) -> None:
        """When all have made their adjustments."""
        for who, body in [(self.pid, self.body), *((thread.tid, body) for thread, body in self._loners())]:
            script = body.script()
            sysvipc.changed_last(self.shared.ipc, who, script)
            body.run(script)

    def apply_outside_state(self) -> None:
        """Limits and scheduling, which are set from outside, while the leader is still root: prlimit(2) of a
        process with other ids would need CAP_SYS_RESOURCE."""
        host = self.body.tid
        for thread, body in zip(self.process.threads, self.bodies, strict=True):
            scheduling.restore(thread.scheduling, body.tid)
        if self.process.ended_leader:
            scheduling.restore(self.process.ended_leader.scheduling, host)
        nested = self.shared.nest.is_nested(self.pid)
        scheduling.restore_limits(self.process.limits, host, self._limit if nested else None)

    def _limit(self, number: int, limit: tuple[int, int]) -> None:
        soft, hard = (value & NO_SYSCALL for value in limit)
        self.body.do(NR.prlimit64, 0, number, self.body.put(struct.pack("<QQ", soft, hard)), 0)

    def set_leader(self) -> None:
        """The leader's own state, after all that needs its privileges; process-wide signals and timers."""
        ended = self.process.ended_leader
        if not ended:
            self._set_thread(self.process.threads[0], self.body)
        else:
            script = self.body.script()
            threads.restore_ended(ended, script, self.shared.last_cap)
            self.body.run(script)

    def end_leader(self) -> None:
        """Have the leader end, if it had: from here on another thread acts for the process.

        Only the leader may queue any siginfo for the process (kernel/signal.c, do_rt_sigqueueinfo()), so that comes
        first. Before children of it ask for a signal at their parent's end: that is a thread's (PR_SET_PDEATHSIG).
        """
        ended = self.process.ended_leader
        if not ended:
            return
        script = self.body.script()
        _take_back_sigchld(script)
        signals.restore_pending(list(self.process.pending), script, self.pid, self.pid, shared=True)
        self.body.run(script)
        end_thread(self.body, ended.status)
        self.body = self.bodies[0]

    def set_what_credentials_take_away(self) -> None:
        """Each change of ids takes away the signal that a thread gets at its parent's end, and the dumpable flag."""
        if not self.tables.memory:
            script = self.body.script()
            processes.restore_rules_for_memory(self.process, script)
            self.body.run(script)
        for thread, body in zip(self.process.threads, self.bodies, strict=True):
            if thread.parent_death_signal:
                body.do(NR.prctl, threads.PR_SET_PDEATHSIG, thread.parent_death_signal, 0, 0, 0)

    # --- the end: children before their parents

    def hear_of_children(self, children: list[Process]) -> None:
        """Growing the tree and stopping children has sent SIGCHLDs and left news for wait(2): take them back.

        What really was pending is queued afterwards; where the leader has done so before it ended, a SIGCHLD among
        that can't be told from ours, nor has to be, since there is one at most.
        """
        queued = self.process.ended_leader is not None
        script = self.body.script()
        for child in children:
            if child.stopped_by and child.stop_reported:
                number, how = self._number(child.place.pid), os.WNOHANG | os.WUNTRACED
                script.add(NR.wait4, number, 0, how, 0, name="wait for stopped child")
        if not (queued and any(signals.number_of(info) == signal.SIGCHLD for info in self.process.pending)):
            _take_back_sigchld(script)
        if not queued:
            own = self._number(self.pid)
            signals.restore_pending(list(self.process.pending), script, own, own, shared=True)
        late = self.shared.late_ns(self.process.read_ns)
        timers.restore_interval_timers(self.process.interval_timers, script, late)
        self.body.run(script)
        for thread, body in zip(self.process.threads, self.bodies, strict=True):
            if thread.pending:  # by itself: nobody else may queue what claims to come from tgkill(2)
                script = body.script()
                signals.restore_pending(list(thread.pending), script, own, self._number(thread.tid), shared=False)
                body.run(script)

    def finish(self) -> None:
        """Unmap the arena and set the registers; the process is what it was, and stopped."""
        vdso = next(v for v in self.memory.vmas if v.kind is VmaKind.VDSO)
        for body in self.bodies:
            body.remote.park()
        planted = self._plant_timed_calls()
        if not self.tables.memory:  # else its owner does, which comes later, being further up the tree
            _unmap_arena(self.body, _find_syscall(self.body.tid, vdso))
        if self.process.stopped_by:
            self._stop()
        for thread, body in zip(self.process.threads, self.bodies, strict=True):
            try:
                ptrace.set_xstate(body.tid, thread.xstate)
                ptrace.set_regs(body.tid, threads.resume_regs(thread, planted.get(thread.tid)))
                ptrace.set_sigmask(body.tid, thread.sigmask)
            except OSError as error:
                what = f"the registers of thread {thread.tid} of process {self.pid}"
                raise RestoreFailed(f"{what} can't be set: {error.strerror}") from error

    def _plant_timed_calls(self) -> dict[int, int]:
        """Have threads that were half-way in a relative wait make that wait again, with the time left.

        Interrupted at once, the call leaves in the kernel what restart_syscall(2) will go on with.
        """
        results: dict[int, int] = {}
        if self.process.stopped_by:
            return results  # what stops a process would restart the call too early
        for thread, body in zip(self.process.threads, self.bodies, strict=True):
            call = threads.timed_call(thread, functools.partial(mm.read_memory, body.tid))
            if call is None:
                continue
            args = list(call.args)
            rest = max(0, call.rest_ns - self.shared.late_ns(self.process.read_ns))
            if call.timeout < 0:
                args[2] = -(-rest // 1_000_000)
            else:
                args[call.timeout] = body.put(struct.pack("<qq", *divmod(rest, 1_000_000_000)))
            results[thread.tid] = body.remote.call_interrupted(call.nr, *args)
        return results

    def _stop(self) -> None:
        """Job control's stop: every thread takes part, then it is in effect, and stays so when we let go."""
        os.kill(self.body.tid, signal.SIGSTOP)
        for body in self.bodies:
            ptrace.cont(body.tid)
            while not (stop := ptrace.wait(body.tid)).is_group_stop:
                if stop.exited:
                    raise RestoreFailed(f"process {self.pid} ended while it was being stopped")
                ptrace.cont(body.tid, 0 if stop.event else stop.signal)

    def go(self, traced: set[int]) -> None:
        """Let the process run, but for those of its threads that have another tracer."""
        for body in self.bodies:
            if body.tid not in traced:
                ptrace.detach(body.tid)


def _filled_vmas(vmas: tuple[Vma, ...], runs: list[Run]) -> set[int]:
    """Indexes of the mappings that saved pages belong to; raises RestoreFailed for pages without one."""
    filled: set[int] = set()
    index = 0
    for first, count in runs:
        start, end = first * PAGE_SIZE, (first + count) * PAGE_SIZE
        while start < end:
            while index < len(vmas) and vmas[index].end <= start:
                index += 1
            if index == len(vmas) or vmas[index].start > start:
                raise RestoreFailed(f"the image has pages at {start:#x}, where no mapping is")
            vma = vmas[index]
            if vma.shared or vma.kind in (VmaKind.VDSO, VmaKind.SYSV):
                raise RestoreFailed(f"the image has private pages in a shared mapping at {start:#x}")
            filled.add(index)
            start = min(end, vma.end)
    return filled


def _take_back_sigchld(script: Script) -> None:
    """Add the call that takes a pending SIGCHLD away, if there is one."""
    mask = script.put(struct.pack("<QQQ", 1 << (signal.SIGCHLD - 1), 0, 0))
    script.add(NR.rt_sigtimedwait, mask, 0, mask + 8, 8)


def _find_syscall(tid: int, vdso: Vma) -> int:
    """Address of some `syscall` instruction in the task's new vdso."""
    code = next(e for e in procfs.maps(tid) if e.path == "[vdso]")
    if not vdso.start <= code.start < vdso.end:
        raise RestoreFailed("this kernel laid out the vdso in another way than the checkpoint's")
    at = mm.read_memory(tid, code.start, code.length).find(b"\x0f\x05")
    if at < 0:
        raise RestoreFailed("this kernel's vdso has no system call instruction")
    return code.start + at


def _unmap_arena(body: Body, syscall_address: int) -> None:
    regs = ptrace.get_regs(body.tid)
    regs.rip, regs.rax = syscall_address, int(NR.munmap)
    regs.rdi, regs.rsi = body.arena, SIZE
    regs.orig_rax = (1 << 64) - 1
    ptrace.set_regs(body.tid, regs)
    remote: Remote = body.remote
    remote.step_syscall()
    check(ptrace.get_regs(body.tid).rax, "munmap of the arena")
    ptrace.interrupt(body.tid)
    ptrace.cont(body.tid)
    stop = ptrace.wait(body.tid)
    if not stop.is_interrupt:
        raise RestoreFailed(f"process did not stop at the end of its restore ({stop})")
