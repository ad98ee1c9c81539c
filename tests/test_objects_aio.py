"""AIO contexts: collected from this process, made again in a child, which fetches what was left; hostile images."""

from __future__ import annotations

import ctypes
import os
import random
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from podtree.errors import RestoreFailed
from podtree.kernel import procfs
from podtree.kernel.btf import VMLINUX
from podtree.kernel.kmem import KernelMemory
from podtree.kernel.pidfd import pidfd_open
from podtree.kernel.sys import NR, PAGE_SIZE, syscall
from podtree.objects import aio, insight
from podtree.objects.aio import AioRing
from podtree.objects.context import CollectContext, FrozenProcess

pytestmark = pytest.mark.skipif(not Path(VMLINUX).exists(), reason="needs a kernel with CONFIG_DEBUG_INFO_BTF")
SEED = int(os.environ.get("PODTREE_TEST_SEED", str(random.SystemRandom().randrange(10**6))))
IO_DESTROY = 207
PREAD, POLL = 0, 5
FREE = 0x10_0000_0000


class Self:
    """This process, as a task that acts for us."""

    def __init__(self) -> None:
        self.tid = os.getpid()
        self.kept: list[Any] = []

    def do(self, nr: NR, *args: int) -> int:
        return syscall(nr, *args)

    def put(self, data: bytes) -> int:
        self.kept.append(ctypes.create_string_buffer(data, max(len(data), 1)))
        return ctypes.addressof(self.kept[-1])


def set_up(count: int) -> int:
    context = bytearray(8)
    syscall(NR.io_setup, count, context)
    return int.from_bytes(context, "little")


def submit(context: int, file: int, what: int, numbers: list[int]) -> int:
    """Requests that read nothing (or poll), with a number each; how many the kernel takes.

    Free entries that the other CPUs have for themselves can't be had.
    """
    made = [ctypes.create_string_buffer(aio._IOCB.pack(n, 0, 0, what, 0, file, 1, 0, 0, 0, 0, 0)) for n in numbers]
    pointers = (ctypes.c_uint64 * len(made))(*[ctypes.addressof(one) for one in made])
    try:
        return syscall(NR.io_submit, context, len(made), ctypes.addressof(pointers))
    except BlockingIOError:
        return 0


def fetch(context: int, most: int) -> list[int]:
    """Numbers of the requests that are completed."""
    buffer = bytearray(32 * most)
    got = syscall(NR.io_getevents, context, 0, most, buffer, None)
    return [struct.unpack_from("<Q", buffer, 32 * at)[0] for at in range(got)]


def collected() -> tuple[tuple[AioRing, ...], list[str]]:
    """This process's contexts, and problems."""
    pid = os.getpid()
    process = FrozenProcess(pid, pid, "test", pidfd_open(pid))
    for _ in range(2):
        ctx = CollectContext(-1, Path(), Path(), [process])
        found = aio.collect(process, procfs.smaps(pid), ctx)
        if not insight.prepare():
            break
    os.close(process.pidfd)
    return found, [str(problem) for problem in ctx.problems]


@pytest.fixture
def memory_closed() -> Iterator[None]:
    yield
    insight.forget()


def in_a_child(work: Callable[[], None]) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.usefixtures("memory_closed")
def test_random_histories() -> None:
    """Requests come, completions go, the ring comes round: what is left is fetched in order, as many fit as before."""
    print(f"PODTREE_TEST_SEED={SEED}")
    chance = random.Random(SEED)
    file = os.memfd_create("file")
    contexts = {set_up(chance.choice([1, 8, 100, 127, 300])): [] for _ in range(5)}  # type: dict[int, list[int]]
    room = {one: struct.unpack_from("<II", ctypes.string_at(one, 8))[1] - 1 for one in contexts}
    for number in range(3000):
        context = chance.choice(list(contexts))
        left = contexts[context]
        if len(left) < room[context] and chance.random() < 0.6:
            count = chance.randrange(1, min(40, room[context] - len(left)) + 1)
            done = submit(context, file, PREAD, [number * 100 + at for at in range(count)])
            left += [number * 100 + at for at in range(done)]
        else:
            got = fetch(context, chance.randrange(1, 60))
            assert got == left[: len(got)]
            del left[: len(got)]
    rings, problems = collected()
    assert problems == [] and {ring.start for ring in rings} == set(contexts)

    def work() -> None:
        task = Self()
        for ring in rings:
            aio.restore(ring, task, FREE)
        assert [ctypes.string_at(r.start, len(r.data))[4:] for r in rings] == [r.data[4:] for r in rings]
        again, problems = collected()
        assert problems == []
        by_start = {ring.start: ring for ring in again}
        for ring in rings:
            other = by_start[ring.start]
            assert (other.data[4:], other.tail, other.requests) == (ring.data[4:], ring.tail, ring.requests)
        for context, left in contexts.items():
            done = submit(context, file, PREAD, [7] * (room[context] - len(left)))
            assert fetch(context, 4000) == left + [7] * done
            for _ in range(30):
                done = submit(context, file, PREAD, [9] * room[context])
                assert done > room[context] // 2
                assert fetch(context, 4000) == [9] * done

    in_a_child(work)
    for context in contexts:
        syscall(IO_DESTROY, context)  # type: ignore[arg-type]
    os.close(file)


