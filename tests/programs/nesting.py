"""Namespaces of a program's own making: user namespaces, and the pid, uts, ipc and net ones that they own."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from inpod import DIR, case, child, equal, frozen, go, main, reap, status_field, true, wait_go, within

libc = ctypes.CDLL(None, use_errno=True)
NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
KINDS = ("user", "uts", "ipc", "net", "pid", "pid_for_children")


def call(name: str, *arguments: int) -> None:
    """A function of libc that must not fail."""
    if getattr(libc, name)(*arguments):
        raise OSError(ctypes.get_errno(), name)


def links(pid: int | str = "self") -> dict[str, str]:
    """Where a process is."""
    return {kind: os.readlink(f"/proc/{pid}/ns/{kind}") for kind in KINDS}


def identity(pid: int | str = "self") -> dict[str, str]:
    """Who a process is, as its user namespace tells it."""
    keys = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "NSpid", "NSsid")
    found = {key: status_field(pid, key) for key in keys}
    for name in ("uid_map", "gid_map", "setgroups"):
        found[name] = Path(f"/proc/{pid}/{name}").read_text()
    return found


def leave(flags: int, uids: str = "0 0 1", gids: str = "", setgroups: str = "deny") -> None:
    """The caller goes into a new user namespace, and others; its maps are written by a child that stays behind."""
    ready_r, ready_w = os.pipe()
    done_r, done_w = os.pipe()
    me = os.readlink("/proc/self")  # the number there, wherever we are
    writer = os.fork()
    if writer == 0:
        os.read(ready_r, 1)
        for name, text in (("setgroups", setgroups), ("uid_map", uids), ("gid_map", gids or uids)):
            if text:
                Path(f"/proc/{me}/{name}").write_text(text)
        os.write(done_w, b"x")
        os._exit(0)
    call("unshare", flags & ~NEWPID | NEWUSER)
    os.write(ready_w, b"x")
    os.close(done_w)
    os.read(done_r, 1)
    os.waitpid(writer, 0)
    for fd in (ready_r, ready_w, done_r):
        os.close(fd)
    if flags & NEWPID:
        call("unshare", NEWPID)


def same_afterwards(prepare: Callable[[], object], check: Callable[[], object] = lambda: None) -> None:
    """A child that prepares itself has to find itself as it was, and then passes `check`."""

    def body() -> None:
        prepare()
        before = identity(), alike(links())
        wait_go()
        after = identity()
        for key, value in before[0].items():
            equal(key, after[key], value)
        equal("which of its namespaces are the same", alike(links()), before[1])
        check()

    tell_home()
    pid = child(body)
    time.sleep(0.3)
    frozen()
    tell_home()
    reap(pid)


def alike(where: dict[str, str]) -> list[bool]:
    """What can be told of namespaces whose numbers change: which are those of the pod."""
    told = DIR / f"home-{go()}"
    true("home is told", within(60, told.exists))
    home = told.read_text().split()
    return [link in home for link in where.values()]


def tell_home() -> None:
    """By who stays there: others can't see it any more."""
    passing = DIR / "home"
    passing.write_text(" ".join(links().values()))
    passing.rename(DIR / f"home-{go()}")


# ---- user namespaces


@case
def mapped() -> None:
    """Several ranges; ids of the inside; a child made afterwards is in it, too."""

    def prepare() -> None:
        leave(NEWUSER, "0 1000 1\n1 0 1\n100 5000 10", "0 0 1\n7 70 3", "allow")
        os.setgroups([7, 9])
        os.setresgid(8, 9, 7)
        os.setresuid(105, 0, 1)

    def check() -> None:
        here = os.readlink("/proc/self/ns/user")
        pid = child(lambda: equal("its child's", os.readlink("/proc/self/ns/user"), here))
        reap(pid)
        os.setresuid(109, 0, 0)  # it has CAP_SETUID in it
        equal("another of its ids", os.getresuid(), (109, 0, 0))

    same_afterwards(prepare, check)


