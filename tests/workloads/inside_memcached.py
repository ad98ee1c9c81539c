"""Runs in the pod: clients of memcached that know what each key has to hold. Argument: a directory."""

from __future__ import annotations

import hashlib
import socket
import sys
import threading
import time
from pathlib import Path

KEYS = 500


def value(who: int, number: int) -> bytes:
    """What key `number % KEYS` of a client holds after its round `number`: of many sizes, so of many slabs."""
    return hashlib.sha256(b"%d %d" % (who, number)).hexdigest().encode() * (1 + number % 60)


def client(who: int, place: Path, ready: threading.Barrier) -> None:
    """Stores and asks, over one connection."""
    stream = socket.create_connection(("127.0.0.1", 11311)).makefile("rwb")
    number = 0
    while True:
        number += 1
        data = value(who, number)
        stream.write(b"set %d-%d 0 0 %d\r\n%s\r\n" % (who, number % KEYS, len(data), data))
        older = max(number - 7 * (number % 50), 1)
        stream.write(b"get %d-%d\r\n" % (who, older % KEYS))
        stream.flush()
        stored, head = stream.readline(), stream.readline()
        got, end = stream.readline().rstrip(b"\r\n"), stream.readline()
        if (stored, end) != (b"STORED\r\n", b"END\r\n") or got != value(who, older):
            print("BAD", who, number, older, stored, head, end, flush=True)
            return
        if number == KEYS:
            ready.wait()
        if number % 100 == 0:
            with (place / f"progress{who}").open("a") as file:
                file.write(f"{number}\n")
            if (place / "calm").exists():
                time.sleep(0.2)


def main(place: Path) -> None:
    """Three clients, each on a thread."""
    ready = threading.Barrier(3, action=lambda: print("READY", flush=True))
    threads = [threading.Thread(target=client, args=(who, place, ready)) for who in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("BAD the clients have ended", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
