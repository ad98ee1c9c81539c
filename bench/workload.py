"""What is measured: a process tree of a given size that changes a given amount when told, and notices every stop.

    workload.py NOTES PARAMETERS    a file to write to, and a Size (bench/cases.py) as JSON

Needs nothing of podtree, so that others can be measured with it as well. At rest it doesn't run at all: a pod that
isn't being measured disturbs nobody. After SIGUSR1 every process writes to its share of pages and files, once. Then
the first one reads the clock in a tight loop, and goes on writing to the same pages, until SIGUSR2. It notes:

    ready                all memory is there
    turn                 everything is written
    gap LAST NOW         between two readings of the clock (ns, CLOCK_REALTIME) it was not running
    rest                 no longer in the loop; gaps are noted here, at its end, so that nothing is written in it

A branch begins where the checkpoint was: in the loop. Its first reading of the clock is the end of a long gap. It
rests then by itself, where the system's other clock goes on from where it stood.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import random
import signal
import socket
import sys
import threading
import time
from types import SimpleNamespace

PAGE = 4096
GAP_NS = 200_000
JUMP_NS = 100_000_000  # between the clocks: this is a branch, or a pod rewound
TURN_NS = 100_000_000
WATCH_NS = 120_000_000_000
GO, REST = signal.SIGUSR1, signal.SIGUSR2
STRIDE = 16
UNIT = 1 << 16


def pages_to_change(pattern: str, total: int, count: int) -> list[int]:
    """Numbers of `count` different pages: dense (side by side), sparse (one in sixteen), random."""
    if pattern == "random":
        return random.Random(1).sample(range(total), min(count, total))
    step = STRIDE if pattern == "sparse" else 1
    in_order = itertools.chain.from_iterable(range(first, total, step) for first in range(step))
    return list(itertools.islice(in_order, count))


def allocate(size: int) -> mmap.mmap:
    """`size` bytes of anonymous memory without two equal pages in it."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    noise = os.urandom(UNIT)
    for at in range(0, size, UNIT):
        memory[at : at + UNIT] = noise[: min(UNIT, size - at)]
    for page in range(size // PAGE):
        memory[page * PAGE + 8 : page * PAGE + 16] = page.to_bytes(8, "little")
    return memory


def open_some(count: int) -> list[object]:
    """About `count` descriptors of several kinds, kept open as long as what is returned."""
    kept: list[object] = []
    while count > 0:
        files = [open(name, "rb") for name in ("/dev/null", sys.executable, __file__)]
        kept += [files, os.pipe(), socket.socketpair(), os.eventfd(1), os.eventfd(0)]
        count -= len(files) + 2 + 2 + 2
    return kept


class Process:
    """One process with its share of everything."""

    def __init__(self, notes: str, size: SimpleNamespace) -> None:
        self.notes = notes
        self.throughout = size.throughout
        share = max(PAGE, (size.megabytes << 20) // size.processes // PAGE * PAGE)
        self.memory = allocate(share)
        self.pages = pages_to_change(size.pattern, share // PAGE, size.changed_kb // 4 // size.processes)
        self.file_bytes = (size.file_kb << 10) // size.processes
        self.data = os.open(f"{notes}.{os.getpid()}", os.O_RDWR | os.O_CREAT)
        self.kept = open_some(size.descriptors // size.processes)
        self.number = 0
        for _ in range(size.threads - 1):
            threading.Thread(target=threading.Event().wait, daemon=True).start()

    def note(self, *words: object) -> None:
        """A line for who measures. The file isn't kept open: its size is nobody's state."""
        fd = os.open(self.notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, (" ".join(map(str, words)) + "\n").encode())
        os.close(fd)

    def turn(self) -> None:
        """Write to all pages and to the file."""
        self.number += 1
        for page in self.pages:
            self.memory[page * PAGE] = self.number & 0xFF
        if self.file_bytes:
            os.pwrite(self.data, os.urandom(self.file_bytes), 0)

    def watch(self) -> None:
        """Read the clock until told to rest; between two readings at most one page is written.

        The turn is noted after the first reading: whenever this is stopped from then on, it is seen.
        """
        while signal.sigtimedwait({REST}, 0):
            pass  # meant for an earlier watch
        last = time.time_ns()
        until, due, difference = last + WATCH_NS, last + TURN_NS, last - time.monotonic_ns()
        left: list[int] = []
        gaps: list[tuple[int, int]] = []
        self.note("turn")
        resting = False
        while not resting:
            resting = last > until or signal.sigtimedwait({REST}, 0) is not None  # but the clock is read once more
            if left:
                self.memory[left.pop() * PAGE] = last & 0xFF
            elif self.throughout and last >= due:
                left, due = self.pages.copy(), due + TURN_NS
            now = time.time_ns()
            if now - last > GAP_NS:
                gaps.append((last, now))
                resting |= abs(now - time.monotonic_ns() - difference) > JUMP_NS
            last = now
        for gap in gaps:
            self.note("gap", *gap)
        self.note("rest")


def main() -> None:
    """Fork, allocate, say ready; then whatever is told."""
    notes, size = sys.argv[1], SimpleNamespace(**json.loads(sys.argv[2]))
    signal.pthread_sigmask(signal.SIG_BLOCK, {GO, REST})
    from_children, to_first = os.pipe()
    children = []
    for _ in range(size.processes - 1):
        child = os.fork()
        if child == 0:
            work_as_child(Process(notes, size), to_first)
        children.append(child)
    process = Process(notes, size)
    wait_for(from_children, len(children))
    process.note("ready")
    while True:
        signal.sigwait({GO})
        for child in children:
            os.kill(child, GO)
        process.turn()
        wait_for(from_children, len(children))
        process.watch()


def work_as_child(process: Process, to_first: int) -> None:
    """A turn whenever told; never returns."""
    while True:
        os.write(to_first, b".")
        signal.sigwait({GO})
        process.turn()


def wait_for(fd: int, count: int) -> None:
    """Until so many bytes came."""
    while count:
        count -= len(os.read(fd, count))


if __name__ == "__main__":
    main()
