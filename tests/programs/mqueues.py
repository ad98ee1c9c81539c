"""POSIX message queues: what is in them, who waits, who is to be notified."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import struct
import threading
from pathlib import Path

from inpod import bad, case, child, equal, frozen, main, reap, true, within

libc = ctypes.CDLL(None, use_errno=True)
PLACE = Path("/dev/mqueue")


class Attributes(ctypes.Structure):
    """struct mq_attr."""

    _fields_ = [("flags", ctypes.c_long), ("most", ctypes.c_long), ("size", ctypes.c_long), ("now", ctypes.c_long)]
    _fields_ += [("reserved", ctypes.c_long * 4)]


class Event(ctypes.Structure):
    """struct sigevent."""

    _fields_ = [("value", ctypes.c_uint64), ("signo", ctypes.c_int), ("notify", ctypes.c_int)]
    _fields_ += [("function", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("rest", ctypes.c_char * 64)]


def opened(name: str, flags: int, most: int = 4, size: int = 1024) -> int:
    """A queue's descriptor. Small ones: all of a user's queues, in all pods, share 800 kB."""
    fd = libc.mq_open(name.encode(), flags, 0o640, ctypes.byref(Attributes(0, most, size, 0)))
    assert fd >= 0, (name, os.strerror(ctypes.get_errno()))
    return int(fd)


def send(fd: int, data: bytes, priority: int = 0) -> None:
    """Puts a message in."""
    if libc.mq_send(fd, data, len(data), priority):
        raise OSError(ctypes.get_errno(), "mq_send")


def receive(fd: int) -> tuple[int, bytes]:
    """(priority, data)."""
    buffer, priority = ctypes.create_string_buffer(1 << 16), ctypes.c_uint()
    got = libc.mq_receive(fd, buffer, len(buffer), ctypes.byref(priority))
    if got < 0:
        raise OSError(ctypes.get_errno(), "mq_receive")
    return priority.value, buffer.raw[:got]


def everything(fd: int) -> list[tuple[int, bytes]]:
    """All messages, which are taken out."""
    found = []
    try:
        while True:
            found.append(receive(fd))
    except BlockingIOError:
        return found


def attributes(fd: int) -> tuple[int, int, int, int]:
    """Flags, most messages, size of one, messages in it."""
    found = Attributes()
    assert libc.mq_getattr(fd, ctypes.byref(found)) == 0
    return found.flags, found.most, found.size, found.now


def name_of(what: str) -> str:
    """A name that is this process's only."""
    return f"/{what}-{os.getpid()}"


@case
def contents() -> None:
    """Messages of many priorities and sizes in their order, attributes, owner, mode, one that nobody has open."""
    queue = opened(name_of("full"), os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 5, 8192)
    wanted = [(number % 2, bytes([number]) * (number * 2000)) for number in range(5)]
    for priority, data in wanted:
        send(queue, data, priority)
    try:
        send(queue, b"too many")
        bad("set-up: the queue isn't full")
    except BlockingIOError:
        pass
    alone = opened(name_of("alone"), os.O_WRONLY | os.O_CREAT, 3, 17)
    send(alone, b"x" * 17, 32767)
    send(alone, b"", 5)
    os.fchown(alone, 12, 34)
    os.fchmod(alone, 0o604)
    os.close(alone)
    before = attributes(queue), facts(name_of("alone")), facts(name_of("full"))
    frozen()
    after = attributes(queue), facts(name_of("alone")), facts(name_of("full"))
    equal("attributes", after, before)
    equal("messages", everything(queue), sorted(wanted, key=lambda message: -message[0]))
    alone = opened(name_of("alone"), os.O_RDONLY | os.O_NONBLOCK)
    equal("of the other", (attributes(alone)[1:], everything(alone)), ((3, 17, 2), [(32767, b"x" * 17), (5, b"")]))
    equal("a fresh queue", attributes(opened(name_of("new"), os.O_RDWR | os.O_CREAT, 7, 100)), (0, 7, 100, 0))


def facts(name: str) -> tuple[int, ...]:
    """Mode, owner, times of a queue."""
    found = os.stat(PLACE / name[1:])
    return found.st_mode, found.st_uid, found.st_gid, found.st_atime_ns, found.st_mtime_ns


