"""Linux AIO: contexts, completions that wait to be fetched, a thread that waits for some, requests under way."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import threading
import time

from inpod import bad, case, child, equal, frozen, go, main, reap, true, wait_go

libc = ctypes.CDLL(None, use_errno=True)
SETUP, DESTROY, GETEVENTS, SUBMIT = 206, 207, 208, 209
PREAD, PWRITE, FSYNC, POLL = 0, 1, 2, 5
RESFD = 1


def call(number: int, *args: object) -> int:
    """A system call; raises OSError."""
    result = int(libc.syscall(number, *args))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def setup(count: int) -> int:
    """A new context."""
    context = ctypes.c_uint64(0)
    call(SETUP, count, ctypes.byref(context))
    return context.value


def submit(context: int, requests: list[tuple[int, ...]]) -> list[object]:
    """Requests of (data, what, fd, address, size, offset[, eventfd]); what is returned has to be kept alive."""
    made = []
    for data, what, fd, address, size, offset, *event in requests:
        flags, eventfd = (RESFD, event[0]) if event else (0, 0)
        raw = struct.pack("<QIIHhIQQqQII", data, 0, 0, what, 0, fd, address, size, offset, 0, flags, eventfd)
        made.append(ctypes.create_string_buffer(raw, 64))
    pointers = (ctypes.c_uint64 * len(made))(*[ctypes.addressof(one) for one in made])
    done = call(SUBMIT, ctypes.c_uint64(context), len(made), pointers)
    assert done == len(made), done
    return [made, pointers]


def events(context: int, least: int, most: int) -> list[tuple[int, int]]:
    """(data, result) of completions."""
    buffer = ctypes.create_string_buffer(32 * most)
    got = call(GETEVENTS, ctypes.c_uint64(context), least, most, buffer, None)
    return [struct.unpack_from("<QQqq", buffer, 32 * at)[::2] for at in range(got)]


def ring(context: int) -> tuple[int, ...]:
    """id, nr, head, tail, magic: the beginning of struct aio_ring."""
    return struct.unpack("<5I", ctypes.string_at(context, 20))


def mapped(context: int) -> list[str]:
    """The line of /proc/self/maps."""
    with open("/proc/self/maps") as file:
        return [line.split()[0] for line in file if line.startswith(f"{context:x}-")]


@case
def completions() -> None:
    """Fetched and not fetched ones, also when the ring has come round; several contexts, one of them destroyed."""
    file = os.open("file", os.O_RDWR | os.O_CREAT)
    os.write(file, b"0123456789" * 10)
    buffer = ctypes.create_string_buffer(100)
    place = ctypes.addressof(buffer)
    contexts = [setup(count) for count in (1, 30, 500, 7)]
    fresh, some, round_, gone = contexts
    call(DESTROY, ctypes.c_uint64(gone))
    keep = [submit(some, [(number, PREAD, file, place, number, 0) for number in range(20)])]
    equal("set-up", len(events(some, 5, 5)), 5)
    entries = ring(round_)[1]
    for turn in range(entries // 100 + 1):
        keep.append(submit(round_, [(turn, PREAD, file, place, 1, 0) for _ in range(100)]))
        equal("set-up", len(events(round_, 100, 100)), 100)
    keep.append(submit(round_, [(number, PWRITE, file, place, number, 1000) for number in range(50)]))
    true("set-up: it has come round", ring(round_)[2] < entries)
    before = [(ring(one)[1:], mapped(one)) for one in contexts[:3]]
    frozen()
    equal("rings", [(ring(one)[1:], mapped(one)) for one in contexts[:3]], before)
    equal("unfetched ones", events(some, 0, 100), [(number, number) for number in range(5, 20)])
    equal("no more", events(some, 0, 100), [])
    equal("of the one that has come round", events(round_, 50, 100), [(number, number) for number in range(50)])
    for context in (fresh, some, round_):
        for turn in range(300):
            keep.append(submit(context, [(turn, PREAD, file, place, 3, 10)]))
            equal("one more", events(context, 1, 2), [(turn, 3)])
    limit = ring(some)[1] - 1
    true("as many as before", submit(some, [(0, PREAD, file, place, 1, 0)] * min(limit, 60)))
    try:
        events(gone, 0, 1)
        bad("a destroyed context is there")
    except OSError:
        pass
    for context in (fresh, some, round_):
        call(DESTROY, ctypes.c_uint64(context))
    equal("nothing is left", [mapped(one) for one in contexts], [[]] * 4)


@case
def waiting() -> None:
    """A thread waits for completions; each also counts in an eventfd; a child has a context of its own.

    None has come yet: with some, a wait for more returns those when it is interrupted.
    """
    context = setup(16)
    event = os.eventfd(0)
    got: list[tuple[int, int]] = []
    waiter = threading.Thread(target=lambda: got.extend(events(context, 3, 10)))
    waiter.start()
    file = os.open("file", os.O_RDWR | os.O_CREAT)
    buffer = ctypes.create_string_buffer(b"text", 100)

    def body() -> None:
        os.execv("/usr/bin/python3", ["python3", os.path.abspath(__file__), "own_context"])

    pid = os.fork()
    if pid == 0:
        body()
    frozen()
    true("still waiting", waiter.is_alive())
    keep = [submit(context, [(1, PWRITE, file, ctypes.addressof(buffer), 4, 0, event)])]
    keep.append(
        submit(context, [(2, FSYNC, file, 0, 0, 0, event), (3, PREAD, file, ctypes.addressof(buffer), 4, 0, event)])
    )
    waiter.join(60)
    equal("what came", sorted(got), [(1, 4), (2, 0), (3, 4)])
    equal("counted", os.eventfd_read(event), 3)
    reap(pid)


def own_context() -> None:
    """What the child of `waiting` does."""
    context = setup(3)
    file = os.memfd_create("file")
    keep = submit(context, [(9, PREAD, file, 0, 0, 0)])
    wait_go()
    equal("child", events(context, 1, 1), [(9, 0)])
    true("kept", keep)


@case
def under_way() -> None:
    """Direct I/O all the time: what is read is what was written, in memory that no one touches otherwise."""
    size, count = 1 << 16, 16
    file = os.open("direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    os.ftruncate(file, size * count)
    context = setup(count * 2)
    area = mmap.mmap(-1, 2 * size * count)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))

    def round_(number: int) -> None:
        for block in range(count):
            stamp = struct.pack("<QQ", number, block) * (size // 16)
            area[block * size : (block + 1) * size] = stamp
        at = [(block, block * size) for block in range(count)]
        keep = submit(context, [(block, PWRITE, file, base + offset, size, offset) for block, offset in at])
        equal("written", sorted(collected(count)), [(block, size) for block in range(count)])
        there = base + size * count
        keep = submit(context, [(block, PREAD, file, there + offset, size, offset) for block, offset in at])
        equal("read", sorted(collected(count)), [(block, size) for block in range(count)])
        true("kept", keep)
        if area[: size * count] != area[size * count :]:
            bad(f"round {number}: what was read isn't what was written")

    def collected(count: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        while len(found) < count:
            found += events(context, 1, count)
        return found

    print("READY", flush=True)
    number = 0
    while not go():
        number += 1
        round_(number)
    round_(number + 1)


@case
def polling() -> None:
    """Refused: a poll that may take for ever."""
    context = setup(4)
    reader, writer = os.pipe()
    keep = submit(context, [(5, POLL, reader, 1, 0, 0)])
    frozen()
    os.write(writer, b"x")
    equal("polled", [(data, mask & 1) for data, mask in events(context, 1, 1)], [(5, 1)])
    true("kept", keep)


@case
def inherited() -> None:
    """Refused: a child that has the ring of its parent's context."""
    context = setup(4)

    def body() -> None:
        while not go():
            time.sleep(0.02)
        true("it is only memory to the child", mapped(context))

    pid = child(body)
    frozen()
    reap(pid)
    equal("none", events(context, 0, 1), [])


if __name__ == "__main__":
    import sys

    if sys.argv[1:] == ["own_context"]:
        own_context()
    else:
        main()
