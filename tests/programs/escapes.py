"""Known ways out of containers, and nosy looks, as root of a pod: each prints BAD with what it got, if it gets it.

escapes.py            tries them all; prints DONE and how many
escapes.py FILE       prints READY, and does so when FILE is there
escapes.py --nested   does so as root of a user namespace of its own, with all others that it can get
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)
ATTEMPTS: list[Callable[[], Iterator[str]]] = []

CLONE = {
    "NEWTIME": 0x80, "NEWNS": 0x20000, "NEWCGROUP": 0x2000000, "NEWUTS": 0x4000000, "NEWIPC": 0x8000000,
    "NEWUSER": 0x10000000, "NEWPID": 0x20000000, "NEWNET": 0x40000000,
}  # fmt: skip
X32 = 0x40000000
#: Calls that no pod may make, with x86_64 numbers: EPERM or ENOSYS, whatever the arguments.
FORBIDDEN = {
    "acct": 163, "add_key": 248, "bpf": 321, "clock_settime": 227, "create_module": 174, "delete_module": 176,
    "fanotify_init": 300, "finit_module": 313, "fsconfig": 431, "fsmount": 432, "fsopen": 430, "fspick": 433,
    "init_module": 175, "io_uring_enter": 426, "io_uring_register": 427, "io_uring_setup": 425, "ioperm": 173,
    "iopl": 172, "kcmp": 312, "kexec_file_load": 320, "kexec_load": 246, "keyctl": 250, "mount": 165,
    "mount_setattr": 442, "move_mount": 429, "move_pages": 279, "nfsservctl": 180, "open_by_handle_at": 304,
    "open_tree": 428, "perf_event_open": 298, "pidfd_getfd": 438, "pivot_root": 155, "process_madvise": 440,
    "quotactl": 179, "quotactl_fd": 443, "reboot": 169, "request_key": 249, "setdomainname": 171, "setns": 308,
    "settimeofday": 164, "swapoff": 168, "swapon": 167, "syslog": 103, "umount2": 166,
    "uselib": 134, "userfaultfd": 323, "vhangup": 153, "landlock_create_ruleset": 444, "clone3": 435,
    "a call of the future": 500,
}  # fmt: skip


def attempt(function: Callable[[], Iterator[str]]) -> Callable[[], Iterator[str]]:
    """Registers one attempt: a generator of what it got hold of."""
    ATTEMPTS.append(function)
    return function


def call(number: int, *arguments: int) -> int:
    """A raw system call; its result, or the negative errno."""
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(a & (1 << 64) - 1) for a in arguments))
    return -ctypes.get_errno() if result == -1 else int(result)


def can(work: Callable[[], object]) -> bool:
    """Whether it works."""
    try:
        work()
    except (OSError, ValueError):
        return False
    return True


def write(path: str, text: str = "x") -> None:
    """Write to an existing file."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def opened(path: str, flags: int) -> None:
    """Open and close."""
    os.close(os.open(path, flags))


@attempt
def forbidden_calls() -> Iterator[str]:
    for name, number in FORBIDDEN.items():
        for abi, bit in (("", 0), ("x32 ", X32)):
            result = call(number | bit, 0, 0, 0, 0, 0, 0)
            if result not in (-errno.EPERM, -errno.ENOSYS):
                yield f"{abi}{name}: {result}"


@attempt
def namespaces() -> Iterator[str]:
    for name, flag in CLONE.items():
        if call(272, flag) >= 0:
            yield f"unshare of {name}"
        if name != "NEWTIME":  # clone(2) has another meaning for that bit
            pid = call(56, flag | 17, 0, 0, 0, 0)
            if pid == 0:
                os._exit(0)
            if pid > 0:
                yield f"clone with {name}"
    for kind in os.listdir("/proc/1/ns"):
        fd = os.open(f"/proc/1/ns/{kind}", os.O_RDONLY)
        if call(308, fd, 0) >= 0:
            yield f"setns to {kind}"
        os.close(fd)


