"""Linux AIO (io_setup(2)): contexts, with their completions that nobody has fetched yet.

A context is known to its program by the address of its ring. A new one is made with as many entries, its ring is
moved to that address, and requests that do nothing are made until it has come round to the same place; then the
ring's contents are put back. Requests under way end soon, and are waited for: whether there are any is only to be
seen in kernel memory. They also write to memory that the task doesn't touch, unseen by write tracking.

Source: fs/aio.c, include/uapi/linux/aio_abi.h (Linux 6.18).
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from typing import Protocol

import msgspec

from podtree.errors import RestoreFailed
from podtree.kernel import mm
from podtree.kernel.kmem import KernelMemory, View
from podtree.kernel.procfs import MapEntry
from podtree.kernel.sys import NR, PAGE_SIZE
from podtree.objects import insight
from podtree.objects.context import CollectContext, FrozenProcess
from podtree.objects.socketcommon import RETRY

PATH = "/[aio] (deleted)"
PATIENCE_S = 0.3  # a disk answers sooner
IOCB_CMD_PREAD = 0
_RING = struct.Struct("<6I")  # struct aio_ring: id, nr, head, tail, magic, features
_IOCB = struct.Struct("<QIIHhIQQqQII")  # struct iocb
BATCH = 4096


class AioRing(msgspec.Struct, frozen=True, kw_only=True):
    """A context made for `requests`, whose ring is at `start`. `data`: all of the ring; the next completion goes to
    entry `tail`, the kernel's own idea of that."""

    start: int
    requests: int
    tail: int
    prot: int
    data: bytes


# ----------------------------------------------------------------------------------------------- collect


def is_ring(entry: MapEntry) -> bool:
    """Whether a mapping is (called as) a ring."""
    return entry.path == PATH and entry.device[0] == 0


def collect(process: FrozenProcess, entries: list[MapEntry], ctx: CollectContext) -> tuple[AioRing, ...]:
    """The contexts of one frozen process, none of which has requests under way; else it is refused."""
    rings = [entry for entry in entries if is_ring(entry)]
    if not rings:
        return ()
    memory = insight.memory()
    if memory is None:
        reason = "whether requests are under way is told by no call"
        ctx.refuse(process, "AIO contexts (io_setup)", reason, insight.why_not())
        return ()
    contexts = {context.pointer("mmap_base"): context for context in _contexts(memory, process)}
    found = []
    for entry in rings:
        name = f"AIO context {entry.start:x}"
        context = contexts.get(entry.start)
        if context is None or context.number("mmap_size") != entry.length or context.number("dead.counter"):
            ctx.refuse(process, name, "its ring is another process's, or only a part of it is mapped")
        elif reason := _busy(memory, context):
            ctx.refuse(process, name, reason, "" if _polls(memory, context) else RETRY)
        else:
            now = memory.view("kioctx", context.address)  # since then requests may have ended
            found.append(_collect_ring(process, entry, now))
    return tuple(found)


def _contexts(memory: KernelMemory, process: FrozenProcess) -> Iterator[View]:
    space = memory.view("mm_struct", memory.task(process.pidfd).pointer("mm"))
    address = space.pointer("ioctx_table")
    if address:
        table = memory.view("kioctx_table", address)
        pointers = memory.read(table.at("table"), 8 * table.number("nr"))
        for (pointer,) in struct.iter_unpack("<Q", pointers):
            if pointer:
                yield memory.view("kioctx", pointer)


def _busy(memory: KernelMemory, context: View) -> str:
    """Why it can't be saved now; waits a little for requests under way."""
    deadline = time.monotonic() + PATIENCE_S
    while _under_way(memory, context.address):
        if _polls(memory, context):
            return "it polls (IOCB_CMD_POLL), which may take for ever"
        if time.monotonic() > deadline:
            return "requests are under way"
        time.sleep(0.001)
    return ""


def _polls(memory: KernelMemory, context: View) -> bool:
    """Only polls wait in this list, of all that programs can ask for on ordinary files."""
    head = context.at("active_reqs")
    return memory.pointer(head) != head


def _under_way(memory: KernelMemory, address: int) -> int:
    """All entries less those that are free, on every CPU too, less those of completions."""
    context = memory.view("kioctx", address)
    free = context.number("reqs_available.counter")
    free += sum(cpu.number("reqs_available") for cpu in memory.of_all_cpus(context.pointer("cpu"), "kioctx_cpu"))
    return context.number("nr_events") - 1 - free - context.number("completed_events")


def _collect_ring(process: FrozenProcess, entry: MapEntry, context: View) -> AioRing:
    letters = zip("rwx", (mm.PROT_READ, mm.PROT_WRITE, mm.PROT_EXEC), strict=True)
    return AioRing(
        start=entry.start,
        requests=context.number("max_reqs"),
        tail=context.number("tail"),
        prot=sum(bit for letter, bit in letters if letter in entry.perms),
        data=mm.read_memory(process.living, entry.start, entry.length),
    )


# ----------------------------------------------------------------------------------------------- restore


class Task(Protocol):
    """What a task under construction can do (podtree.restore.arena.Body)."""

    tid: int

    def do(self, nr: NR, *args: int) -> int: ...
    def put(self, data: bytes) -> int: ...


def restore(ring: AioRing, task: Task, spare: int) -> None:
    """Make one context in `task`, which has not mapped anything near. `spare`: a free address for as many bytes.

    Raises RestoreFailed.
    """
    size = len(ring.data)
    _, entries, _, _, _, _ = _RING.unpack_from(ring.data.ljust(_RING.size, b"\0"))
    address = _set_up(ring, task)
    made = mm.read_memory(task.tid, address, _RING.size)
    if size % PAGE_SIZE or _RING.unpack(made)[1] != entries or not 0 <= ring.tail < max(entries, 1):
        raise RestoreFailed(
            f"an AIO context of {ring.requests} requests has another size here",
            "this machine has another number of CPUs than that of the checkpoint",
        )
    for place in (spare, ring.start) if address != ring.start else ():  # the two may overlap
        task.do(NR.mremap, address, size, size, mm.MREMAP_MAYMOVE | mm.MREMAP_FIXED, place)
        address = place
    _advance(ring, task)
    mm.write_memory(task.tid, address + 4, ring.data[4:])  # all but `id`, the kernel's index
    if ring.prot != mm.PROT_READ | mm.PROT_WRITE:
        task.do(NR.mprotect, address, size, ring.prot)


def _set_up(ring: AioRing, task: Task) -> int:
    pointer = task.put(bytes(8))
    try:
        task.do(NR.io_setup, ring.requests, pointer)
    except RestoreFailed as error:
        raise RestoreFailed(error.message, "raise fs.aio-max-nr") from error
    return int.from_bytes(mm.read_memory(task.tid, pointer, 8), "little")


def _advance(ring: AioRing, task: Task) -> None:
    """Have `tail` requests completed: each reads nothing from an empty file."""
    if not ring.tail:
        return
    file = task.do(NR.memfd_create, task.put(b"\0"), 0)
    left = ring.tail
    while left:
        count = min(left, BATCH)
        request = _IOCB.pack(0, 0, 0, IOCB_CMD_PREAD, 0, file, 0, 0, 0, 0, 0, 0)
        place = task.put(request + bytes(8 * count))
        pointers = place + len(request)
        mm.write_memory(task.tid, pointers, struct.pack("<Q", place) * count)
        left -= task.do(NR.io_submit, ring.start, count, pointers)
    task.do(NR.close, file)