@case
def unmapped() -> None:
    """By an ordinary user with groups, without any map; the map can be written afterwards."""

    def prepare() -> None:
        os.setgroups([5, 70000])
        os.setresgid(1234, 1234, 1234)
        os.setresuid(1234, 1234, 1234)
        libc.prctl(4, 1)  # PR_SET_DUMPABLE: it may write to its own /proc files
        call("unshare", NEWUSER)
        equal("its own id", os.getuid(), 65534)

    def check() -> None:
        Path("/proc/self/uid_map").write_text("0 1234 1")
        equal("its own id with a map", os.getuid(), 0)

    same_afterwards(prepare, check)


@case
def within_another() -> None:
    """A user namespace in a user namespace; who is in the outer one has rights over it."""
    wanted = {}

    def inner() -> None:
        leave(NEWUSER, "5 1000 1\n10 1001 5")
        os.setresuid(12, 12, 12)
        libc.prctl(4, 1)  # PR_SET_DUMPABLE: the outer one may look at it
        before = identity()
        wait_go()
        for key, value in before.items():
            equal(f"inner {key}", identity()[key], value)

    def outer() -> None:
        leave(NEWUSER, "0 0 1\n1000 3000 100")
        pid = child(inner)
        time.sleep(0.3)
        wanted["outside"] = identity(pid)
        wait_go()
        equal("seen from the outer one", identity(pid)["Uid"], wanted["outside"]["Uid"])
        with open(f"/proc/{pid}/ns/user") as file:
            joiner = child(lambda: call("setns", file.fileno(), 0))
        reap(joiner, "who joins the inner one")
        reap(pid, "the inner one")

    pid = child(outer)
    time.sleep(0.6)
    frozen()
    reap(pid)


@case
def shared() -> None:
    """Three processes: two in one user namespace, of different users and capabilities, one in another."""

    def first() -> None:
        leave(NEWUSER, "0 0 100")

        def other() -> None:
            os.setgid(50)
            os.setuid(60)
            libc.prctl(4, 1)
            wait_go()
            equal("ids", (os.getresuid(), os.getresgid()), ((60,) * 3, (50,) * 3))
            equal("capabilities", status_field("self", "CapPrm").strip("0"), "")

        pid = child(other)
        alone = child(lambda: (call("unshare", NEWUSER), wait_go()))
        wait_go()
        equal("same", os.readlink(f"/proc/{pid}/ns/user"), os.readlink("/proc/self/ns/user"))
        true("another", os.readlink(f"/proc/{alone}/ns/user") != os.readlink("/proc/self/ns/user"))
        reap(pid)
        reap(alone)

    pid = child(first)
    time.sleep(0.4)
    frozen()
    reap(pid)


# ---- pid namespaces


def in_new_pids(body: Callable[[], None], flags: int = 0) -> int:
    """A child whose child is process 1 of a new pid namespace and runs `body`."""

    def outer() -> None:
        leave(NEWPID | flags)
        pid = child(body)
        reap(pid, "process 1")

    return child(outer)


@case
def numbers() -> None:
    """Pids in both namespaces, parents, threads, a new process's number, an orphan that falls to its process 1."""

    def first() -> None:
        equal("own pid", os.getpid(), 1)
        reader, writer = os.pipe()

        def parent() -> None:
            child(lambda: (os.close(reader), wait_go(), os.write(writer, f"{os.getpid()} {os.getppid()}".encode())))

        middle = child(parent)
        reap(middle)
        tids: list[int] = []
        threads = [threading.Thread(target=lambda: (tids.append(threading.get_native_id()), wait_go())) for _ in "ab"]
        for one in threads:
            one.start()
        wait_go()
        equal("the orphan and its parent", os.read(reader, 100).split(), [b"3", b"1"])
        reap(3, "orphan")
        equal("threads", tids, [4, 5])
        reap(child(lambda: equal("a new one's number", os.getpid(), 6)))
        for one in threads:
            one.join()
        equal("parent is outside", os.getppid(), 0)

    pid = in_new_pids(first)
    time.sleep(0.6)
    frozen()
    reap(pid)


