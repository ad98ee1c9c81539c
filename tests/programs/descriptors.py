"""Descriptors of regular files, directories, pipes, FIFOs, event objects, devices, terminals."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import pty
import select
import signal
import socket
import stat
import struct
import termios
import threading
import time
from pathlib import Path

from inpod import bad, case, child, equal, frozen, main, reap, runs_down, true, wait_go, within

libc = ctypes.CDLL(None, use_errno=True)


def same_description(first: int, second: int) -> bool:
    """Whether two descriptors of this process share one open file description (by moving its offset)."""
    at = os.lseek(first, 0, os.SEEK_CUR)
    os.lseek(first, at + 1, os.SEEK_SET)
    shared = os.lseek(second, 0, os.SEEK_CUR) == at + 1
    os.lseek(first, at, os.SEEK_SET)
    return shared


def pattern(size: int, seed: int) -> bytes:
    """`size` bytes that don't repeat soon and differ by `seed`."""
    block = b"".join(struct.pack("<QQ", seed, number) for number in range(256))
    return (block * (size // len(block) + 1))[:size]


@case
def offsets_and_flags() -> None:
    """Regular files: number, offset, access mode, append, nonblocking, close-on-exec, noatime."""
    Path("data").write_bytes(pattern(10000, 1))
    reading = os.open("data", os.O_RDONLY)
    os.lseek(reading, 1234, os.SEEK_SET)
    writing = os.open("data", os.O_WRONLY | os.O_NONBLOCK)
    os.lseek(writing, 5000, os.SEEK_SET)
    appending = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    os.write(appending, b"before\n")
    both = os.open("data", os.O_RDWR | os.O_NOATIME)
    os.lseek(both, 1 << 40, os.SEEK_SET)  # far beyond the end
    far = 900
    os.dup2(reading, far, inheritable=True)
    fds = [reading, writing, appending, both, far]

    def facts() -> list[tuple[int, ...]]:
        return [
            (fd, os.lseek(fd, 0, os.SEEK_CUR), fcntl.fcntl(fd, fcntl.F_GETFL), fcntl.fcntl(fd, fcntl.F_GETFD))
            for fd in fds
        ]

    before = facts()
    listing = sorted(os.listdir("/proc/self/fd"), key=int)
    frozen()
    equal("number, offset, flags, fd flags", facts(), before)
    equal("open descriptors", sorted(os.listdir("/proc/self/fd"), key=int), listing)
    equal("what is read next", os.read(reading, 100), pattern(10000, 1)[1234:1334])
    equal("offset seen through the duplicate", os.lseek(far, 0, os.SEEK_CUR), 1334)
    os.write(appending, b"after\n")
    equal("appended", Path("log").read_text(), "before\nafter\n")


@case
def sharing() -> None:
    """Shared by dup, shared by fork, opened twice: who moves whose offset stays as it was."""
    Path("data").write_bytes(pattern(5000, 2))
    one = os.open("data", os.O_RDONLY)
    two = os.dup(one)
    other = os.open("data", os.O_RDONLY)
    read_end, write_end = os.pipe()

    def body() -> None:
        wait_go()
        true("the parent has looked", within(60, lambda: os.path.exists("looked")))
        os.lseek(one, 4321, os.SEEK_SET)
        os.close(read_end)
        os.write(write_end, b"moved")

    pid = child(body)
    frozen()
    true("dup shares", same_description(one, two))
    true("a second open doesn't", not same_description(one, other))
    Path("looked").touch()
    equal("child's word", os.read(read_end, 10), b"moved")
    equal("the child moved our offset", os.lseek(two, 0, os.SEEK_CUR), 4321)
    equal("and not the other's", os.lseek(other, 0, os.SEEK_CUR), 0)
    reap(pid)


@case
def passed_from_afar() -> None:
    """A description shared by cousins that got it through a socket, with numbers of their own."""
    left, right = socket.socketpair()
    Path("data").write_bytes(pattern(5000, 3))

    def receiver() -> None:
        _, fds, _, _ = socket.recv_fds(right, 1, 1)
        os.dup2(fds[0], 77)
        os.close(fds[0])
        wait_go()
        true("offset moved by the other", within(60, lambda: os.lseek(77, 0, os.SEEK_CUR) == 99))

    pid = child(receiver)
    fd = os.open("data", os.O_RDONLY)
    socket.send_fds(left, [b"x"], [fd])
    time.sleep(0.2)
    frozen()
    os.lseek(fd, 99, os.SEEK_SET)
    reap(pid)


@case
def directory_half_read() -> None:
    """A directory read half-way goes on without losing or repeating a name; also opened by O_PATH."""
    os.makedirs("many", exist_ok=True)
    names = {f"file-{number:04}" for number in range(1000)}
    for name in names:
        Path("many", name).touch()
    half = os.scandir("many")
    seen = [next(half).name for _ in range(500)]
    directory = os.open("many", os.O_RDONLY | os.O_DIRECTORY)
    by_path = os.open("many/file-0001", os.O_PATH | os.O_NOFOLLOW)
    frozen()
    seen += [entry.name for entry in half]
    equal("names missing", sorted(names - set(seen)), [])
    equal("names twice", len(seen), len(set(seen)))
    equal("relative to the directory", os.stat("file-0007", dir_fd=directory).st_size, 0)
    equal("O_PATH", os.readlink(f"/proc/self/fd/{by_path}"), os.path.abspath("many/file-0001"))


@case
def unlinked_small() -> None:
    """Unlinked files: opened, shared by a child, one with a name again in its place."""
    data = pattern(30000, 4)
    gone = os.open("gone", os.O_RDWR | os.O_CREAT)
    os.write(gone, data)
    os.unlink("gone")
    replaced = os.open("replaced", os.O_RDWR | os.O_CREAT)
    os.write(replaced, b"old")
    os.unlink("replaced")
    Path("replaced").write_bytes(b"new")
    empty = os.open("empty", os.O_RDWR | os.O_CREAT)
    os.unlink("empty")
    unnamed = os.open(".", os.O_RDWR | os.O_TMPFILE, 0o600)
    os.write(unnamed, b"never had a name")
    read_only = os.open("replaced", os.O_RDONLY)
    os.rename("replaced", "renamed")
    os.unlink("renamed")

    def body() -> None:
        wait_go()
        equal("child: content", os.pread(gone, len(data), 0), data)
        os.pwrite(gone, b"child", 0)

    pid = child(body)
    frozen()
    reap(pid)
    equal("content as changed by the child", os.pread(gone, len(data), 0), b"child" + data[5:])
    equal("offset", os.lseek(gone, 0, os.SEEK_CUR), len(data))
    equal("links", [os.fstat(fd).st_nlink for fd in (gone, replaced, empty, unnamed, read_only)], [0] * 5)
    equal("content of the replaced one", os.pread(replaced, 10, 0), b"old")
    equal("content of the renamed one", os.pread(read_only, 10, 0), b"new")
    equal("an empty one", os.fstat(empty).st_size, 0)
    equal("one that never had a name", os.pread(unnamed, 100, 0), b"never had a name")
    equal("nothing of them is seen", sorted(os.listdir(".")), ["go"])


@case
def unlinked_large() -> None:
    """An unlinked file of 200 MB, rewritten here and there between the checkpoints by a child."""
    size, step = 200 << 20, 1 << 20
    fd = os.open("large", os.O_RDWR | os.O_CREAT)
    for at in range(0, size, step):
        os.pwrite(fd, pattern(step, at), at)
    os.unlink("large")
    counter = os.open("counter", os.O_RDWR | os.O_CREAT)
    os.unlink("counter")

    def body() -> None:
        number = 0
        while not os.path.exists("go"):
            number += 1
            os.pwrite(fd, struct.pack("<Q", number), (number * 7919 * 4096) % size & ~4095)
            os.pwrite(counter, struct.pack("<Q", number), 0)
            time.sleep(0.005)
        equal("child: counter", struct.unpack("<Q", os.pread(counter, 8, 0))[0], number)

    pid = child(body)
    frozen()
    reap(pid)
    number = struct.unpack("<Q", os.pread(counter, 8, 0))[0]
    places = {(turn * 7919 * 4096) % size & ~4095: turn for turn in range(1, number + 1)}
    for at in range(0, size, step):
        wanted = bytearray(pattern(step, at))
        for place in range(at, at + step, 4096):
            if place in places:
                wanted[place - at : place - at + 8] = struct.pack("<Q", places[place])
        if os.pread(fd, step, at) != wanted:
            bad(f"content at {at:#x}")
            break


@case
def hard_links() -> None:
    """A file opened by a name that has gone while another name stays: it is one file, not a copy."""
    Path("first").write_bytes(b"one file")
    fd = os.open("first", os.O_RDWR)
    os.link("first", "second")
    os.unlink("first")
    frozen()
    os.pwrite(fd, b"ONE", 0)
    equal("through the other name", Path("second").read_bytes(), b"ONE file")
    equal("inode", os.fstat(fd).st_ino, os.stat("second").st_ino)


@case
def renamed() -> None:
    """A file renamed since it was opened, its directory renamed too."""
    os.mkdir("old")
    fd = os.open("old/name", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"text")
    os.rename("old/name", "old/other")
    os.rename("old", "new")
    frozen()
    equal("path", os.readlink(f"/proc/self/fd/{fd}"), os.path.abspath("new/other"))
    os.pwrite(fd, b"T", 0)
    equal("content", Path("new/other").read_bytes(), b"Text")


@case
def names_that_are_no_text() -> None:
    """Names of every kind with bytes that are no UTF-8: of the process, and of what it has open."""
    Path("/proc/self/comm").write_bytes(b"\xff\xfe odd")
    os.mkdir(b"\xff")
    os.chdir(b"\xff")
    for name in (b"kept\xff", b"gone\xff"):
        Path(os.fsdecode(name)).write_bytes(name)
        os.mkfifo(name + b".fifo")
        os.mkdir(name + b".dir")
    fds = {name: os.open(name, os.O_RDWR) for name in (b"kept\xff", b"gone\xff", b"kept\xff.fifo", b"gone\xff.fifo")}
    fds |= {name: os.open(name, os.O_RDONLY) for name in (b"kept\xff.dir", b"gone\xff.dir")}
    memory = os.open(b"/dev/shm/\xff%d" % os.getpid(), os.O_RDWR | os.O_CREAT)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.abspath(b"\xff.socket"))
    listener.listen()
    abstract = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    abstract.bind(b"\0\xff%d" % os.getpid())
    os.unlink(b"gone\xff")
    os.unlink(b"gone\xff.fifo")
    os.rmdir(b"gone\xff.dir")

    def facts() -> list[object]:
        links = [os.readlink(b"/proc/self/fd/%d" % fd) for fd in (*fds.values(), memory)]
        return [links, os.getcwdb(), listener.getsockname(), abstract.getsockname()]

    before = facts()
    frozen()
    equal("names", facts(), before)
    equal("name of the process", Path("/proc/self/comm").read_bytes(), b"\xff\xfe odd\n")
    equal("unlinked file", os.pread(fds[b"gone\xff"], 100, 0), b"gone\xff")
    client = socket.socket(socket.AF_UNIX)
    client.connect(os.path.abspath(b"\xff.socket"))
    os.unlink(b"/dev/shm/\xff%d" % os.getpid())


@case
def deleted_directories() -> None:
    """Directories that were removed while open, and while being someone's working directory."""
    os.makedirs("gone/below")
    fd = os.open("gone/below", os.O_RDONLY | os.O_DIRECTORY)
    here = os.path.abspath("go")

    def body() -> None:
        os.chdir("gone/below")
        while not os.path.exists(here):
            time.sleep(0.02)
        equal("listing of a removed working directory", os.listdir("."), [])
        equal("links of a removed working directory", os.stat(".").st_nlink, 0)

    pid = child(body)
    true("set-up", within(60, lambda: os.readlink(f"/proc/{pid}/cwd").endswith("gone/below")))
    os.rmdir("gone/below")
    os.rmdir("gone")
    frozen()
    equal("listing", os.listdir(fd), [])
    equal("links", os.fstat(fd).st_nlink, 0)
    try:
        os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
        bad("a file could be made in a removed directory")
    except FileNotFoundError:
        pass
    reap(pid)
    equal("nothing is there", os.path.exists("gone"), False)


@case
def lower_files() -> None:
    """Open files of the root file system below, one of them changed (copied up) after the first open."""
    Path("mine").write_bytes(b"mine")
    fd = os.open("/etc/passwd", os.O_RDONLY)
    text = os.read(fd, 50)
    rest = Path("/etc/passwd").read_bytes()[50:100]
    executable = os.open("/bin/sh", os.O_RDONLY)
    frozen()
    equal("goes on reading", os.read(fd, 50), rest)
    true("something was read", text)
    equal("magic", os.pread(executable, 4, 0), b"\x7fELF")


@case
def pipes() -> None:
    """Pipes with bytes in them: nearly empty, full, resized, packets, ends closed, ends in two processes."""
    few, full, sized, packets = os.pipe(), os.pipe(), os.pipe(), os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
    os.write(few[1], b"a few bytes")
    os.set_blocking(full[1], False)
    filled = os.write(full[1], pattern(1 << 20, 5))
    fcntl.fcntl(sized[1], 1031, 1 << 18)  # F_SETPIPE_SZ
    os.write(sized[1], pattern(100000, 6))
    for text in (b"one", b"two", b"three"):
        os.write(packets[1], text)
    no_writer, no_reader = os.pipe(), os.pipe()
    os.write(no_writer[1], b"last words")
    os.close(no_writer[1])
    os.close(no_reader[0])

    def body() -> None:
        os.close(few[1])
        equal("child reads", os.read(few[0], 5), b"a few")
        wait_go()
        time.sleep(0.2)

    pid = child(body)
    time.sleep(0.3)
    frozen()
    reap(pid)
    equal("rest after the child", os.read(few[0], 100), b" bytes")
    equal("full pipe", b"".join(iter_read(full[0], filled)), pattern(filled, 5))
    os.write(full[1], b"room again")
    equal("capacity", fcntl.fcntl(sized[1], 1032), 1 << 18)
    equal("resized pipe", b"".join(iter_read(sized[0], 100000)), pattern(100000, 6))
    equal("packets", [os.read(packets[0], 100) for _ in range(3)], [b"one", b"two", b"three"])
    equal("a pipe without writers", (os.read(no_writer[0], 100), os.read(no_writer[0], 100)), (b"last words", b""))
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        os.write(no_reader[1], b"x")
        bad("a pipe without readers took bytes")
    except BrokenPipeError:
        pass


def iter_read(fd: int, size: int) -> list[bytes]:
    """Reads until `size` bytes have come."""
    parts: list[bytes] = []
    while size > 0:
        parts.append(os.read(fd, min(size, 65536)))
        if not parts[-1]:
            break
        size -= len(parts[-1])
    return parts


@case
def pipeline() -> None:
    """Bytes streaming through a chain of five processes: none lost, none twice."""
    total = 20_000_000
    first = os.pipe()

    def source(write_end: int) -> None:
        sent = 0
        while sent < total or not os.path.exists("go"):
            at = sent % 1_000_000
            sent += os.write(write_end, stream[at : at + 50000])
        os.close(write_end)

    def middle(read_end: int, write_end: int) -> None:
        while data := os.read(read_end, 30000):
            view = memoryview(data)
            while view:
                view = view[os.write(write_end, view) :]

    stream = pattern(1_050_000, 7)
    stream = stream[:1_000_000] + stream[:50_000]
    pids = []
    ends = [first]
    pids.append(child(lambda: (os.close(first[0]), source(first[1]))))  # type: ignore[func-returns-value]
    for _ in range(3):
        os.close(ends[-1][1])
        following = os.pipe()
        feed = ends[-1][0]
        pids.append(child(lambda feed=feed, ends=following: (os.close(ends[0]), middle(feed, ends[1]))))  # type: ignore
        os.close(feed)
        ends.append(following)
    os.close(ends[-1][1])
    print("READY", flush=True)
    got = 0
    while data := os.read(ends[-1][0], 40000):
        at = got % 1_000_000
        wanted = (stream[at:1_000_000] + stream[:1_000_000])[: len(data)]
        if data != wanted:
            bad(f"stream differs at byte {got}")
            break
        got += len(data)
        if not os.path.exists("go"):
            time.sleep(0.0005)
    true(f"all came: {got}", got >= total)
    for pid in pids:
        reap(pid)


@case
def fifos() -> None:
    """Named pipes with bytes in them, one of them unlinked, one with its writer in a child."""
    os.mkfifo("named")
    os.mkfifo("unlinked")
    both = os.open("named", os.O_RDWR | os.O_NONBLOCK)
    os.write(both, b"in the fifo")
    gone = os.open("unlinked", os.O_RDWR)
    os.write(gone, b"in no place")
    os.unlink("unlinked")
    os.mkfifo("talk")

    def body() -> None:
        fd = os.open("talk", os.O_WRONLY)
        os.write(fd, b"first ")
        wait_go()
        os.write(fd, b"second")

    pid = child(body)
    reader = os.open("talk", os.O_RDONLY)
    frozen()
    reap(pid)
    equal("named", os.read(both, 100), b"in the fifo")
    equal("unlinked", os.read(gone, 100), b"in no place")
    equal("between processes", b"".join(iter_read(reader, 12)), b"first second")
    equal("end of it", os.read(reader, 10), b"")
    opened = os.open("named", os.O_WRONLY | os.O_NONBLOCK)
    os.write(opened, b"anew")
    equal("opened anew by name", os.read(both, 100), b"anew")


@case
def fifo_open_blocked() -> None:
    """A process blocked in opening a FIFO that nobody writes yet."""
    os.mkfifo("lonely")

    def body() -> None:
        fd = os.open("lonely", os.O_RDONLY)
        equal("what came", os.read(fd, 10), b"hello")

    pid = child(body)
    time.sleep(0.2)
    frozen()
    fd = os.open("lonely", os.O_WRONLY)
    os.write(fd, b"hello")
    os.close(fd)
    reap(pid)


@case
def eventfds() -> None:
    """eventfd: counters, semaphore mode, one shared by a child that waits on it."""
    counter = os.eventfd(5)
    semaphore = os.eventfd(3, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
    maximum = os.eventfd(0, os.EFD_NONBLOCK)
    os.eventfd_write(maximum, 2**64 - 2)
    waited = os.eventfd(0)

    def body() -> None:
        equal("what the child waited for", os.eventfd_read(waited), 7)

    pid = child(body)
    time.sleep(0.1)
    frozen()
    os.eventfd_write(counter, 2)
    equal("counter", os.eventfd_read(counter), 7)
    equal("semaphore", [os.eventfd_read(semaphore) for _ in range(3)], [1, 1, 1])
    try:
        os.eventfd_read(semaphore)
        bad("semaphore has more than 3")
    except BlockingIOError:
        pass
    equal("maximum", os.eventfd_read(maximum), 2**64 - 2)
    os.eventfd_write(waited, 7)
    reap(pid)


class Itimerspec(ctypes.Structure):
    """struct itimerspec, timerfd_settime(2)."""

    _fields_ = [("interval", ctypes.c_long * 2), ("value", ctypes.c_long * 2)]


def timerfd(clock: int, value: float, interval: float, flags: int = 0) -> int:
    """A timerfd armed relative (or absolute: flags 1) with s."""
    fd = libc.timerfd_create(clock, 0o4000)
    both = [(int(t), int(t % 1 * 1e9)) for t in (interval, value)]
    spec = Itimerspec((ctypes.c_long * 2)(*both[0]), (ctypes.c_long * 2)(*both[1]))
    assert libc.timerfd_settime(fd, flags, ctypes.byref(spec), None) == 0
    return int(fd)


def timerfd_left(fd: int) -> tuple[float, float]:
    """Remaining and interval, s."""
    spec = Itimerspec()
    assert libc.timerfd_gettime(fd, ctypes.byref(spec)) == 0
    return spec.value[0] + spec.value[1] / 1e9, spec.interval[0] + spec.interval[1] / 1e9


@case
def timerfds() -> None:
    """timerfd: far, periodic, absolute, disarmed, expired and unread; on monotonic, boot and real clock."""
    monotonic, realtime, boottime = 1, 0, 7
    began = time.monotonic()
    far = timerfd(monotonic, 1000, 0)
    boot = timerfd(boottime, 500, 250)
    soon = timerfd(monotonic, time.monotonic() + 0.2, 0, 1)
    periodic = timerfd(monotonic, 0.1, 0.1)
    idle = timerfd(monotonic, 0, 0)
    wall = timerfd(realtime, time.time() + 5000, 0, 1)
    expired = timerfd(monotonic, 0.01, 0)
    armed = time.monotonic()
    for fd in (soon, expired):
        true("set-up: expires", select.select([fd], [], [], 30)[0])
    frozen()
    at = time.monotonic()
    left, _ = timerfd_left(far)
    runs_down("far", left, 1000, (began, armed), at)
    at = time.monotonic()
    left, interval = timerfd_left(boot)
    runs_down("boot", left, 500, (began, armed), at)
    equal("interval", interval, 250.0)
    left, _ = timerfd_left(wall)
    true(f"wall: {left} left", 0 < left <= 5000)
    equal("idle", timerfd_left(idle), (0.0, 0.0))
    equal("one expiry unread", os.read(expired, 8), struct.pack("<Q", 1))
    equal("absolute one has expired once", os.read(soon, 8), struct.pack("<Q", 1))
    at = time.monotonic()
    count = struct.unpack("<Q", os.read(periodic, 8))[0]
    # what expires while the pod is being looked at, up to a second on a busy machine, may go uncounted
    least, most = (at - armed) / 0.1 - 12, (time.monotonic() - began) / 0.1 + 2
    true(f"periodic: {count} expiries, not {least} to {most}", least <= count <= most)
    true("goes on ticking", select.select([periodic], [], [], 30)[0])


class SignalfdSiginfo(ctypes.Structure):
    """The head of struct signalfd_siginfo, signalfd(2)."""

    _fields_ = [
        ("signo", ctypes.c_uint32),
        ("errno", ctypes.c_int32),
        ("code", ctypes.c_int32),
        ("pid", ctypes.c_uint32),
    ]


@case
def signalfds() -> None:
    """signalfd: its mask, and signals that were pending come out of it."""
    wanted = [signal.SIGUSR1, signal.SIGRTMIN + 2, signal.SIGCHLD]
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
    mask = sum(1 << (int(number) - 1) for number in wanted)
    fd = libc.syscall(289, -1, ctypes.byref(ctypes.c_uint64(mask)), 8, 0o4000)  # signalfd4, SFD_NONBLOCK
    true("set-up", fd >= 0)
    os.kill(os.getpid(), signal.SIGUSR1)
    frozen()
    first = SignalfdSiginfo.from_buffer_copy(os.read(fd, 128))
    equal("pending signal", (first.signo, first.pid), (int(signal.SIGUSR1), os.getpid()))
    os.kill(os.getpid(), signal.SIGRTMIN + 2)
    equal("a new one", SignalfdSiginfo.from_buffer_copy(os.read(fd, 128)).signo, signal.SIGRTMIN + 2)
    pid = child(lambda: None)
    true("readable at a child's end", select.select([fd], [], [], 60)[0])
    equal("of", SignalfdSiginfo.from_buffer_copy(os.read(fd, 128)).pid, pid)
    reap(pid)


@case
def epolls() -> None:
    """epoll: level, edge, one-shot, data words, nested, closed and duplicated descriptors, a thread waiting."""
    ready, edge, once, quiet, inner_pipe = (os.pipe() for _ in range(5))
    poll = select.epoll()
    poll.register(ready[0], select.EPOLLIN)
    poll.register(edge[0], select.EPOLLIN | select.EPOLLET)
    poll.register(once[0], select.EPOLLIN | select.EPOLLONESHOT)
    poll.register(quiet[0], select.EPOLLIN)
    for pipe in (ready, edge, once):
        os.write(pipe[1], b"x")
    equal("set-up", len(poll.poll(0)), 3)
    inner = select.epoll()
    inner.register(inner_pipe[0], select.EPOLLIN)
    poll.register(inner.fileno(), select.EPOLLIN)
    renumbered = os.pipe()
    duplicate = os.dup(renumbered[0])
    poll.register(renumbered[0], select.EPOLLIN)
    os.write(renumbered[1], b"z")
    events: list[list[tuple[int, int]]] = []
    second = select.epoll()
    waited = os.pipe()
    second.register(waited[0], select.EPOLLIN | select.EPOLLPRI | select.EPOLLRDHUP)
    waiter = threading.Thread(target=lambda: events.append(second.poll()))
    waiter.start()
    info = sorted(Path(f"/proc/self/fdinfo/{poll.fileno()}").read_text().splitlines()[1:])
    registered = [line.split("ino:")[0] for line in info if line.startswith("tfd")]
    frozen()
    now = sorted(Path(f"/proc/self/fdinfo/{poll.fileno()}").read_text().splitlines()[1:])
    equal("registrations", [line.split("ino:")[0] for line in now if line.startswith("tfd")], registered)
    got = dict(poll.poll(1))
    equal("level-triggered is still ready", got.get(ready[0]), select.EPOLLIN)
    equal("renumbered is ready", got.get(renumbered[0]), select.EPOLLIN)
    true("one-shot stays disarmed", once[0] not in got)
    true("quiet is quiet", quiet[0] not in got)
    os.write(quiet[1], b"y")
    equal("quiet wakes", dict(poll.poll(5)).get(quiet[0]), select.EPOLLIN)
    os.write(edge[1], b"y")
    equal("edge wakes", dict(poll.poll(5)).get(edge[0]), select.EPOLLIN)
    poll.modify(once[0], select.EPOLLIN | select.EPOLLONESHOT)
    equal("one-shot re-armed", dict(poll.poll(5)).get(once[0]), select.EPOLLIN)
    os.write(inner_pipe[1], b"w")
    equal("nested", dict(poll.poll(5)).get(inner.fileno()), select.EPOLLIN)
    os.write(waited[1], b"v")
    waiter.join(60)
    equal("the waiting thread got", events, [[(waited[0], select.EPOLLIN)]])
    os.close(duplicate)


@case
def epoll_shared() -> None:
    """An epoll shared by parent and child, both waiting in it; and one whose child has other numbers open."""
    pipe = os.pipe()
    poll = select.epoll()
    poll.register(pipe[0], select.EPOLLIN | select.EPOLLET)
    wake = os.pipe()

    def body() -> None:
        os.dup2(wake[1], 60)
        equal("child's event", poll.poll(), [(pipe[0], select.EPOLLIN)])
        os.write(60, b"child")

    pid = child(body)
    time.sleep(0.2)
    frozen()
    os.write(pipe[1], b"x")
    equal("told by the child", os.read(wake[0], 10), b"child")
    reap(pid)


@case
def memfds() -> None:
    """memfd: content, holes, seals, name, mapped shared by a child."""
    import mmap

    fd = os.memfd_create("a name", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 24)
    os.pwrite(fd, pattern(100000, 8), 4096 * 17)
    os.pwrite(fd, b"end", (1 << 24) - 3)
    sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.write(sealed, b"for ever")
    fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    plain = os.memfd_create("plain", 0)
    os.write(plain, b"text")
    area = mmap.mmap(fd, 1 << 24)

    def body() -> None:
        wait_go()
        area[0:5] = b"child"

    pid = child(body)
    names = [os.readlink(f"/proc/self/fd/{one}") for one in (fd, sealed, plain)]
    seals = [fcntl.fcntl(one, fcntl.F_GET_SEALS) for one in (fd, sealed, plain)]
    frozen()
    reap(pid)
    equal("written by the child", (os.pread(fd, 5, 0), area[0:5]), (b"child", b"child"))
    equal("content", area[4096 * 17 : 4096 * 17 + 100000], pattern(100000, 8))
    equal("end", os.pread(fd, 10, (1 << 24) - 3), b"end")
    equal("hole", os.pread(fd, 4096, 1 << 20), bytes(4096))
    equal("names", [os.readlink(f"/proc/self/fd/{one}") for one in (fd, sealed, plain)], names)
    equal("seals", [fcntl.fcntl(one, fcntl.F_GET_SEALS) for one in (fd, sealed, plain)], seals)
    equal("sealed content", os.pread(sealed, 100, 0), b"for ever")
    try:
        os.write(sealed, b"x")
        bad("a sealed file was written")
    except PermissionError:
        pass


@case
def devices() -> None:
    """/dev/null, zero, full, random, urandom and what they do."""
    names = ["/dev/null", "/dev/zero", "/dev/full", "/dev/urandom", "/dev/random"]
    fds = {name: os.open(name, os.O_RDWR if name != "/dev/random" else os.O_RDONLY) for name in names}
    numbers = {name: os.fstat(fd).st_rdev for name, fd in fds.items()}
    frozen()
    equal("device numbers", {name: os.fstat(fd).st_rdev for name, fd in fds.items()}, numbers)
    equal("null", (os.read(fds["/dev/null"], 10), os.write(fds["/dev/null"], b"abc")), (b"", 3))
    equal("zero", os.read(fds["/dev/zero"], 10), bytes(10))
    true("urandom", os.read(fds["/dev/urandom"], 16) != os.read(fds["/dev/urandom"], 16))
    try:
        os.write(fds["/dev/full"], b"x")
        bad("/dev/full took a byte")
    except OSError as error:
        equal("full", error.errno, 28)


@case
def terminals() -> None:
    """A pty pair: bytes both ways, line discipline, window size, names; raw and line-by-line."""
    master, slave = pty.openpty()
    raw_master, raw_slave = pty.openpty()
    import tty

    tty.setraw(raw_slave)
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 101, 0, 0))
    modes = termios.tcgetattr(slave)
    modes[3] &= ~termios.ECHO
    modes[6][termios.VEOF] = b"\x05"
    termios.tcsetattr(slave, termios.TCSANOW, modes)
    os.write(master, b"a whole line\nand half a")
    os.write(slave, b"to the master\n")
    os.write(raw_master, b"raw input")
    os.write(raw_slave, b"raw output")
    before = termios.tcgetattr(slave), termios.tcgetattr(raw_slave), os.ttyname(slave), os.ttyname(raw_slave)
    frozen()
    after = termios.tcgetattr(slave), termios.tcgetattr(raw_slave), os.ttyname(slave), os.ttyname(raw_slave)
    equal("attributes and names", after, before)
    equal("window", struct.unpack("HHHH", fcntl.ioctl(slave, termios.TIOCGWINSZ, bytes(8)))[:2], (33, 101))
    equal("line", os.read(slave, 100), b"a whole line\n")
    os.write(master, b" line\n")
    equal("the rest of the half line", os.read(slave, 100), b"and half a line\n")
    equal("output", os.read(master, 100), b"to the master\r\n")
    equal("raw input", os.read(raw_slave, 100), b"raw input")
    equal("raw output", os.read(raw_master, 100), b"raw output")
    os.close(slave)
    equal("a slave opened anew by name", os.ttyname(os.open(before[2], os.O_RDWR | os.O_NOCTTY)), before[2])


