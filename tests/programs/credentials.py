"""Who a process is and what it may: ids, capabilities, seccomp, limits, scheduling, directories, /dev/shm."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import shutil
import struct
import threading
import time
from _multiprocessing import SemLock  # type: ignore[attr-defined]
from pathlib import Path

from inpod import DIR, bad, case, child, equal, frozen, main, reap, status_field, true, wait_go

libc = ctypes.CDLL(None, use_errno=True)
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAPBSET_DROP, PR_SET_KEEPCAPS = 22, 38, 47, 24, 8
PR_GET_SECUREBITS, PR_SET_SECUREBITS = 27, 28
CAP_CHOWN, CAP_KILL, CAP_NET_BIND_SERVICE, CAP_SETUID = 0, 5, 10, 7


def facts() -> dict[str, str]:
    """The lines of /proc/self/status that say who we are and what we may."""
    keys = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Umask")
    return {key: status_field("self", key) for key in keys}


def set_capabilities(effective: int, permitted: int, inheritable: int) -> None:
    """capset(2), version 3."""
    header = struct.pack("Ii", 0x20080522, 0)
    data = b"".join(
        struct.pack("III", *(value >> shift & 0xFFFFFFFF for value in (effective, permitted, inheritable)))
        for shift in (0, 32)
    )
    assert libc.syscall(126, header, data) == 0, os.strerror(ctypes.get_errno())


def unchanged_in_child(prepare: object) -> None:
    """Runs `prepare` in a child and compares all its facts after the freeze with those before."""

    def body() -> None:
        prepare()  # type: ignore[operator]
        before = facts()
        wait_go()
        after = facts()
        for key, value in before.items():
            equal(key, after[key], value)

    pid = child(body)
    time.sleep(0.2)
    frozen()
    reap(pid)


@case
def ids() -> None:
    """Real, effective, saved and file-system ids all different, supplementary groups."""

    def prepare() -> None:
        os.setgroups([5, 20, 1000, 70000])
        os.setresgid(101, 102, 103)
        os.setresuid(201, 0, 203)
        libc.setfsgid(104)
        libc.setfsuid(204)

    unchanged_in_child(prepare)


@case
def ordinary_user() -> None:
    """A process that gave up everything, with files of its own and a child."""

    def prepare() -> None:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        Path("mine").write_text("x")
        before = facts()

        def grandchild() -> None:
            wait_go()
            equal("facts of a grandchild", facts(), before)
            Path("mine").write_text("changed")
            try:
                os.chown("mine", 0, 0)
                bad("chown was allowed")
            except PermissionError:
                pass

        grand = child(grandchild)
        wait_go()
        reap(grand)

    unchanged_in_child(prepare)
    equal("written by the grandchild", Path("mine").read_text(), "changed")


@case
def capabilities() -> None:
    """Each set of capabilities different; ambient ones; securebits; keep-caps."""

    def prepare() -> None:
        now = int(status_field("self", "CapPrm"), 16)
        assert libc.prctl(PR_CAPBSET_DROP, CAP_CHOWN, 0, 0, 0) == 0
        few = now & ~(1 << CAP_CHOWN)
        libc.prctl(PR_SET_SECUREBITS, 1 << 0 | 1 << 2, 0, 0, 0)  # needs CAP_SETPCAP; without it nothing happens
        libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
        set_capabilities(1 << CAP_KILL, few, 1 << CAP_NET_BIND_SERVICE | 1 << CAP_KILL)
        assert libc.prctl(PR_CAP_AMBIENT, 2, CAP_NET_BIND_SERVICE, 0, 0) == 0
        bits.append(libc.prctl(PR_GET_SECUREBITS, 0, 0, 0, 0))

    bits: list[int] = []

    def body() -> None:
        prepare()
        before = facts()
        wait_go()
        equal("facts", facts(), before)
        equal("securebits", libc.prctl(PR_GET_SECUREBITS, 0, 0, 0, 0), bits[0])

    pid = child(body)
    time.sleep(0.2)
    frozen()
    reap(pid)


@case
def per_thread_ids() -> None:
    """Threads with effective ids and capabilities of their own (raw system calls)."""
    seen: dict[str, object] = {}

    def thread() -> None:
        libc.syscall(117, 0, 1234, 0)  # setresuid of this thread alone
        tid = threading.get_native_id()
        before = status_field(f"self/task/{tid}", "Uid"), status_field(f"self/task/{tid}", "CapEff")
        wait_go()
        seen["after"] = status_field(f"self/task/{tid}", "Uid"), status_field(f"self/task/{tid}", "CapEff")
        seen["before"] = before

    worker = threading.Thread(target=thread)
    worker.start()
    time.sleep(0.2)
    before = facts()
    frozen()
    worker.join()
    equal("the thread", seen["after"], seen["before"])
    equal("the main thread", facts(), before)


@case
def no_new_privileges() -> None:
    """no_new_privs stays set."""
    unchanged_in_child(lambda: libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


@case
def seccomp() -> None:
    """A process's own seccomp filters go on filtering: one answers an errno, a second stacked on it too."""

    class Program(ctypes.Structure):
        """struct sock_fprog."""

        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    def deny(number: int, errno: int) -> None:
        code = struct.pack("HBBI", 0x20, 0, 0, 0)  # load seccomp_data.nr
        code += struct.pack("HBBI", 0x15, 0, 1, number)  # jump if equal
        code += struct.pack("HBBI", 0x06, 0, 0, 0x00050000 | errno)  # SECCOMP_RET_ERRNO
        code += struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)  # SECCOMP_RET_ALLOW
        program = Program(len(code) // 8, code)
        assert libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0) == 0

    def denied() -> tuple[int, ...]:
        found = []
        for number in (110, 111, 102):  # getppid, getpgrp, getuid
            ctypes.set_errno(0)
            libc.syscall(number)
            found.append(ctypes.get_errno())
        return tuple(found)

    def body() -> None:
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        deny(110, 71)
        deny(111, 72)
        equal("set-up", denied(), (71, 72, 0))
        filters = status_field("self", "Seccomp_filters")
        wait_go()
        equal("denied", denied(), (71, 72, 0))
        equal("filters", status_field("self", "Seccomp_filters"), filters)

    pid = child(body)
    time.sleep(0.2)
    frozen()
    reap(pid)


