"""System V IPC of the pod's IPC namespace: shared memory, semaphores, message queues.

Source: sysvipc(7), shmctl(2), semctl(2), msgrcv(2), msgctl(2), ipc_namespaces(7);
Documentation/admin-guide/sysctl/kernel.rst (shm_next_id and its like); ipc/{shm,sem,msg,util}.c (Linux 6.18).

Joining an IPC namespace concerns only the calling thread (setns(2)), so the supervisor looks by itself.
Ids come back exactly. Times of last use and the pids of last senders and attachers begin anew. What a process is
to undo at its end (SEM_UNDO) no call tells; it is read in kernel memory, and each process does it again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from typing import TypeVar

import msgspec

from podtree.errors import Damaged, RestoreFailed
from podtree.kernel import kcmp, procfs
from podtree.kernel.fdops import proc_fd
from podtree.kernel.kmem import KernelMemory
from podtree.kernel.pidfd import pidfd_open_any
from podtree.kernel.sys import NR, PAGE_SIZE, syscall
from podtree.objects import contents as contents_module
from podtree.objects import insight, memory
from podtree.objects.contents import Contents
from podtree.objects.context import CollectContext, FrozenProcess, RestoreContext
from podtree.objects.impersonate import Credentials, ask_inside, pids_available, run_as
from podtree.script.task import Script

CLONE_NEWIPC = 0x08000000
IPC_CREAT, IPC_EXCL, IPC_NOWAIT = 0o1000, 0o2000, 0o4000
IPC_RMID, IPC_SET, IPC_STAT = 0, 1, 2
SHM_RDONLY = 0o10000
SHM_LOCK = 11
SHM_DEST, SHM_LOCKED = 0o1000, 0o2000  # in the mode that the kernel reports
GETPID, GETALL, SETVAL, SETALL = 11, 13, 16, 17
SEMVMX = 32767
SEM_UNDO = 0x1000
MSG_NOERROR, MSG_COPY = 0o10000, 0o40000

_PERM = struct.Struct("=iIIIIIH2x4x16x")  # ipc64_perm: key, uid, gid, cuid, cgid, mode, seq
_SHM_SIZE, _SEM_SIZE, _MSG_SIZE = 112, 104, 120  # shmid64_ds, semid64_ds, msqid64_ds
_QBYTES = 48 + 24 + 16  # of msg_qbytes in msqid64_ds


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """A shared memory segment. Its bytes are here, or under `contents_key` in the image's memory contents."""

    id: int
    key: int
    size: int
    mode: int
    uid: int
    gid: int
    creator: Credentials
    doomed: bool = False  # IPC_RMID was called; it goes when the last process detaches
    locked: bool = False
    data: bytes = b""
    contents_key: str = ""


class SemaphoreSet(msgspec.Struct, frozen=True, kw_only=True):
    """Semaphores: their values, and the pids (inside the pod) that last changed them."""

    id: int
    key: int
    mode: int
    uid: int
    gid: int
    creator: Credentials
    values: tuple[int, ...]
    pids: tuple[int, ...]
    used: bool  # sem_otime isn't 0: programs take that for "initialised"


class Undo(msgspec.Struct, frozen=True):
    """What the end of a process adds to the semaphores of a set (SEM_UNDO), by number."""

    pid: int  # inside the pod; threads share it; the id of a thread that has it for itself
    id: int  # semid
    adjustments: tuple[int, ...]


class Message(msgspec.Struct, frozen=True):
    """One message of a queue."""

    type: int
    data: bytes


class MessageQueue(msgspec.Struct, frozen=True, kw_only=True):
    """A message queue, first message first."""

    id: int
    key: int
    mode: int
    uid: int
    gid: int
    creator: Credentials
    qbytes: int
    messages: tuple[Message, ...] = ()


class IpcState(msgspec.Struct, frozen=True):
    """All of a namespace."""

    segments: tuple[Segment, ...] = ()
    semaphores: tuple[SemaphoreSet, ...] = ()
    queues: tuple[MessageQueue, ...] = ()
    undo: tuple[Undo, ...] = ()


