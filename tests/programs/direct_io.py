"""Direct I/O into memory that nobody touches otherwise: what was read is there, whatever was copied meanwhile."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import struct
from pathlib import Path

from aio import PREAD, events, setup, submit
from inpod import bad, case, equal, go, main

SIZE, PLACES, BLOCKS = 4 << 20, 32, 8


def stamp(block: int) -> bytes:
    """The contents of one block of the file."""
    return struct.pack("<QQ", block, block ^ 0xFFFF) * (SIZE // 16)


def filled() -> tuple[int, mmap.mmap]:
    """The file, for direct I/O, and memory to read it into."""
    file = os.open("/data/file", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    buffer = mmap.mmap(-1, SIZE)
    for block in range(BLOCKS):
        buffer[:] = stamp(block)
        os.pwritev(file, [buffer], block * SIZE)
    return file, buffer


def await_slowness() -> None:
    print("READY", flush=True)
    while not Path("/data/slow").exists():
        pass
    print("SLOW", flush=True)


@case
def slow_reads() -> None:
    """A disk so slow that a read is always under way; the file is in /data."""
    file, _ = filled()
    places = [mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(PLACES)]
    for place in places:
        os.preadv(file, [place], 0)
    there = [0] * PLACES
    await_slowness()
    number = 0
    while not go():
        block = random.randrange(BLOCKS)
        os.preadv(file, [places[number % PLACES]], block * SIZE)
        there[number % PLACES] = block
        number += 1
    for at, (place, block) in enumerate(zip(places, there, strict=True)):
        if place[:] != stamp(block):
            bad(f"place {at} is not what was read")


@case
def counted() -> None:
    """A request is always under way, and counts in an eventfd when it is done."""
    file, buffer = filled()
    context, event = setup(4), os.eventfd(0)
    there = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    await_slowness()
    number = 0
    while not go():
        kept = submit(context, [(number, PREAD, file, there, SIZE // 4, number % BLOCKS * SIZE, event)])
        equal("fetched", events(context, 1, 4), [(number, SIZE // 4)])
        if buffer[: SIZE // 4] != stamp(number % BLOCKS)[: SIZE // 4]:
            bad(f"request {number} read something else")
        number += len(kept) > 0
    equal("counted", os.eventfd_read(event), number)


if __name__ == "__main__":
    main()
