"""Process descriptors: of the living, of zombies, of those long gone, of threads; in epoll; shared."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import select
import signal
import struct
import threading
from pathlib import Path

from inpod import case, child, equal, frozen, main, reap, true, wait_go, within

PIDFD_THREAD = os.O_EXCL
PIDFD_GET_INFO = 0xC040FF0B


def dead(pidfd: int) -> bool:
    """Whether it is readable."""
    return bool(select.select([pidfd], [], [], 0)[0])


def refers_to(pidfd: int) -> int:
    """The pid that fdinfo tells; -1: of one that has been waited for."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        if line.startswith("Pid:"):
            return int(line.split()[1])
    raise ValueError("no Pid line")


def exit_info(pidfd: int) -> int | None:
    """How a process ended that has been waited for, where the kernel tells (Linux 6.15)."""
    raw = bytearray(64)
    struct.pack_into("Q", raw, 0, 8)
    try:
        fcntl.ioctl(pidfd, PIDFD_GET_INFO, raw)
    except OSError:
        return None
    return struct.unpack_from("i", raw, 60)[0] if raw[0] & 8 else None


def signalled(pidfd: int) -> int:
    """errno of asking whether a signal could be sent."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except OSError as error:
        return error.errno or 0
    return 0


@case
def processes() -> None:
    """Of itself, of the parent, of a child, a zombie, a grandchild; one nonblocking; dup'ed and inherited."""
    up, down = os.pipe()
    hear, tell = os.pipe()

    def grandchild() -> None:
        os.read(hear, 1)

    def body() -> None:
        grand = child(grandchild)
        mine = os.pidfd_open(grand)
        os.write(down, struct.pack("i", grand))
        wait_go()
        equal("child: of its parent", refers_to(parent), os.getppid())
        equal("child: its own child", (refers_to(mine), dead(mine)), (grand, False))
        os.write(down, b"done")
        reap(grand)

    parent = os.pidfd_open(os.getpid(), os.O_NONBLOCK)
    pid = child(body)
    grand = struct.unpack("i", os.read(up, 4))[0]
    of_child, of_grandchild = os.pidfd_open(pid), os.pidfd_open(grand)
    zombie = os.fork()
    if zombie == 0:
        os._exit(7)
    of_zombie, again = os.pidfd_open(zombie), os.pidfd_open(zombie)
    true("set-up", select.select([of_zombie], [], [], 60)[0])
    os.dup2(of_child, 99)
    before = [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (parent, of_child, of_zombie)]
    frozen()
    equal("flags", [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (parent, of_child, of_zombie)], before)
    fds = (parent, of_child, 99, of_grandchild, of_zombie, again)
    equal("of whom", [refers_to(fd) for fd in fds], [os.getpid(), pid, pid, grand, zombie, zombie])
    equal("dead", [dead(fd) for fd in (parent, of_zombie, again)], [False, True, True])
    equal("one inode for one process", os.fstat(of_zombie).st_ino, os.fstat(again).st_ino)
    info = os.waitid(os.P_PIDFD, of_zombie, os.WEXITED)  # type: ignore[attr-defined]
    true("waited for by descriptor", info)
    if info:
        equal("of the zombie", (info.si_pid, info.si_status), (zombie, 7))
    equal("afterwards", (refers_to(of_zombie), signalled(of_zombie), dead(again)), (-1, errno.ESRCH, True))
    equal("the child has looked", os.read(up, 4), b"done")
    os.write(tell, b"x")
    true("the child's end is told", select.select([of_child], [], [], 60)[0])
    reap(pid)
    equal("and that of its child", (dead(of_grandchild), refers_to(of_grandchild)), (True, -1))


@case
def gone() -> None:
    """Of processes that have been waited for: by exit, by signal, several of one, one more thread that has ended."""
    fds = []
    for way in (lambda: os._exit(3), lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(0)):
        pid = os.fork()
        if pid == 0:
            way()
        fds.append(os.pidfd_open(pid))
        os.waitpid(pid, 0)
    pid = os.fork()
    if pid == 0:
        os._exit(9)
    twice = [os.pidfd_open(pid), os.pidfd_open(pid, os.O_NONBLOCK)]
    os.waitpid(pid, 0)
    fds += twice
    thread = threading.Thread(target=lambda: fds.append(os.pidfd_open(threading.get_native_id(), PIDFD_THREAD)))
    thread.start()
    thread.join()
    true("set-up", within(60, lambda: refers_to(fds[-1]) == -1))
    told = [exit_info(fd) for fd in fds]
    frozen()
    equal("of nobody", [refers_to(fd) for fd in fds], [-1] * 6)
    equal("dead", [dead(fd) for fd in fds], [True] * 6)
    equal("exit status", [exit_info(fd) for fd in fds], told)
    equal("signals", [signalled(fd) for fd in fds], [errno.ESRCH] * 6)
    equal("two of one", os.fstat(twice[0]).st_ino, os.fstat(twice[1]).st_ino)
    true("and of another", os.fstat(fds[0]).st_ino != os.fstat(twice[0]).st_ino)