@contextlib.contextmanager
def _joined(host_pid: int) -> Iterator[None]:
    """This thread is in the IPC namespace of a process."""
    home = os.open("/proc/thread-self/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(f"/proc/{host_pid}/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)
        try:
            syscall(NR.setns, there, CLONE_NEWIPC)
        finally:
            os.close(there)
        try:
            yield
        finally:
            syscall(NR.setns, home, CLONE_NEWIPC)
    finally:
        os.close(home)


def _table(name: str) -> list[dict[str, int]]:
    """/proc/sysvipc/NAME: one dictionary a row; "perms" is octal. Shows the reader's namespace."""
    head, *lines = procfs.read_text(f"/proc/sysvipc/{name}").splitlines()
    columns = head.split()
    bases = [8 if column == "perms" else 10 for column in columns]
    return [
        {column: int(word, base) for column, word, base in zip(columns, line.split(), bases, strict=True)}
        for line in lines
    ]


# --- collect -----------------------------------------------------------------------------------------


def collect(ctx: CollectContext, contents: Contents | None = None) -> IpcState:
    """Everything in the pod's IPC namespace.

    With `contents`, the bytes of shared memory go there (saved by what changed); else they are in the state.
    """
    init = next((process for process in ctx.processes if process.pid == 1), ctx.processes[0])
    with _joined(init.living):
        tables = {name: _table(name) for name in ("shm", "sem", "msg")}
        if not any(tables.values()):
            return IpcState()
        pids = {process.host_pid: process.pid for process in ctx.processes}
        semaphores = tuple(_collect_semaphores(row) for row in tables["sem"])
        semaphores = _with_pids(semaphores, init.living)
        return IpcState(
            tuple(state for row in tables["shm"] if (state := _collect_segment(row, ctx, contents, pids))),
            semaphores,
            tuple(_collect_queue(row) for row in tables["msg"]),
            tuple(_collect_undo(semaphores, ctx)) if semaphores else (),
        )


def _collect_segment(
    row: dict[str, int], ctx: CollectContext, contents: Contents | None, pids: dict[int, int]
) -> Segment | None:
    number, size = row["shmid"], row["size"]
    with _segment_file(number, size, ctx.processes) as fd:
        if os.fstat(fd).st_blksize > PAGE_SIZE:
            ctx.refuse(None, f"System V segment {number}", "is made of huge pages")
            return None
        key = f"sysv-{number}" if contents is not None else ""
        if contents is not None and not ctx.dry_run:
            contents.capture(key, fd)
        data = b"" if contents is not None else os.pread(fd, size, 0)
    return Segment(
        id=number,
        key=_signed(row["key"]),
        size=size,
        mode=row["perms"] & 0o777,
        uid=row["uid"],
        gid=row["gid"],
        creator=Credentials(pids.get(row["cpid"], 0), row["cuid"], row["cgid"]),
        doomed=bool(row["perms"] & SHM_DEST),
        locked=bool(row["perms"] & SHM_LOCKED),
        data=data,
        contents_key=key,
    )


def _signed(key: int) -> int:
    """/proc shows keys as signed numbers; be it otherwise, the same key_t."""
    return key - (1 << 32) if key > 0x7FFFFFFF else key


@contextlib.contextmanager
def _segment_file(number: int, size: int, processes: list[FrozenProcess]) -> Iterator[int]:
    """The file behind a segment: by somebody's mapping of it; attached for the moment if nobody has one."""
    for process in processes:
        for entry in [] if process.zombie else procfs.maps(process.living):
            if entry.inode == number and memory.is_attached_segment(entry):
                fd = os.open(
                    f"/proc/{process.living}/map_files/{entry.start:x}-{entry.end:x}", os.O_RDONLY | os.O_CLOEXEC
                )
                try:
                    yield fd
                finally:
                    os.close(fd)
                return
    with _attached(number, size, SHM_RDONLY) as fd:
        yield fd


