"""Open files and directories of /proc and /sys, and namespaces: views of the kernel that programs keep open."""

from __future__ import annotations

import errno
import os
import select
import threading
from pathlib import Path

from inpod import case, child, equal, frozen, main, reap, true, wait_go, within

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")


def facts(fds: list[int]) -> list[tuple[int, str, int]]:
    """Number, name, offset."""
    return [(fd, os.readlink(f"/proc/self/fd/{fd}"), os.lseek(fd, 0, os.SEEK_CUR)) for fd in fds]


def field(fd: int, key: str) -> str:
    """A line of a status file that is open."""
    text = os.pread(fd, 65536, 0).decode()
    return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(f"{key}:"))


@case
def system() -> None:
    """What is about the whole system: kept open and read again and again, half-read, read to the end, a directory."""
    names = (
        "/proc/meminfo",
        "/proc/stat",
        "/proc/uptime",
        "/proc/loadavg",
        "/proc/sys/kernel/hostname",
        "/proc/mounts",
    )
    whole = [os.open(name, os.O_RDONLY | os.O_CLOEXEC) for name in names]
    for fd in whole:
        while os.read(fd, 4096):
            pass
    half = os.open("/proc/cpuinfo", os.O_RDONLY | os.O_NONBLOCK)
    text = os.read(half, 100)
    rest = os.pread(half, 200, 100)
    sys = os.open("/sys/kernel/mm/transparent_hugepage/enabled", os.O_RDONLY)
    os.read(sys, 5)
    sys_rest = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_bytes()[5:]
    by_path = os.open("/proc/version", os.O_PATH)
    directory = os.open("/sys/kernel", os.O_RDONLY)
    listing = os.scandir("/proc")
    seen = {next(listing).name for _ in range(20)}
    before = facts([*whole, half, sys, directory])
    frozen()
    equal("number, name, offset", facts([*whole, half, sys, directory]), before)
    true("something was read", text)
    equal("what is read next", os.read(half, 200), rest)
    equal("of /sys", os.read(sys, 4096), sys_rest)
    equal("at the end", [os.read(fd, 10) for fd in whole], [b""] * len(whole))
    for fd, name in zip(whole, names, strict=True):
        os.lseek(fd, 0, os.SEEK_SET)
        true(f"{name} from the beginning", os.read(fd, 10))
    equal("by path", Path(f"/proc/self/fd/{by_path}").read_bytes(), Path("/proc/version").read_bytes())
    true("entries", "mm" in os.listdir(directory))
    more = {entry.name for entry in listing}
    true("the rest of a directory", "version" in seen | more and "self" in seen | more)
    equal("nothing twice", seen & more, set())


@case
def processes() -> None:
    """Of itself, a child, a thread: status, maps, memory, what can be written, directories; inherited by a child."""
    stop, numbers = threading.Event(), []
    thread = threading.Thread(target=lambda: (numbers.append(threading.get_native_id()), stop.wait()))
    thread.start()
    true("set-up", within(60, lambda: numbers))
    own = os.open("/proc/self/status", os.O_RDONLY)
    pid = child(wait_go)
    of_child = os.open(f"/proc/{pid}/status", os.O_RDONLY)
    of_thread = os.open(f"/proc/self/task/{numbers[0]}/comm", os.O_RDWR)
    maps = os.open("/proc/self/maps", os.O_RDONLY)
    os.read(maps, 100)
    memory = os.open("/proc/self/mem", os.O_RDWR)
    adjust = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
    net = os.open("/proc/net/tcp", os.O_RDONLY)
    os.read(net, 4096)
    tasks = os.open("/proc/self/task", os.O_RDONLY | os.O_DIRECTORY)
    descriptors = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY)
    zombie = os.fork()
    if zombie == 0:
        os._exit(0)
    of_zombie = os.open(f"/proc/{zombie}/stat", os.O_RDONLY)
    true("set-up", within(60, lambda: b") Z " in os.pread(of_zombie, 4096, 0)))

    def other() -> None:
        os.chdir("/proc/self/task")
        fd = os.open("/proc/self/stat", os.O_RDONLY)
        wait_go_elsewhere()
        equal("child: its parent's status", field(own, "Pid"), str(os.getppid()))
        equal("child: its own", os.read(fd, 4096).split()[0], str(os.getpid()).encode())
        equal("child: working directory", os.listdir("."), [str(os.getpid())])

    here = os.path.abspath("go")

    def wait_go_elsewhere() -> None:
        true("go", within(600, lambda: os.path.exists(here)))

    cousin = child(other)
    marked = bytearray(b"before the checkpoint")
    import ctypes

    address = ctypes.addressof((ctypes.c_char * len(marked)).from_buffer(marked))
    fds = [own, of_child, of_thread, maps, memory, adjust, tasks, descriptors, of_zombie]
    poll = select.epoll()
    mounts = os.open("/proc/self/mounts", os.O_RDONLY)
    poll.register(mounts, select.EPOLLPRI)
    poll.poll(0)
    before = facts(fds)
    frozen()
    equal("number, name, offset", facts(fds), before)
    equal("of the zombie", os.pread(of_zombie, 4096, 0).split(b")")[1].split()[0], b"Z")
    os.waitpid(zombie, 0)
    equal("whose status", (field(own, "Pid"), field(of_child, "Pid")), (str(os.getpid()), str(pid)))
    reap(cousin)
    equal("entries of /proc/self/task", sorted(map(int, os.listdir(tasks))), sorted([os.getpid(), numbers[0]]))
    os.write(of_thread, b"renamed")
    equal("the thread's name", Path(f"/proc/self/task/{numbers[0]}/comm").read_text(), "renamed\n")
    equal("memory", os.pread(memory, len(marked), address), b"before the checkpoint")
    os.pwrite(memory, b"AFTER ", address)
    equal("memory written", bytes(marked[:6]), b"AFTER ")
    os.lseek(maps, 0, os.SEEK_SET)
    true("maps", b"[stack]" in b"".join(iter(lambda: os.read(maps, 4096), b"")))
    os.write(adjust, b"77")
    equal("written", Path("/proc/self/oom_score_adj").read_text(), "77\n")
    os.lseek(net, 0, os.SEEK_SET)
    true("sockets", os.read(net, 4096).lstrip().startswith(b"sl"))
    true("nothing of the mounts has changed", not poll.poll(0))
    stop.set()
    thread.join()
    reap(pid)
    try:
        os.pread(of_child, 100, 0)
        true("a status of a process that is gone was read", False)
    except ProcessLookupError:
        pass