@case
def ends_with_its_first() -> None:
    """When process 1 of a namespace ends, all others in it are killed."""
    reader, writer = os.pipe()

    def first() -> None:
        child(lambda: (os.close(reader), time.sleep(1000)))
        wait_go()

    pid = in_new_pids(first)
    os.close(writer)
    time.sleep(0.5)
    frozen()
    reap(pid)
    equal("its offspring is gone", os.read(reader, 1), b"")


@case
def within_another_pid_namespace() -> None:
    """Pids in three namespaces, threads and a new process there; the innermost belongs to a user namespace that
    nobody is in, as a browser's sandbox has them."""

    def innermost() -> None:
        call("unshare", NEWUSER)
        equal("own pid", os.getpid(), 1)
        tids: list[int] = []
        thread = threading.Thread(target=lambda: (tids.append(threading.get_native_id()), wait_go()))
        thread.start()
        pid = child(wait_go)
        numbers = status_field("self", "NSpid").split()
        equal("how many pid namespaces are seen", len(numbers), 3)
        wait_go()
        equal("numbers", status_field("self", "NSpid").split(), numbers)
        equal("thread and child", (tids, pid), ([2], 3))
        reap(child(lambda: equal("a new one's number", os.getpid(), 4)))
        reap(pid)
        thread.join()

    def middle() -> None:
        reap(child(lambda: None))  # number 2 of this one

        def maker() -> None:
            leave(NEWPID)
            pid = child(innermost)
            call("unshare", NEWUSER)
            reap(pid, "innermost")

        reap(child(maker), "the middle one's child")

    pid = in_new_pids(middle)
    time.sleep(0.8)
    frozen()
    reap(pid)


@case
def views() -> None:
    """In a user namespace: files of /proc, a pidfd, and a root directory that belongs to a task that has ended."""

    def prepare() -> None:
        leave(NEWUSER)
        stat = os.open("/proc/1/stat", os.O_RDONLY)
        pidfd = os.pidfd_open(os.getpid())

        def jail() -> None:
            os.chroot("/proc/self/fdinfo")
            os.chdir("/")
            os._exit(0)

        def look() -> None:
            wait_till_told()
            equal("a file of /proc", os.read(stat, 2), b"1 ")
            signal.pidfd_send_signal(pidfd, signal.SIGUSR1)

        hits: list[int] = []
        signal.signal(signal.SIGUSR1, lambda *_: hits.append(1))
        signal.pthread_sigmask(signal.SIG_BLOCK, [])
        told = os.pipe()
        vanished = [told]

        def wait_till_told() -> None:
            os.read(vanished[0][0], 1)

        writer = child(lambda: (wait_go(), os.write(told[1], b"x")))
        in_jail = child(lambda: (clone_fs(jail), look(), true("no root any more", not exists("/"))))
        reap(in_jail, "who is in the directory")
        reap(writer)
        true("the pidfd's signal", within(30, lambda: hits))

    pid = child(prepare)
    time.sleep(0.5)
    frozen()
    reap(pid)


def exists(path: str) -> bool:
    """Whether something can be found there."""
    try:
        os.listdir(path)
    except OSError:
        return False
    return True


def clone_fs(body: Callable[[], None]) -> None:
    """Runs `body` in a child that shares root and working directory (CLONE_FS), and has ended afterwards."""
    pid = libc.syscall(56, ctypes.c_ulong(0x200 | 17), 0, 0, 0, 0)
    if pid == 0:
        body()
        os._exit(0)
    equal("set-up: child with CLONE_FS", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0)