@pytest.mark.usefixtures("memory_closed")
def test_where_the_kernel_puts_it() -> None:
    """The new ring may overlap the place where it has to go."""
    context = set_up(1000)
    (ring,), _ = collected()
    syscall(IO_DESTROY, context)  # type: ignore[arg-type]

    def work() -> None:
        here = set_up(1000)  # where the kernel would put the next one, too
        syscall(IO_DESTROY, here)  # type: ignore[arg-type]
        place = here + PAGE_SIZE
        syscall(NR.mmap, place + len(ring.data), 4 * PAGE_SIZE, 0, 0x22, -1, 0)
        moved = AioRing(start=place, requests=ring.requests, tail=0, prot=ring.prot, data=ring.data)
        syscall(NR.munmap, place, len(ring.data))
        aio.restore(moved, Self(), FREE)
        assert fetch(place, 1) == []

    in_a_child(work)


@pytest.mark.usefixtures("memory_closed")
def test_requests_under_way_are_seen() -> None:
    """A poll counts until it is answered, whichever CPU made it."""
    context = set_up(10)
    reader, writer = os.pipe()
    for cpu in sorted(os.sched_getaffinity(0)):
        thread = threading.Thread(
            target=lambda cpu=cpu: (os.sched_setaffinity(0, {cpu}), submit(context, reader, POLL, [1]))
        )  # type: ignore[misc]
        thread.start()
        thread.join()
    rings, problems = collected()
    assert rings == () and len(problems) == 1 and "it polls" in problems[0]
    os.write(writer, b"x")
    while len(fetch(context, 0)) or collected()[1]:
        time.sleep(0.01)
    (ring,), problems = collected()
    assert problems == [] and ring.tail == len(os.sched_getaffinity(0))
    syscall(IO_DESTROY, context)  # type: ignore[arg-type]
    os.close(reader)
    os.close(writer)


def test_refused_without_kernel_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(insight.SWITCH, "off")
    insight.forget()
    context = set_up(1)
    try:
        rings, problems = collected()
        assert rings == () and "is told by no call" in problems[0] and f"{insight.SWITCH} is off" in problems[0]
    finally:
        insight.forget()
        syscall(IO_DESTROY, context)  # type: ignore[arg-type]


def test_per_cpu_areas() -> None:
    """What is of each CPU: of a context's free entries, one CPU has taken a batch."""
    memory = KernelMemory()
    context = set_up(1000)
    space = memory.view("mm_struct", memory.this_task().pointer("mm"))
    table = memory.view("kioctx_table", space.pointer("ioctx_table"))
    addresses = [p for (p,) in struct.iter_unpack("<Q", memory.read(table.at("table"), 8 * table.number("nr"))) if p]
    found = next(view for p in addresses if (view := memory.view("kioctx", p)).pointer("mmap_base") == context)

    def free() -> list[int]:
        return [cpu.number("reqs_available") for cpu in memory.of_all_cpus(found.pointer("cpu"), "kioctx_cpu")]

    assert set(free()) == {0}
    file = os.memfd_create("file")
    submit(context, file, PREAD, [1])
    assert sum(free()) == found.number("req_batch") - 1 and sum(number > 0 for number in free()) == 1
    os.close(file)
    syscall(IO_DESTROY, context)  # type: ignore[arg-type]
    memory.close()


@pytest.mark.parametrize(
    "changed",
    [
        {"tail": -1},
        {"tail": 1 << 30},
        {"data": b""},
        {"data": bytes(100)},
        {"data": bytes(PAGE_SIZE)},
        {"requests": 9000},
    ],
)
def test_hostile_images(changed: dict[str, Any]) -> None:
    def work() -> None:
        context = set_up(10)
        data = ctypes.string_at(context, PAGE_SIZE * 2)
        syscall(IO_DESTROY, context)  # type: ignore[arg-type]
        fields = {"start": context, "requests": 10, "tail": 0, "prot": 3, "data": data}
        with pytest.raises(RestoreFailed):
            aio.restore(AioRing(**{**fields, **changed}), Self(), FREE)

    in_a_child(work)