@attempt
def calls_of_32_bits() -> Iterator[str]:
    """The same by int $0x80, where numbers differ."""
    memory = mmap.mmap(-1, 4096, prot=7, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # push rbx; mov eax, edi; mov ebx, esi; mov r8, rcx; mov ecx, edx; mov edx, r8d; int 0x80; pop rbx; ret
    memory.write(bytes.fromhex("5389f889f34989c889d14489c2cd805bc3"))
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    thunk = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint)(address)
    if thunk(20, 0, 0, 0) not in (os.getpid(), -errno.ENOSYS):
        yield "the test is broken: getpid by int 0x80"
    for name, number, first in (
        ("unshare", 310, CLONE["NEWUSER"]), ("keyctl", 288, 0), ("mount", 21, 0), ("bpf", 357, 0),
        ("io_uring_setup", 425, 1), ("userfaultfd", 374, 0), ("setns", 346, 0), ("open_by_handle_at", 342, 0),
    ):  # fmt: skip
        result = thunk(number, first, 0, 0)
        if result not in (-errno.EPERM, -errno.ENOSYS):
            yield f"int 0x80 {name}: {result}"


@attempt
def kernel_settings() -> Iterator[str]:
    for path in (
        "/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe",
        "/proc/sys/kernel/hotplug", "/proc/sys/kernel/hostname", "/proc/sys/kernel/ns_last_pid",
        "/proc/sys/vm/drop_caches", "/proc/sys/vm/panic_on_oom", "/proc/sys/fs/binfmt_misc/register",
        "/proc/sys/net/ipv4/ip_forward", "/proc/irq/default_smp_affinity", "/proc/bus/pci/devices",
        "/sys/kernel/uevent_helper", "/sys/kernel/mm/transparent_hugepage/enabled", "/sys/power/state",
        "/sys/fs/cgroup/release_agent", "/sys/fs/cgroup/cgroup.procs", "/sys/class/net/lo/mtu",
        "/sys/kernel/security/apparmor/.replace", "/sys/module/kernel/parameters/panic", "/sys/kernel/vmcoreinfo",
    ):  # fmt: skip
        if can(functools.partial(write, path)):
            yield f"could write to {path}"
    for top in ("/sys", "/proc/sys", "/proc/fs", "/proc/bus", "/proc/irq"):
        for directory, _, names in os.walk(top):
            for name in names:
                path = os.path.join(directory, name)
                if can(functools.partial(opened, path, os.O_WRONLY)):
                    yield f"could open {path} for writing"


@attempt
def nosy_reads() -> Iterator[str]:
    for path in (
        "/proc/kcore", "/proc/kmsg", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/proc/latency_stats",
        "/proc/scsi/scsi", "/proc/acpi/wakeup", "/proc/interrupts", "/dev/kmsg", "/dev/mem", "/dev/port",
        "/sys/firmware/efi", "/sys/firmware/dmi", "/sys/devices/virtual/powercap/dtm", "/sys/kernel/debug/x",
    ):  # fmt: skip
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            if stat.S_ISDIR(os.fstat(fd).st_mode) or os.read(fd, 1):
                yield f"could read {path}"
    for line in Path("/proc/kallsyms").read_text().splitlines()[:200]:
        if int(line.split()[0], 16):
            yield "kernel addresses in /proc/kallsyms"
            break


@attempt
def devices() -> Iterator[str]:
    blocks = [Path(f"/sys/block/{name}/dev").read_text().strip() for name in os.listdir("/sys/block")]
    numbers = [(stat.S_IFBLK, tuple(map(int, text.split(":")))) for text in blocks]
    numbers += [(stat.S_IFCHR, (1, minor)) for minor in (1, 2, 3, 4, 11)]
    numbers += [(stat.S_IFCHR, (10, minor)) for minor in (200, 229, 232, 237)]  # tun, fuse, kvm, loop-control
    for place in ("/", "/tmp", "/dev", "/dev/shm", "/var/tmp", "/dev/mqueue"):
        for kind, (major, minor) in numbers:
            path = f"{place}/node-{os.getpid()}"
            try:
                os.mknod(path, kind | 0o600, os.makedev(major, minor))
            except OSError:
                continue
            for flags in (os.O_RDONLY, os.O_RDWR):
                if can(functools.partial(opened, path, flags)):
                    yield f"could open device {major}:{minor} in {place}"
            os.unlink(path)