@case
def more_children() -> None:
    """Who made a pid namespace has further children in it."""

    def outer() -> None:
        leave(NEWPID)
        first = child(lambda: time.sleep(1000))
        second = child(lambda: (wait_go(), equal("own pid", os.getpid(), 2)))
        wait_go()
        third = child(lambda: equal("own pid of a new one", os.getpid(), 3))
        reap(third)
        reap(second)
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)

    pid = child(outer)
    time.sleep(0.5)
    frozen()
    reap(pid)


@case
def sessions() -> None:
    """Sessions, groups (one whose leader is gone), zombies and stopped ones, all inside a pid namespace."""

    def leads() -> None:
        os.setsid()
        group = child(lambda: (os.setpgid(0, 0), os.setpgid(child_in_group(), os.getpid()), os._exit(0)))
        reap(group)
        wait_go()
        equal("session", os.getsid(0), os.getpid())

    def child_in_group() -> int:
        def member() -> None:
            true("set-up: group", within(30, lambda: os.getpgrp() != os.getsid(0)))
            group = os.getpgrp()
            wait_go()
            equal("a group without its leader", os.getpgrp(), group)

        return child(member)

    def first() -> None:
        os.setsid()
        session = child(leads)
        ended = os.fork()
        if not ended:
            os._exit(7)
        stopped = child(wait_go)
        os.kill(stopped, signal.SIGSTOP)
        os.waitpid(stopped, os.WUNTRACED)
        wait_go()
        equal("own session", (os.getsid(0), os.getpgrp()), (1, 1))
        equal("stopped, as it knows", os.waitpid(stopped, os.WUNTRACED | os.WNOHANG), (0, 0))
        os.kill(stopped, signal.SIGCONT)
        reap(stopped)
        equal("how the zombie ended", os.waitstatus_to_exitcode(os.waitpid(ended, 0)[1]), 7)
        reap(session)

    pid = in_new_pids(first)
    time.sleep(0.8)
    frozen()
    reap(pid)


@case
def signals_and_timers() -> None:
    """Signals that wait, with their sender's number, and a timer that signals a thread."""

    def first() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        reap(child(lambda: os.kill(1, signal.SIGUSR1)))
        number = ctypes.c_int()
        event = (ctypes.c_int * 16)(0, 0, signal.SIGUSR2, 4, threading.get_native_id())  # SIGEV_THREAD_ID
        hits: list[int] = []
        signal.signal(signal.SIGUSR2, lambda *_: hits.append(1))
        call("timer_create", 1, ctypes.byref(event), ctypes.byref(number))  # type: ignore[arg-type]
        every = (ctypes.c_long * 4)(0, 50_000_000, 0, 50_000_000)
        call("timer_settime", ctypes.c_void_p(number.value), 0, every, None)  # type: ignore[arg-type]
        wait_go()
        hits.clear()
        true("the timer goes on", within(30, lambda: hits))
        info = signal.sigwaitinfo([signal.SIGUSR1])
        equal("who sent it", info.si_pid, 2)

    pid = in_new_pids(first)
    time.sleep(0.5)
    frozen()
    reap(pid)


# ---- others