@case
def threads() -> None:
    """PIDFD_THREAD: of a living thread, of the leader; the end of the thread is told."""
    stop = threading.Event()
    fds: list[int] = []
    numbers: list[int] = []

    def body() -> None:
        numbers.append(threading.get_native_id())
        fds.append(os.pidfd_open(threading.get_native_id(), PIDFD_THREAD))
        stop.wait()

    thread = threading.Thread(target=body)
    thread.start()
    leader = os.pidfd_open(os.getpid(), PIDFD_THREAD)
    true("set-up", within(60, lambda: fds))

    def other() -> None:
        wait_go()
        equal("child: of its parent's thread", refers_to(fds[0]), numbers[0])

    pid = child(other)
    poll = select.epoll()
    poll.register(fds[0], select.EPOLLIN)
    before = fcntl.fcntl(fds[0], fcntl.F_GETFL), fcntl.fcntl(leader, fcntl.F_GETFL)
    frozen()
    reap(pid)
    equal("flags", (fcntl.fcntl(fds[0], fcntl.F_GETFL), fcntl.fcntl(leader, fcntl.F_GETFL)), before)
    equal("of whom", (refers_to(fds[0]), refers_to(leader)), (numbers[0], os.getpid()))
    equal("still running", (dead(fds[0]), poll.poll(0)), (False, []))
    stop.set()
    thread.join()
    equal("the thread's end is told", [fd for fd, _ in poll.poll(60)], [fds[0]])
    true("not the leader's", not dead(leader))


@case
def in_epoll() -> None:
    """Watched by epoll: level, edge, of the living and of the dead, under a number that is another's by now."""
    pids = [child(wait_go) for _ in range(3)]
    fds = [os.pidfd_open(pid) for pid in pids]
    zombie = os.fork()
    if zombie == 0:
        os._exit(0)
    of_zombie = os.pidfd_open(zombie)
    true("set-up", select.select([of_zombie], [], [], 60)[0])
    poll, edge = select.epoll(), select.epoll()
    poll.register(fds[0], select.EPOLLIN)
    edge.register(fds[1], select.EPOLLIN | select.EPOLLET)
    poll.register(of_zombie, select.EPOLLIN)
    poll.register(fds[2], select.EPOLLIN)
    stale = fds[2]
    kept = os.dup(stale)
    taken = os.open("taken", os.O_RDWR | os.O_CREAT)
    fcntl.lockf(taken, fcntl.LOCK_EX)
    os.dup2(taken, stale)

    def other() -> None:
        wait_go()
        equal("child: edge", [fd for fd, _ in edge.poll(60)], [fds[1]])

    pid = child(other)
    frozen()
    equal("the zombie", dict(poll.poll(60)).get(of_zombie), select.EPOLLIN)
    for one in pids:
        reap(one)
    reap(pid)
    equal("all that are watched", sorted(fd for fd, _ in poll.poll(60)), sorted([of_zombie, fds[0], stale]))
    true("the duplicate", dead(kept))
    os.waitpid(zombie, 0)


@case
def asynchronous() -> None:
    """asyncio waits for a child by its descriptor; subprocess; multiprocessing's way."""

    async def work() -> None:
        loop = asyncio.get_running_loop()
        process = await asyncio.create_subprocess_exec("sh", "-c", "read x; exit 5", stdin=asyncio.subprocess.PIPE)
        print("READY", flush=True)
        while not os.path.exists("go"):
            await asyncio.sleep(0.02)
        assert process.stdin
        process.stdin.write(b"x\n")
        process.stdin.close()
        equal("exit status", await asyncio.wait_for(process.wait(), 60), 5)
        true("the loop goes on", loop.is_running())

    asyncio.run(work())


if __name__ == "__main__":
    main()