@attempt
def mounts() -> Iterator[str]:
    """What hides something can be neither moved nor removed nor looked behind."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in points:
        if point != "/":
            if can(functools.partial(os.rename, point, "/moved")):
                yield f"could rename {point}"
            if can(functools.partial(os.rmdir, point)) or can(functools.partial(os.unlink, point)):
                yield f"could remove {point}"
    if os.listdir("/.podtree") or can(lambda: os.mkdir("/.podtree/x")):
        yield "could use /.podtree"
    here = os.stat("/").st_dev
    for name in os.listdir("/"):
        if name.startswith(".podtree") and os.lstat(f"/{name}").st_dev == here:
            yield f"/{name} isn't masked"


@attempt
def up_and_out() -> Iterator[str]:
    """chroot(2) is allowed; it leads no further up than the pod's root."""
    inode = os.stat("/").st_ino
    pid = os.fork()
    if pid == 0:
        os.makedirs("/tmp/jail", exist_ok=True)
        root = os.open("/", os.O_RDONLY)
        os.chroot("/tmp/jail")
        os.fchdir(root)
        for _ in range(100):
            os.chdir("..")
        os.chroot(".")
        os._exit(os.stat("/").st_ino != inode)
    if os.waitpid(pid, 0)[1]:
        yield "chroot led out of the root"


@attempt
def handles() -> Iterator[str]:
    """The shocker: CAP_DAC_READ_SEARCH and open_by_handle_at(2)."""
    handle = struct.pack("Ii8s", 8, 1, struct.pack("II", 2, 0))
    buffer = ctypes.create_string_buffer(handle, 64)
    fd = os.open("/", os.O_RDONLY)
    if call(304, fd, ctypes.addressof(buffer), os.O_RDONLY) >= 0:
        yield "open_by_handle_at"


@attempt
def processes_outside() -> Iterator[str]:
    """Nobody but the pod's own; the parent of the first is nowhere."""
    seen = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    for pid in seen:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/status").read_text()
            if len(next(line for line in text.splitlines() if line.startswith("NSpid")).split()) != 2:
                yield f"process {pid} is of another pid namespace"
            for what in ("exe", "cwd", "root"):
                if "podtree-" in os.readlink(f"/proc/{pid}/{what}") and os.stat(f"/proc/{pid}/{what}").st_nlink:
                    yield f"/proc/{pid}/{what}"
    if can(lambda: os.kill(0 if os.getpgrp() == os.getpid() else 1 << 22, 0)) and os.getppid() not in (0, *seen):
        yield "a parent outside"


@attempt
def sockets() -> Iterator[str]:
    for family, kind in ((40, socket.SOCK_STREAM), (40, socket.SOCK_DGRAM)):
        if can(functools.partial(socket.socket, family, kind)):
            yield f"a socket of family {family}"
    if len(Path("/proc/net/unix").read_text().splitlines()) > 60:
        yield "the host's unix sockets"
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    if [line.split(":")[0].strip() for line in lines] != ["lo"]:
        yield f"network interfaces {lines}"