def loopback() -> str:
    """Whether `lo` is up, and answers."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("127.0.0.1", 9))
            return "up"
        except OSError as error:
            return os.strerror(error.errno or 0)


@case
def names_and_network() -> None:
    """Host name, an empty IPC namespace, a network namespace whose loopback is up, one in which it is down."""

    def prepare() -> None:
        leave(NEWUTS | NEWIPC | NEWNET)
        socket.sethostname("inside")
        call("setdomainname", b"domain", 6)  # type: ignore[arg-type]

    def look() -> tuple[str, str, str]:
        return socket.gethostname(), os.uname().nodename, loopback()

    def up() -> None:
        prepare()
        call_up()
        equal("set-up", look(), ("inside", "inside", "up"))
        wait_go()
        equal("with a loopback", look(), ("inside", "inside", "up"))
        equal("domain", Path("/proc/sys/kernel/domainname").read_text(), "domain\n")

    def check() -> None:
        equal("without", look(), ("inside", "inside", "Network is unreachable"))
        socket.sethostname("changed")
        equal("it has the right to change it", socket.gethostname(), "changed")

    pid = child(up)
    same_afterwards(prepare, check)
    reap(pid)
    true("the pod's own name", socket.gethostname() not in ("inside", "changed"))


@case
def sockets() -> None:
    """The same address and name in two network namespaces, data under way in both, a pair that passes descriptors."""

    def talk(word: bytes) -> None:
        with socket.socket() as listener, socket.socket() as client, socket.socket(socket.AF_UNIX) as unix:
            listener.bind(("127.0.0.1", 7777))
            listener.listen()
            client.connect(("127.0.0.1", 7777))
            server, _ = listener.accept()
            client.send(word)
            unix.bind("\0name")
            left, right = socket.socketpair()
            left.send(word)
            socket.send_fds(left, [word], [client.fileno()])
            udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            udp.bind(("127.0.0.1", 7777))
            udp.sendto(word, ("127.0.0.1", 7777))
            cookies = {one.getsockopt(socket.SOL_SOCKET, 71, 8) for one in (listener, server, unix, left, udp)}
            equal("set-up: one namespace", len(cookies), 1)  # SO_NETNS_COOKIE
            wait_go()
            fresh = socket.socket().getsockopt(socket.SOL_SOCKET, 71, 8)
            for one in (listener, client, server, unix, left, right, udp):
                equal(f"namespace of {one}", one.getsockopt(socket.SOL_SOCKET, 71, 8), fresh)
            equal("over TCP", server.recv(100), word)
            equal("over UDP", udp.recv(100), word)
            equal("in a pair", right.recv(len(word)), word)
            data, (passed,), _, _ = socket.recv_fds(right, 100, 1)
            equal("with a descriptor", data, word)
            os.write(passed, b"passed")
            equal("which is the client", server.recv(100), b"passed")
            equal("bound name", unix.getsockname(), b"\0name")

    def inside() -> None:
        leave(NEWNET)
        call_up()
        talk(b"inside")

    pids = [child(inside), child(lambda: (call("unshare", NEWUSER), talk(b"at home")))]
    time.sleep(0.5)
    frozen()
    for pid in pids:
        reap(pid)


def call_up() -> None:
    """Brings up the loopback."""
    equal("set-up: lo", os.system("ip link set lo up || ifconfig lo up"), 0)


@case
def all_kinds() -> None:
    """As `unshare -Urpfnui` makes them; a stranger is in two of them."""

    def first() -> None:
        true("all is compared", within(600, (DIR / "compared").exists))
        equal("own pid", os.getpid(), 1)

    pid = in_new_pids(first, NEWUTS | NEWIPC | NEWNET)
    time.sleep(0.4)
    below = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())

    def stranger() -> None:
        with open(f"/proc/{pid}/ns/user") as user, open(f"/proc/{pid}/ns/uts") as uts:
            call("setns", user.fileno(), 0)
            call("setns", uts.fileno(), 0)
        true("all is compared", within(600, (DIR / "compared").exists))

    other = child(stranger)
    time.sleep(0.2)
    tell_home()
    before = alike(links(pid)), alike(links(below)), alike(links(other))
    frozen()
    tell_home()
    equal("which are the pod's", (alike(links(pid)), alike(links(below)), alike(links(other))), before)
    for kind in ("user", "uts", "ipc", "net"):
        equal(f"{kind}, of both", links(below)[kind], links(pid)[kind])
    for kind in ("user", "uts"):
        equal(f"{kind}, of the stranger", links(other)[kind], links(pid)[kind])
    equal("in whose pids its children are", links(pid)["pid_for_children"], links(below)["pid"])
    (DIR / "compared").touch()
    reap(pid)
    reap(other)


if __name__ == "__main__":
    main()