@case
def limits() -> None:
    """Resource limits, soft and hard."""

    def body() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (333, 777))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 1 << 20))
        resource.setrlimit(resource.RLIMIT_STACK, (1 << 22, 1 << 23))
        resource.setrlimit(resource.RLIMIT_CPU, (5000, 6000))
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (123 << 12, 456 << 12))

        def read() -> str:
            return Path("/proc/self/limits").read_text()

        before = read()
        wait_go()
        equal("limits", read(), before)

    pid = child(body)
    time.sleep(0.2)
    frozen()
    reap(pid)


@case
def scheduling() -> None:
    """Nice value, policy, affinity, I/O priority, OOM score, of a process and of one thread of it."""

    def numbers(tid: int) -> tuple[object, ...]:
        return (
            os.getpriority(os.PRIO_PROCESS, tid),
            os.sched_getscheduler(tid),
            sorted(os.sched_getaffinity(tid)),
            libc.syscall(252, 1, tid),  # ioprio_get
        )

    def body() -> None:
        os.setpriority(os.PRIO_PROCESS, 0, 7)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        os.sched_setaffinity(0, {0})
        libc.syscall(251, 1, 0, 2 << 13 | 6)  # ioprio_set, best effort 6
        Path("/proc/self/oom_score_adj").write_text("345")
        found: dict[str, object] = {}

        def thread() -> None:
            tid = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, tid, 12)
            os.sched_setscheduler(tid, os.SCHED_IDLE, os.sched_param(0))
            os.sched_setaffinity(tid, os.sched_getaffinity(1))
            before = numbers(tid)
            wait_go()
            found["before"], found["after"] = before, numbers(tid)

        worker = threading.Thread(target=thread)
        worker.start()
        before = numbers(os.getpid())
        wait_go()
        worker.join()
        equal("process", numbers(os.getpid()), before)
        equal("thread", found["after"], found["before"])
        equal("OOM score", Path("/proc/self/oom_score_adj").read_text().strip(), "345")

    pid = child(body)
    time.sleep(0.3)
    frozen()
    reap(pid)