@attempt
def terminals() -> Iterator[str]:
    """Typing into somebody else's terminal: TIOCSTI, TIOCLINUX, the consoles, /dev/tty of nobody."""
    for path in ("/dev/tty", "/dev/console", "/dev/tty0", "/dev/tty1", "/dev/ttyS0", "/dev/vcs", "/dev/pts/0"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
            for request in (0x5412, 0x541C):
                if can(functools.partial(fcntl.ioctl, fd, request, b"x")):
                    yield f"ioctl {request:#x} on {path}"


@attempt
def faults_for_others() -> Iterator[str]:
    """While the memory of a branch comes in, its processes have a userfaultfd: none of its ioctls is for them."""
    for request in (0xC018AA3F, 0xC020AA00, 0xC028AA03, 0xC020AA04, 0x8010AA01, 0x8010AA02, 0xC018AA06):
        for fd in (0, 1, 2):
            try:
                fcntl.ioctl(fd, request, bytearray(64))
                yield f"ioctl {request:#x}"
            except OSError as error:
                if error.errno != errno.EPERM:
                    yield f"ioctl {request:#x}: {error}"


@attempt
def ipc() -> Iterator[str]:
    for name in ("shm", "sem", "msg"):
        if len(Path(f"/proc/sysvipc/{name}").read_text().splitlines()) > 1:
            yield f"the host's System V {name}"
    if os.listdir("/dev/mqueue"):
        yield "the host's message queues"


@attempt
def the_log() -> Iterator[str]:
    """The first process's stdout is a file of the pool: no way up from it, no name of the place, no subvolumes."""
    for fd in (1, 2):
        link = os.readlink(f"/proc/1/fd/{fd}")
        if "pool" in link or "pods" in link:
            yield f"the pool's place: {link}"
        log = os.open(f"/proc/1/fd/{fd}", os.O_RDWR | os.O_APPEND)
        for name in ("..", ".", "../upper", "../../.."):
            if can(functools.partial(os.listdir, f"/proc/1/fd/{fd}/{name}")):
                yield f"/proc/1/fd/{fd}/{name}"
        args = bytearray(4096)
        args[8:14] = b"escape"
        for number in (1, 14, 15, 17, 23, 24, 63, 64):  # btrfs: snapshot, subvolume, destroy, search
            request = 1 << 30 | len(args) << 16 | 0x9400 | number
            if can(functools.partial(fcntl.ioctl, log, request, args)):
                yield f"btrfs ioctl {number} on the log"


@attempt
def limits_of_others() -> Iterator[str]:
    if can(lambda: write("/proc/self/oom_score_adj", "-1000")):
        yield "out of the OOM killer's reach"
    if can(lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))):
        yield "real-time priority"
    if can(lambda: os.setpriority(os.PRIO_PROCESS, 0, -20)):
        yield "a negative nice value"


# ---- with `run --nested`: as root of a user namespace

MAY_NESTED = {
    "fsconfig", "fsmount", "fsopen", "fspick", "mount", "mount_setattr", "move_mount", "open_tree", "pivot_root",
    "setdomainname", "setns", "umount2", "unshare",
}  # fmt: skip
NOT_NESTED = {forbidden_calls, namespaces, calls_of_32_bits, the_log}  # what may be called; what it can't see at all
NESTED: list[Callable[[], Iterator[str]]] = []
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC = 1, 2, 4, 8, 32, 4096, 16384


def nested_attempt(function: Callable[[], Iterator[str]]) -> Callable[[], Iterator[str]]:
    """Registers an attempt of somebody in a user namespace, made before the others."""
    NESTED.append(function)
    return function


def mounted(source: str | None, target: str, fstype: str | None = None, flags: int = 0) -> bool:
    """mount(2)."""
    words = [text.encode() if text else None for text in (source, target, fstype)]
    return libc.mount(*words, ctypes.c_ulong(flags), None) == 0


