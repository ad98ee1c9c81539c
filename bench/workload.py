"""What is measured: a process tree of a given size that changes a given amount, and notices when it was stopped.

    workload.py MEGABYTES CHANGED_KB PATTERN FILE_KB CHILDREN DESCRIPTORS

Runs in a pod. All sizes are of the whole tree. Every tenth of a second each process writes to its share of pages and
files. After SIGUSR1 the first one reads the clock all the time in between, for a second; a step of more than half a
millisecond is written to /tmp/gaps as "end length", in nanoseconds of CLOCK_REALTIME, which also shows when a branch
began to run.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import sys
import time

PAGE = 4096
GAP_NS = 500_000
TURN_NS = 100_000_000
WATCH_NS = 1_000_000_000


def pages_to_change(pattern: str, total: int, count: int) -> list[int]:
    """Page numbers: dense (side by side), sparse (one in sixteen), random."""
    if pattern == "dense":
        return list(range(min(count, total)))
    if pattern == "sparse":
        return [n * 16 % total for n in range(count)]
    return random.Random(1).sample(range(total), min(count, total))


def main() -> None:
    """Allocate, fork, say ready, work."""
    megabytes, changed_kb, file_kb, children, descriptors = (int(sys.argv[n]) for n in (1, 2, 4, 5, 6))
    processes = children + 1
    watch_until = 0

    def watch(*_: object) -> None:
        nonlocal watch_until
        watch_until = time.monotonic_ns() + WATCH_NS

    signal.signal(signal.SIGUSR1, watch)
    for _ in range(children):
        if os.fork() == 0:
            break
    for _ in range(descriptors // processes):
        os.open("/dev/null", os.O_RDONLY)
    size = max(PAGE, (megabytes << 20) // processes // PAGE * PAGE)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    noise = os.urandom(1 << 16)
    for at in range(0, size, len(noise)):
        memory[at : at + len(noise)] = noise[: min(len(noise), size - at)]
    pages = pages_to_change(sys.argv[3], size // PAGE, changed_kb // 4 // processes)
    data = os.open(f"/tmp/data{os.getpid()}", os.O_RDWR | os.O_CREAT)
    gaps = os.open("/tmp/gaps", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    print("ready", flush=True)
    turn = 0
    while True:
        turn += 1
        last = begun = time.time_ns()
        for number, page in enumerate(pages):
            memory[page * PAGE] = (turn + number) & 0xFF
        if file_kb:
            os.pwrite(data, os.urandom(1024) * (file_kb // processes), 0)
        while last - begun < TURN_NS:
            watches = time.monotonic_ns() < watch_until
            if not watches:
                time.sleep(0.02)
            now = time.time_ns()
            if watches and now - last > GAP_NS:
                os.write(gaps, b"%d %d\n" % (now, now - last))
                now = time.time_ns()
            last = now


if __name__ == "__main__":
    main()