@case
def controlling_terminal() -> None:
    """A session on a pty of its own: foreground group, ^C from the master, hang-up at its end."""
    master, slave = pty.openpty()
    read_end, write_end = os.pipe()
    job_read, job_write = os.pipe()

    def leader() -> None:
        os.setsid()
        os.close(master)
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        job = child(foreground)
        os.setpgid(job, job)
        os.tcsetpgrp(slave, job)
        wait_go()
        equal("foreground job", os.read(job_read, 1), b"F")
        equal("foreground group", os.tcgetpgrp(slave), job)
        terminal = os.open("/dev/tty", os.O_RDWR)
        equal("/dev/tty works", os.tcgetpgrp(terminal), job)
        os.write(write_end, b"L")
        _, status = os.waitpid(job, 0)
        equal("the foreground job was interrupted", os.waitstatus_to_exitcode(status), 130)
        hung: list[int] = []
        signal.signal(signal.SIGHUP, lambda *_: hung.append(1))
        os.write(write_end, b"H")
        true("hang-up", within(60, lambda: hung))

    def foreground() -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        child(given_up)
        wait_go()
        equal("/dev/tty of a job", os.tcgetpgrp(os.open("/dev/tty", os.O_RDWR)), os.getpgrp())
        true("the one that gave it up", os.waitpid(-1, 0)[1] == 0)
        os.write(job_write, b"F")
        time.sleep(600)

    def given_up() -> None:
        fcntl.ioctl(slave, termios.TIOCNOTTY)
        wait_go()
        try:
            os.open("/dev/tty", os.O_RDWR)
            bad("a process that has given its terminal up has one")
        except OSError as error:
            equal("no terminal", error.errno, errno.ENXIO)

    pid = child(leader)
    time.sleep(0.4)
    os.close(slave)
    frozen()
    equal("leader's word", os.read(read_end, 1), b"L")
    os.write(master, b"\x03")
    equal("leader's second word", os.read(read_end, 1), b"H")
    os.close(master)
    reap(pid)


