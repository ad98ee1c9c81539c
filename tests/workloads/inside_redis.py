"""Load on a Redis server from inside its pod: knows what every key must hold, and checks each answer.

    inside_redis.py DIRECTORY

Six connections (TCP and unix) write and read; one has a transaction open, one is subscribed, one blocks in BLPOP,
one asks for snapshots. When DIRECTORY/calm appears they work slowly; when DIRECTORY/go appears: the transaction is
executed, everything is compared, OK or BAD.
"""

from __future__ import annotations

import os
import random
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

DIRECTORY = Path(sys.argv[1])
failed: list[str] = []


def bad(text: str) -> None:
    """Notes a failure, once and for all."""
    failed.append(text)
    print(f"BAD {text}", flush=True)
    os._exit(1)


class Client:
    """A connection that speaks RESP, the protocol of Redis."""

    def __init__(self, unix: bool = False) -> None:
        if unix:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(str(DIRECTORY / "redis.sock"))
        else:
            self.socket = socket.create_connection(("127.0.0.1", 6379))
        self.file = self.socket.makefile("rb")

    def send(self, *words: object) -> None:
        parts = [str(word).encode() if not isinstance(word, bytes) else word for word in words]
        self.socket.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts))

    def receive(self) -> object:
        line = self.file.readline()
        if not line.endswith(b"\r\n"):
            bad(f"connection ended: {line!r}")
        kind, rest = line[:1], line[1:-2]
        if kind in b"+:":
            return int(rest) if kind == b":" else rest.decode()
        if kind == b"-":
            return RuntimeError(rest.decode())
        if kind == b"$":
            return None if rest == b"-1" else self.file.read(int(rest) + 2)[:-2]
        return None if rest == b"-1" else [self.receive() for _ in range(int(rest))]

    def __call__(self, *words: object) -> object:
        self.send(*words)
        return self.receive()

    def expect(self, wanted: object, *words: object) -> None:
        got = self(*words)
        if got != wanted:
            bad(f"{words}: {got!r} instead of {wanted!r}")


def go() -> bool:
    return (DIRECTORY / "go").exists()


def worker(number: int) -> None:
    """Strings, counters, hashes and lists, mirrored in our own memory."""
    client, chance = Client(unix=number % 2 == 1), random.Random(number)
    strings: dict[str, bytes] = {}
    counter, items = 0, []
    while not go():
        key = f"w{number}:{chance.randrange(500)}"
        value = chance.randbytes(chance.choice([10, 100, 1000, 20000]))
        client.expect(strings.get(key), "GET", key)
        client.expect("OK", "SET", key, value)
        strings[key] = value
        counter += 1
        client.expect(counter, "INCR", f"counter{number}")
        items.append(str(counter).encode())
        client.expect(len(items), "RPUSH", f"list{number}", counter)
        client.expect(1, "HSET", f"hash{number}", counter, value[:10])
        if len(items) == 1000:
            client.expect(items, "LRANGE", f"list{number}", 0, -1)
            client.expect(1, "DEL", f"list{number}")
            items = []
        if chance.random() < 0.01:
            gone = chance.choice(list(strings))
            client.expect(1, "DEL", gone)
            del strings[gone]
        (DIRECTORY / f"progress{number}").write_text(str(counter))
        if (DIRECTORY / "calm").exists():
            time.sleep(0.2)
    for key, value in strings.items():
        client.expect(value, "GET", key)
    client.expect(counter, "HLEN", f"hash{number}")
    client.expect(items, "LRANGE", f"list{number}", 0, -1)


def transaction(ready: threading.Event) -> None:
    """MULTI, three commands queued; executed in the next life."""
    client = Client()
    client.expect("OK", "MULTI")
    for words in (("SET", "in", "transaction"), ("INCR", "transactions"), ("GET", "in")):
        client.expect("QUEUED", *words)
    ready.set()
    while not go():
        time.sleep(0.02)
    client.expect(["OK", 1, b"transaction"], "EXEC")


def blocked(ready: threading.Event) -> None:
    """Blocked in BLPOP until someone pushes."""
    client = Client(unix=True)
    client.send("BLPOP", "queue", 0)
    ready.set()
    if client.receive() != [b"queue", b"element"]:
        bad("BLPOP")


def subscriber(ready: threading.Event) -> None:
    """Subscribed; hears one message."""
    client = Client()
    client.send("SUBSCRIBE", "news")
    client.receive()
    ready.set()
    if client.receive() != [b"message", b"news", b"hello"]:
        bad("SUBSCRIBE")


def snapshots() -> None:
    """Asks for a snapshot in the background now and then: a forked child of the server writes it."""
    client = Client()
    while not go():
        client("BGSAVE")
        time.sleep(2 if (DIRECTORY / "calm").exists() else 0.5)


def guarded(function: object, *arguments: object) -> None:
    try:
        function(*arguments)  # type: ignore[operator]
    except Exception:
        bad(traceback.format_exc())


def main() -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if Client()("PING") == "PONG":
                break
        except OSError:
            time.sleep(0.05)
    events = [threading.Event() for _ in range(3)]
    special = [
        threading.Thread(target=guarded, args=(function, event))
        for function, event in zip((transaction, blocked, subscriber), events, strict=True)
    ]
    threads = [threading.Thread(target=guarded, args=(worker, number)) for number in range(6)]
    threads.append(threading.Thread(target=guarded, args=(snapshots,)))
    for thread in [*special, *threads]:
        thread.start()
    for event in events:
        event.wait()
    print("READY", flush=True)
    for thread in threads:
        thread.join()
    client = Client()
    client.expect(1, "PUBLISH", "news", "hello")
    client.expect(1, "RPUSH", "queue", "element")
    for thread in special:
        thread.join()
    if not failed:
        print("OK", flush=True)


main()