@nested_attempt
def still_forbidden_calls() -> Iterator[str]:
    for name in FORBIDDEN.keys() - MAY_NESTED:
        if call(FORBIDDEN[name], 0, 0, 0, 0, 0, 0) not in (-errno.EPERM, -errno.ENOSYS):
            yield name
    for name in ("NEWTIME", "NEWCGROUP"):
        if call(272, CLONE[name]) >= 0 or call(272, CLONE[name] | CLONE["NEWUSER"]) >= 0:
            yield f"unshare of {name}"
    pid = call(56, CLONE["NEWUSER"] | CLONE["NEWCGROUP"] | 17, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    if pid > 0:
        yield "clone with NEWCGROUP"


@nested_attempt
def namespaces_of_the_pod() -> Iterator[str]:
    for kind in os.listdir("/proc/self/ns"):
        with contextlib.suppress(OSError), open(f"/proc/1/ns/{kind}") as file:
            if call(308, file.fileno(), 0) >= 0:
                yield f"setns to {kind}"


@nested_attempt
def file_systems() -> Iterator[str]:
    """A new /proc or /sys without what hides parts of it, control groups, disks."""
    os.makedirs("/tmp/new", exist_ok=True)
    with open("/proc/filesystems") as file:
        every = [line.split()[-1] for line in file]
    # binfmt_misc: of the user namespace's own
    harmless = {"binfmt_misc", "tmpfs", "ramfs", "mqueue", "devpts", "overlay", "fuse", "fuseblk", "fusectl", "bpf"}
    for flags in (0, MS_RDONLY, MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC):
        for fstype in sorted({*every, "proc", "sysfs", "cgroup", "cgroup2"} - harmless):
            if mounted("none", "/tmp/new", fstype, flags):
                yield f"a new {fstype} {os.listdir('/tmp/new')[:5]}"
                libc.umount2(b"/tmp/new", 2)


@nested_attempt
def uncovered() -> Iterator[str]:
    """What hides something can be neither unmounted nor made writable, and no second look goes behind it."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in reversed(points):
        if point != "/" and libc.umount2(point.encode(), 2) == 0:
            yield f"unmounted {point}"
        mounted(None, point, None, MS_REMOUNT | MS_BIND)
        mounted(None, point, None, MS_REMOUNT | MS_BIND | MS_NOSUID | MS_NOEXEC)
    os.makedirs("/tmp/second", exist_ok=True)
    for flags in (MS_BIND, MS_BIND | MS_REC):
        if mounted("/", "/tmp/second", None, flags):
            if os.listdir("/tmp/second/.podtree") or can(lambda: os.mkdir("/tmp/second/.podtree/x")):
                yield "could use /.podtree"
            if can(lambda: os.rename("/tmp/second/.podtree", "/tmp/second/moved")):
                yield "could move /.podtree"
            if can(lambda: os.rmdir("/tmp/second/.podtree")):
                yield "could remove /.podtree"
            libc.umount2(b"/tmp/second", 2)
    for path in ("/proc", "/proc/sys", "/sys", "/dev"):
        if mounted(path, "/tmp/second", None, MS_BIND):
            if path != "/dev" and can(lambda: write("/tmp/second/kernel/core_pattern", "x")):
                yield f"{path} is writable when bound elsewhere"
            libc.umount2(b"/tmp/second", 2)


def enter_nested() -> None:
    """All the rights that can be had."""
    me, (reader, writer) = os.getpid(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{me}/{name}").write_text("0 0 4294967295")
        os._exit(0)
    wanted = [CLONE[name] for name in ("NEWUSER", "NEWNS", "NEWIPC", "NEWUTS", "NEWNET")]
    assert libc.unshare(sum(wanted)) == 0, "the pod isn't --nested"
    os.close(writer)
    assert os.waitpid(pid, 0)[1] == 0
    ATTEMPTS[:] = [*NESTED, *(one for one in ATTEMPTS if one not in NOT_NESTED)]


def main() -> None:
    if sys.argv[1:] == ["--nested"]:
        enter_nested()
    elif len(sys.argv) > 1:
        print("READY", flush=True)
        while not os.path.exists(sys.argv[1]):
            time.sleep(0.05)
    for one in ATTEMPTS:
        try:
            for got in one():
                print(f"BAD {one.__name__}: {got}", flush=True)
        except Exception as error:
            print(f"BAD {one.__name__}: {type(error).__name__}: {error}", flush=True)
    print(f"DONE {len(ATTEMPTS)}", flush=True)


if __name__ == "__main__":
    main()