@contextlib.contextmanager
def _attached(number: int, size: int, flags: int) -> Iterator[int]:
    """A descriptor for the segment, which is attached to this process meanwhile."""
    address = syscall(NR.shmat, number, 0, flags)
    try:
        end = address + (size + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE
        access = os.O_RDONLY if flags & SHM_RDONLY else os.O_RDWR
        fd = os.open(f"self/map_files/{address:x}-{end:x}", access | os.O_CLOEXEC, dir_fd=proc_fd())
        try:
            yield fd
        finally:
            os.close(fd)
    finally:
        syscall(NR.shmdt, address)


def _collect_semaphores(row: dict[str, int]) -> SemaphoreSet:
    """`pids` are still missing."""
    number, count = row["semid"], row["nsems"]
    raw = ctypes.create_string_buffer(2 * count)
    syscall(NR.semctl, number, 0, GETALL, raw)
    return SemaphoreSet(
        id=number,
        key=_signed(row["key"]),
        mode=row["perms"] & 0o777,
        uid=row["uid"],
        gid=row["gid"],
        creator=Credentials(0, row["cuid"], row["cgid"]),
        values=struct.unpack(f"={count}H", raw.raw),
        pids=(0,) * count,
        used=row["otime"] != 0,
    )


def _with_pids(sets: tuple[SemaphoreSet, ...], init_host_pid: int) -> tuple[SemaphoreSet, ...]:
    """With who changed each semaphore last, also those that have ended: only the pod is told their numbers."""
    everything = [(one.id, index) for one in sets for index in range(len(one.values))]
    if not any(syscall(NR.semctl, number, index, GETPID) for number, index in everything):
        return sets

    def ask() -> bytes:
        return b"".join(struct.pack("=i", syscall(NR.semctl, *one, GETPID)) for one in everything)

    pids = iter(struct.unpack(f"={len(everything)}i", ask_inside(init_host_pid, ask)))
    return tuple(msgspec.structs.replace(one, pids=tuple(next(pids) for _ in one.values)) for one in sets)


def _collect_undo(sets: tuple[SemaphoreSet, ...], ctx: CollectContext) -> Iterator[Undo]:
    """Of all processes, and threads with a list for themselves."""
    for process in ctx.processes:
        if process.zombie or ctx.sharing.of(process.pid).undo:
            continue
        own = [(t.inner_tid, t.tid) for t in process.tasks if "undo" in ctx.sharing.own.get(t.inner_tid, ())]
        for holder, tid in [(process.pid, process.living), *own]:
            if not kcmp.has_undo_list(tid):
                continue
            memory = insight.memory()
            if memory is None:
                reason = "may have adjustments pending (SEM_UNDO), which no call tells"
                ctx.refuse(process, "System V semaphores", reason, insight.why_not())
                continue
            for number, adjustments in _read_undo(memory, tid, {state.id: len(state.values) for state in sets}):
                if any(adjustments):
                    yield Undo(holder, number, adjustments)


def _read_undo(
    memory: KernelMemory, tid: int, sizes: dict[int, int]
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(semid, adjustments) of a thread; `sizes`: how many semaphores each set has. ipc/sem.c, struct sem_undo."""
    pidfd = pidfd_open_any(tid)
    try:
        undo_list = memory.task(pidfd).pointer("sysvsem.undo_list")
    finally:
        os.close(pidfd)
    if not undo_list:
        return
    head = memory.view("sem_undo_list", undo_list)
    for undo in memory.each(head.at("list_proc"), "sem_undo", "list_proc"):
        number = undo.signed("semid")
        if number in sizes:  # -1: the set has been removed
            flexible = not memory.btf.member("sem_undo", "semadj").size  # in older kernels a pointer
            start = undo.at("semadj") if flexible else undo.pointer("semadj")
            yield number, struct.unpack(f"={sizes[number]}h", memory.read(start, 2 * sizes[number]))


def _collect_queue(row: dict[str, int]) -> MessageQueue:
    number = row["msqid"]
    buffer = ctypes.create_string_buffer(8 + max(row["cbytes"], 1))
    messages = []
    for index in range(row["qnum"]):
        size = syscall(NR.msgrcv, number, buffer, row["cbytes"], index, MSG_COPY | IPC_NOWAIT | MSG_NOERROR)
        messages.append(Message(int.from_bytes(buffer.raw[:8], "little", signed=True), buffer.raw[8 : 8 + size]))
    status = ctypes.create_string_buffer(_MSG_SIZE)
    syscall(NR.msgctl, number, IPC_STAT, status)
    return MessageQueue(
        id=number,
        key=_signed(row["key"]),
        mode=row["perms"] & 0o777,
        uid=row["uid"],
        gid=row["gid"],
        creator=Credentials(0, row["cuid"], row["cgid"]),
        qbytes=int.from_bytes(status.raw[_QBYTES : _QBYTES + 8], "little"),
        messages=tuple(messages),
    )


# --- restore -----------------------------------------------------------------------------------------

_T = TypeVar("_T", Segment, SemaphoreSet, MessageQueue)


def restore(state: IpcState, ctx: RestoreContext) -> None:
    """Make everything again with the same ids; the caller is in the pod's new, empty IPC namespace, as root.

    A segment that was to be removed with its last user (`doomed`) stays until settle().
    """
    _restore_all("shm", state.segments, lambda segment: _restore_segment(segment, ctx))
    _restore_all("sem", state.semaphores, _restore_semaphores)
    _restore_all("msg", state.queues, _restore_queue)


def _restore_all(kind: str, states: tuple[_T, ...], one: Callable[[_T], None]) -> None:
    for state in states:
        try:
            one(state)
        except (OSError, OverflowError, struct.error, ctypes.ArgumentError) as error:
            raise RestoreFailed(f"System V object {kind} {state.id}: {error}") from error


def _make(kind: str, state: Segment | SemaphoreSet | MessageQueue, call: Callable[[], int]) -> None:
    """Create the object under its old id (kernel.KIND_next_id), as its creator."""
    fd = os.open(f"sys/kernel/{kind}_next_id", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc_fd())
    try:
        os.write(fd, str(state.id).encode())
    finally:
        os.close(fd)
    (number,) = run_as(state.creator, lambda: [call()])
    if number != state.id:
        raise RestoreFailed(f"System V object {kind} {state.id} came out as {number}")


def _set(nr: NR, state: Segment | SemaphoreSet | MessageQueue, size: int, *between: int, qbytes: int = 0) -> None:
    """IPC_SET: owner and mode."""
    raw = bytearray(size)
    _PERM.pack_into(raw, 0, state.key, state.uid, state.gid, 0, 0, state.mode, 0)
    if qbytes:
        struct.pack_into("=Q", raw, _QBYTES, qbytes)
    syscall(nr, state.id, *between, IPC_SET, raw)


def _restore_segment(segment: Segment, ctx: RestoreContext) -> None:
    if not 0 < segment.size < 1 << 47 or len(segment.data) not in (0, segment.size):
        raise Damaged(f"System V segment {segment.id} of {segment.size} bytes")
    flags = IPC_CREAT | IPC_EXCL | segment.mode & 0o777
    _make("shm", segment, lambda: syscall(NR.shmget, segment.key, segment.size, flags))
    with _attached(segment.id, segment.size, 0) as fd:
        if segment.contents_key:
            contents_module.restore(ctx.image_dir_fd, segment.contents_key, fd, segment.size)
        else:
            contents_module.write_all(fd, segment.data, 0)
    _set(NR.shmctl, segment, _SHM_SIZE)
    if segment.locked:
        syscall(NR.shmctl, segment.id, SHM_LOCK, None)


def _restore_semaphores(state: SemaphoreSet) -> None:
    count = len(state.values)
    if not count or len(state.pids) != count or max(state.values) > SEMVMX:
        raise Damaged(f"System V semaphores {state.id}")
    flags = IPC_CREAT | IPC_EXCL | state.mode & 0o777
    _make("sem", state, lambda: syscall(NR.semget, state.key, count, flags))
    syscall(NR.semctl, state.id, 0, SETALL, struct.pack(f"={count}H", *state.values))
    if state.used:  # any operation sets sem_otime: there and back in one call changes nothing else
        step = 1 if state.values[0] < SEMVMX else -1
        syscall(NR.semop, state.id, struct.pack("=HhhHhh", 0, step, IPC_NOWAIT, 0, -step, IPC_NOWAIT), 2)
    if pids_available():
        for pid in {pid for pid in state.pids if pid}:
            run_as(Credentials(pid, 0, 0), lambda pid=pid: _touch(state, pid))  # type: ignore[misc]
    _set(NR.semctl, state, _SEM_SIZE, 0)


def _touch(state: SemaphoreSet, pid: int) -> list[int]:
    """Set the semaphores that `pid` changed last to what they are, so that it did."""
    for index, (last, value) in enumerate(zip(state.pids, state.values, strict=True)):
        if last == pid:
            syscall(NR.semctl, state.id, index, SETVAL, value)
    return []


def _restore_queue(state: MessageQueue) -> None:
    _make("msg", state, lambda: syscall(NR.msgget, state.key, IPC_CREAT | IPC_EXCL | state.mode & 0o777))
    # First, since it may allow more messages than are usual.
    _set(NR.msgctl, state, _MSG_SIZE, qbytes=state.qbytes)
    for message in state.messages:
        raw = message.type.to_bytes(8, "little", signed=True) + message.data
        syscall(NR.msgsnd, state.id, raw, len(message.data), IPC_NOWAIT)


def undo_again(state: IpcState, pid: int, script: Script) -> None:
    """Add the calls by which process `pid` will undo at its end what it was to undo. It must be privileged.

    Each takes and gives, or gives and takes, at once: the values stay.
    """
    sets = {one.id: one for one in state.semaphores}
    for undo in state.undo:
        if undo.id not in sets or len(undo.adjustments) != len(sets[undo.id].values):
            raise Damaged(f"adjustments to System V semaphores {undo.id}")
        for index, adjustment in enumerate(undo.adjustments):
            while adjustment and undo.pid == pid:  # in so many steps as it takes to stay within bounds
                below = sets[undo.id].values[index]
                above = SEMVMX - below
                step = min(abs(adjustment), max(below, above)) * (1 if adjustment > 0 else -1)
                ops = ((-step, SEM_UNDO | IPC_NOWAIT), (step, IPC_NOWAIT))
                down_first = below >= abs(step)
                _add_semop(script, undo.id, index, ops if down_first == (step > 0) else ops[::-1])
                adjustment -= step


def changed_last(state: IpcState, pid: int, script: Script) -> None:
    """Add the calls by which process `pid` is the last to have changed what others have adjusted since."""
    for one in state.semaphores:
        adjusted = {i for undo in state.undo if undo.id == one.id for i, by in enumerate(undo.adjustments) if by}
        for index in adjusted:
            if one.pids[index] == pid:
                step = 1 if one.values[index] < SEMVMX else -1
                _add_semop(script, one.id, index, ((step, IPC_NOWAIT), (-step, IPC_NOWAIT)))


def _add_semop(script: Script, number: int, index: int, ops: tuple[tuple[int, int], ...]) -> None:
    raw = b"".join(struct.pack("=Hhh", index, step, flags) for step, flags in ops)
    script.add(NR.semop, number, script.put(raw), len(ops), name=f"semop on System V semaphores {number}")


def settle(state: IpcState, host_pid: int) -> None:
    """When all processes have attached what they had: remove the segments that were to go with their last user.

    `host_pid`: the pod's pid 1. Raises RestoreFailed.
    """
    doomed = [segment.id for segment in state.segments if segment.doomed]
    if not doomed:
        return
    with _joined(host_pid):
        for number in doomed:
            try:
                syscall(NR.shmctl, number, IPC_RMID, None)
            except OSError as error:
                raise RestoreFailed(f"System V segment {number}: {error}") from error
