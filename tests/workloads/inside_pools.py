"""Runs in the pod: processes made in all ways of Python's multiprocessing, with everything that they can share.

Arguments: the start method, a directory. Prints READY, then BAD and what, if anything is not what it must be; appends
a line to `progress` after each round.
"""

from __future__ import annotations

import hashlib
import multiprocessing as mp
import sys
import time
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

SIZE = 1 << 20
WORDS = 64


def digest(number: int) -> str:
    """Some work whose result everybody can check."""
    return hashlib.sha256(b"%d" % number * 1000).hexdigest()


def job(number: int) -> tuple[int, str]:
    """What the pool's workers do."""
    return number, digest(number)


def feeder(who: int, counter: Any, lock: Any, queue: Any, name: str) -> None:
    """Counts under a semaphore that is shared with its twin, in shared memory, and numbers what it sends."""
    shared = shared_memory.SharedMemory(name=name)
    number = 0
    while True:
        with lock:
            counter.value += 1
            shared.buf[:WORDS] = bytes([counter.value % 251]) * WORDS
        queue.put((who, number))
        number += 1


def consume(queue: Any, wanted: list[int]) -> None:
    """Takes some of what the feeders sent: of each, everything, once, in order."""
    for _ in range(50):
        who, number = queue.get(timeout=60)
        if number != wanted[who]:
            print("BAD queue", who, number, wanted, flush=True)
        wanted[who] = number + 1


def main(method: str, place: Path) -> None:
    """Rounds without an end."""
    context = mp.get_context(method)
    shared = shared_memory.SharedMemory(create=True, size=SIZE)
    counter, lock, queue = context.Value("l", 0), context.BoundedSemaphore(1), context.Queue(100)
    common = (counter, lock, queue, shared.name)
    feeders = [context.Process(target=feeder, args=(who, *common), daemon=True) for who in range(2)]
    for process in feeders:
        process.start()
    manager = context.Manager()
    table = manager.dict()
    done, wanted = 0, [0, 0]
    with context.Pool(2) as pool:
        print("READY", flush=True)
        while True:
            for number, answer in pool.imap_unordered(job, range(done, done + 50), chunksize=5):
                if digest(number) != answer:
                    print("BAD job", number, flush=True)
            done += 50
            table["done"] = done
            consume(queue, wanted)
            with lock:
                seen = bytes(shared.buf[:WORDS])
            if len(set(seen)) != 1 or table["done"] != done:
                print("BAD shared", seen, table["done"], done, flush=True)
            if not all(process.is_alive() for process in feeders):
                print("BAD feeders have ended", flush=True)
            with (place / "progress").open("a") as file:
                file.write(f"{done}\n")
            if (place / "calm").exists():
                time.sleep(0.2)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