@case
def closed_standard_streams() -> None:
    """A process with 0, 1 and 2 closed, and one with gaps and high numbers."""

    def body() -> None:
        for fd in (0, 2):
            os.close(fd)
        os.dup2(1, 1000)
        os.close(1)
        before = sorted(os.listdir("/proc/self/fd"), key=int)
        wait_go()
        after = sorted(os.listdir("/proc/self/fd"), key=int)
        os.dup2(1000, 1)
        equal("descriptors", after, before)

    pid = child(body)
    time.sleep(0.2)
    frozen()
    reap(pid)


@case
def file_locks() -> None:
    """flock, POSIX record and open-file-description locks, held by parent and child."""
    for name in ("flock", "posix", "ofd"):
        Path(name).write_bytes(bytes(100))
    whole = os.open("flock", os.O_RDWR)
    fcntl.flock(whole, fcntl.LOCK_EX)
    record = os.open("posix", os.O_RDWR)
    fcntl.lockf(record, fcntl.LOCK_EX, 10, 5)
    description = os.open("ofd", os.O_RDWR)
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 20, 10, 0)
    fcntl.fcntl(description, 37, lock)  # F_OFD_SETLK

    def others() -> None:
        fresh = {name: os.open(name, os.O_RDWR) for name in ("flock", "posix", "ofd")}
        wait_go()
        for name, attempt in (
            ("flock", lambda: fcntl.flock(fresh["flock"], fcntl.LOCK_EX | fcntl.LOCK_NB)),
            ("posix", lambda: fcntl.lockf(fresh["posix"], fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 12)),
            ("ofd", lambda: fcntl.fcntl(fresh["ofd"], 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 25, 1, 0))),
        ):
            try:
                attempt()
                bad(f"{name}: the lock of the parent is gone")
            except BlockingIOError:
                pass
        fcntl.lockf(fresh["posix"], fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 50)

    pid = child(others)
    frozen()
    reap(pid)