@case
def descriptors() -> None:
    """Opened by mq_open and by path, shared, inherited, unlinked, unlinked with a new one of that name, in epoll."""
    first = opened(name_of("one"), os.O_RDWR | os.O_CREAT)
    reading = opened(name_of("one"), os.O_RDONLY | os.O_NONBLOCK)
    by_path = os.open(PLACE / name_of("one")[1:], os.O_RDONLY)
    gone = [opened(name_of("gone"), os.O_RDWR | os.O_CREAT), opened(name_of("gone"), os.O_RDONLY | os.O_NONBLOCK)]
    send(gone[0], b"in no place", 3)
    libc.mq_unlink(name_of("gone").encode())
    again = opened(name_of("gone"), os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)
    send(again, b"in the new one")
    os.dup2(first, 88)
    poll = select.epoll()
    poll.register(reading, select.EPOLLIN)
    poll.register(gone[1], select.EPOLLIN | select.EPOLLET)
    equal("set-up", [fd for fd, _ in poll.poll(60)], [gone[1]])
    fds = [first, reading, by_path, *gone, again, 88]

    def body() -> None:
        equal("child receives", receive(first), (1, b"for the child"))

    pid = child(body)

    def seen() -> list[tuple[str, tuple[int, ...], int]]:
        return [(os.readlink(f"/proc/self/fd/{fd}"), attributes(fd), os.fstat(fd).st_nlink) for fd in fds]

    before = seen()
    frozen()
    equal("names, attributes, links", seen(), before)
    send(88, b"for the child", 1)
    reap(pid)
    send(first, b"for epoll")
    true("epoll", reading in dict(poll.poll(60)))
    equal("by the other descriptor", everything(reading), [(0, b"for epoll")])
    equal("of the unlinked one", everything(gone[1]), [(3, b"in no place")])
    equal("of its successor", everything(again), [(0, b"in the new one")])
    equal("read as a file", os.read(by_path, 6), b"QSIZE:")


@case
def waiting() -> None:
    """Somebody is blocked in receiving, somebody in sending to a full queue; one with a timeout far away."""
    empty = opened(name_of("empty"), os.O_RDWR | os.O_CREAT)
    full = opened(name_of("filled"), os.O_RDWR | os.O_CREAT, 1, 10)
    send(full, b"first")
    got: list[tuple[int, bytes]] = []

    def body() -> None:
        send(full, b"second")

    receiver = threading.Thread(target=lambda: got.append(receive(empty)))
    receiver.start()
    pid = child(body)
    frozen()
    true("still waiting", receiver.is_alive())
    equal("one after the other", [receive(full), receive(full)], [(0, b"first"), (0, b"second")])
    reap(pid)
    send(empty, b"at last", 9)
    receiver.join(60)
    equal("what came", got, [(9, b"at last")])


@case
def notifications() -> None:
    """By signal with a value, by nothing, by a thread of glibc's (a netlink socket); none with messages in it."""
    told: list[int] = []
    queue = opened(name_of("signal"), os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)
    other = opened(name_of("thread"), os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)
    nothing = opened(name_of("nothing"), os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)
    number = signal.SIGRTMIN + 3
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    event = Event(0x123456789ABC, number, 0)
    equal("set-up", libc.mq_notify(queue, ctypes.byref(event)), 0)
    equal("set-up", libc.mq_notify(nothing, ctypes.byref(Event(0, 0, 1))), 0)
    call = ctypes.CFUNCTYPE(None, ctypes.c_uint64)(told.append)
    event = Event(77, 0, 2, ctypes.cast(call, ctypes.c_void_p))
    equal("set-up", libc.mq_notify(other, ctypes.byref(event)), 0)
    held = opened(name_of("held"), os.O_RDWR | os.O_CREAT)
    send(held, b"x")
    equal("set-up", libc.mq_notify(held, ctypes.byref(Event(5, number, 0))), 0)

    def body() -> None:
        for fd in (queue, other, nothing, held):
            if libc.mq_notify(fd, ctypes.byref(Event(0, number, 0))) == 0:
                bad(f"child could register for {fd}")
            equal("child: why not", ctypes.get_errno(), errno.EBUSY)
        send(queue, b"news")

    frozen()
    pid = child(body)
    reap(pid)
    info = signal.sigtimedwait([number], 60)
    true("a signal came", info)
    if info:
        equal("from", (info.si_code, info.si_pid), (-3, pid))  # SI_MESGQ
    send(other, b"news")  # now: glibc's thread doesn't block the signal
    true("the thread was called", within(60, lambda: told))
    equal("with its value", told, [77])
    equal("no more of them", signal.sigtimedwait([number], 0), None)
    equal("messages", [everything(fd) for fd in (queue, other)], [[(0, b"news")]] * 2)
    send(queue, struct.pack("Q", 1))
    equal("once only", signal.sigtimedwait([number], 0), None)
    receive(held)
    send(held, b"y")
    true("when it was empty and isn't any more", signal.sigtimedwait([number], 60))


if __name__ == "__main__":
    main()