@case
def ended() -> None:
    """Of processes and threads that have ended: no such process; what is of the network still reads."""
    pid = child(wait_go_never)
    names = ("status", "maps", "stat", "mem", f"task/{pid}/stat")
    fds = [os.open(f"/proc/{pid}/{name}", os.O_RDONLY) for name in names]
    directory = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY)
    by_path = os.open(f"/proc/{pid}/stat", os.O_PATH)
    net = os.open(f"/proc/{pid}/net/unix", os.O_RDONLY)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    threads: list[int] = []
    thread = threading.Thread(target=lambda: threads.append(os.open("/proc/thread-self/stat", os.O_RDONLY)))
    thread.start()
    thread.join()
    true("set-up", within(60, lambda: outcome(threads[0]) == errno.ESRCH))
    before = [outcome(fd) for fd in fds], entries(directory), reopened(by_path)
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in (*fds, directory)]
    frozen()
    equal("what reading gives", ([outcome(fd) for fd in fds], entries(directory), reopened(by_path)), before)
    equal("names", [os.readlink(f"/proc/self/fd/{fd}") for fd in (*fds, directory)], links)
    equal("of a thread", outcome(threads[0]), errno.ESRCH)
    true("of the network", os.read(net, 4096).startswith(b"Num"))


def entries(directory: int) -> list[str] | int:
    """What a directory has, or errno."""
    try:
        return os.listdir(directory)
    except OSError as error:
        return error.errno or 0


def reopened(by_path: int) -> int:
    """What reading a file gives that is opened by its O_PATH descriptor, or errno of opening it."""
    try:
        fd = os.open(f"/proc/self/fd/{by_path}", os.O_RDONLY)
    except OSError as error:
        return error.errno or 0
    try:
        return outcome(fd)
    finally:
        os.close(fd)


def wait_go_never() -> None:
    """For a child that is killed."""
    import time

    time.sleep(600)


def outcome(fd: int) -> int:
    """errno of reading, or the negative number of bytes."""
    try:
        return -len(os.pread(fd, 100, 0))
    except OSError as error:
        return error.errno or 0


@case
def namespaces() -> None:
    """Descriptors of all of its namespaces, one inherited by a child."""
    fds = {name: os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in NAMESPACES}

    def same(name: str) -> bool:
        return os.path.samestat(os.fstat(fds[name]), os.stat(f"/proc/self/ns/{name}"))

    def body() -> None:
        wait_go()
        true("child: the network", same("net"))

    pid = child(body)
    frozen()
    reap(pid)
    equal("namespaces", {name: same(name) for name in NAMESPACES}, dict.fromkeys(NAMESPACES, True))


if __name__ == "__main__":
    main()