@case
def file_attributes() -> None:
    """Modes, owners, times, extended attributes, symbolic links, devices and holes on the volume."""
    Path("file").write_bytes(b"x")
    os.chmod("file", 0o4751)
    os.chown("file", 1234, 4321)
    os.utime("file", ns=(10**18, 10**18 + 123456789))
    os.setxattr("file", "user.colour", b"blue")
    os.symlink("nowhere/at all", "link")
    with open("sparse", "wb") as file:
        file.seek(1 << 30)
        file.write(b"end")

    def facts() -> tuple[object, ...]:
        found = os.stat("file")
        return (
            (found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, found.st_ino),
            os.getxattr("file", "user.colour"),
            os.readlink("link"),
            (os.stat("sparse").st_size, os.stat("sparse").st_blocks < 1000),
            stat.S_IMODE(os.stat(".").st_mode),
        )

    before = facts()
    frozen()
    equal("attributes", facts(), before)


@case
def same_instant() -> None:
    """Files and memory of one instant: a counter in a file is never behind the memory nor ahead by two."""
    fd = os.open("count", os.O_RDWR | os.O_CREAT)
    number = 0
    print("READY", flush=True)
    while True:
        seen = int(os.pread(fd, 20, 0) or b"0")
        if seen != number:
            bad(f"file says {seen}, memory {number}")
            return
        number += 1
        os.pwrite(fd, b"%020d" % number, 0)
        if number % 200 == 0 and os.path.exists("go"):
            return


if __name__ == "__main__":
    main()
