"""A program that shares things with a server outside of its pod, by way of a directory that both see.

    outside.py cut     everything; after /go it finds all of it cut off
    outside.py again   what has a name; after /go it finds that again

The server is in test_external.py. Its socket is DIR/server, where it sends: a pipe's end for reading and one for
writing, a terminal, a file. There are also a datagram socket DIR/log, a FIFO DIR/fifo and a file DIR/file.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable

DIR = "/shown"


def fails(work: Callable[[], object]) -> str:
    """The name of the error that it ends with."""
    try:
        work()
    except OSError as error:
        return type(error).__name__ if type(error) is not OSError else os.strerror(error.errno or 0)
    return "none"


def stream(name: str = "server") -> socket.socket:
    """A connection to a socket of the server."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(f"{DIR}/{name}")
    return sock


def datagram() -> socket.socket:
    """A socket connected to the server's."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.connect(f"{DIR}/log")
    return sock


def wait() -> None:
    """Until it is time."""
    print("READY", flush=True)
    while not os.path.exists("/go"):
        time.sleep(0.02)


def cut() -> None:
    conn = stream()
    _, (reading, writing, terminal, file), _, _ = socket.recv_fds(conn, 1, 4)
    waiting = stream("busy")
    log = datagram()
    fifo = os.open(f"{DIR}/fifo", os.O_RDWR)
    os.write(fifo, b"mine")
    shown = os.open(f"{DIR}/file", os.O_RDWR)
    os.lseek(shown, 2, os.SEEK_SET)
    served = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    served.bind(f"{DIR}/served")
    served.listen()
    print("SERVED", flush=True)
    client = served.accept()[0]
    wait()
    print("stream", conn.recv(100), conn.recv(100), fails(lambda: conn.send(b"x")))
    print("waiting", waiting.recv(100))
    print("log", fails(lambda: log.send(b"x")))
    print("reading", os.read(reading, 100), os.read(reading, 100))
    print("writing", fails(lambda: os.write(writing, b"x")))
    print("terminal", os.read(terminal, 100), fails(lambda: os.write(terminal, b"x")))
    print("file", os.read(file, 100), os.write(file, b"branch"))
    print("fifo", os.read(fifo, 100))
    print("shown", os.read(shown, 100), os.pwrite(shown, b"branch", 0), os.pread(shown, 100, 0))
    print("client", client.recv(100), client.recv(100))
    late = served.accept()[0]
    print("late", late.recv(100), late.recv(100))


def again() -> None:
    conn = stream("busy")
    log = datagram()
    fifo = os.open(f"{DIR}/fifo", os.O_WRONLY)
    shown = os.open(f"{DIR}/file", os.O_RDWR | os.O_APPEND)
    wait()
    for write in (conn.send, log.send, lambda data: os.write(fifo, data), lambda data: os.write(shown, data)):
        write(b"here")


{"cut": cut, "again": again}[sys.argv[1]]()
print("END", flush=True)