@case
def directories() -> None:
    """Working directory, umask, and a child with another root directory."""
    os.makedirs("jail/inner/deep", exist_ok=True)
    Path("jail/inner/file").write_text("in the jail")

    def body() -> None:
        above = os.open(DIR, os.O_PATH | os.O_DIRECTORY)  # the go-file itself: a link to it would end in the jail
        os.umask(0o137)
        os.chroot("jail")
        os.chdir("/inner/deep")
        while True:
            try:
                os.stat("go", dir_fd=above)
                break
            except FileNotFoundError:
                time.sleep(0.02)
        equal("cwd", os.getcwd(), "/inner/deep")
        equal("root", os.listdir("/"), ["inner"])
        equal("relative", Path("../file").read_text(), "in the jail")
        equal("umask", os.umask(0), 0o137)

    pid = child(body)
    time.sleep(0.2)
    here = os.getcwd()
    os.umask(0o027)
    frozen()
    reap(pid)
    equal("cwd", os.getcwd(), here)
    equal("umask", os.umask(0), 0o027)


@case
def shared_memory_files() -> None:
    """/dev/shm: files, directories, links, modes, holes; one open and unlinked, one mapped by two processes."""
    root = Path("/dev/shm/podtest")
    (root / "inner").mkdir(parents=True)
    (root / "file").write_bytes(b"content")
    os.chmod(root / "file", 0o604)
    os.chown(root / "file", 12, 34)
    os.utime(root / "file", ns=(10**18, 10**18 + 5))
    os.symlink("file", root / "link")
    os.mkfifo(root / "inner/fifo")
    with open(root / "sparse", "wb") as file:
        file.seek(1 << 24)
        file.write(b"end")
    open_file = os.open(root / "file", os.O_RDWR)
    gone = os.open(root / "gone", os.O_RDWR | os.O_CREAT)
    os.write(gone, b"no name any more")
    os.unlink(root / "gone")
    mapped = os.open(root / "mapped", os.O_RDWR | os.O_CREAT)
    os.ftruncate(mapped, 1 << 20)
    area = mmap.mmap(mapped, 1 << 20)
    area[1000:1005] = b"hello"

    def body() -> None:
        wait_go()
        area[0:5] = b"child"

    pid = child(body)

    def listing() -> list[object]:
        found: list[object] = []
        for path in sorted(root.rglob("*")):
            stat = path.lstat()
            changed = 0 if path.name == "mapped" else stat.st_mtime_ns  # the child writes it any time
            found.append((str(path), stat.st_mode, stat.st_uid, stat.st_gid, stat.st_size, changed))
        return found

    before = listing()
    blocks = (root / "sparse").stat().st_blocks
    frozen()
    for got, wanted in zip(listing(), before, strict=True):
        equal("path, mode, owner, size, time", got, wanted)
    reap(pid)
    equal("link", os.readlink(root / "link"), "file")
    true("holes", (root / "sparse").stat().st_blocks <= blocks + 16)
    equal("sparse", (root / "sparse").read_bytes()[-4:], b"\0end")
    os.pwrite(open_file, b"C", 0)
    equal("open file is the file", (root / "file").read_bytes(), b"Content")
    equal("unlinked", os.pread(gone, 100, 0), b"no name any more")
    equal("mapping", (area[0:5], area[1000:1005], (root / "mapped").read_bytes()[:5]), (b"child", b"hello", b"child"))
    shutil.rmtree(root)


@case
def named_semaphores() -> None:
    """sem_open(3): mapped under a passing name, then linked to its own; others who open that share it afterwards."""
    semaphore = 1  # the kind, for SemLock
    kept = SemLock(semaphore, 0, 10, "/podtest-kept", False)
    gone = SemLock(semaphore, 2, 10, "/podtest-gone", True)

    def body() -> None:
        wait_go()
        SemLock._rebuild(0, semaphore, 10, "/podtest-kept").release()
        gone.release()

    pid = child(body)
    frozen()
    reap(pid)
    true("the one with a name is shared", kept.acquire(True, 10))
    equal("the one without", [gone.acquire(False) for _ in range(4)], [True, True, True, False])


@case
def environment_of_the_pod() -> None:
    """Host name, limits of the pod's devices, loopback, and mounts look the same."""
    names = ("/proc/sys/kernel/hostname", "/proc/sys/net/ipv4/ip_local_port_range")

    def look() -> list[object]:
        mounts = sorted(
            line.split()[1] + " " + line.split()[2] for line in Path("/proc/mounts").read_text().splitlines()
        )
        return [os.uname().nodename, mounts, [Path(name).read_text() for name in names], sorted(os.listdir("/dev"))]

    before = look()
    frozen()
    for got, wanted in zip(look(), before, strict=True):
        equal("host name, mounts, sysctl, /dev", got, wanted)


if __name__ == "__main__":
    main()
