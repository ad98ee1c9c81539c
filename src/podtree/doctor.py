"""What this machine can do: every feature is tried, none is guessed from a version.

`needed` features have no substitute; without one of the others podtree goes another way, named in
`otherwise`. Probes that change the process run in a forked child, which is waited for.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import shutil
import signal
import socket
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from podtree.kernel.kmem import KernelMemory
from podtree.kernel.sys import NR, PAGE_SIZE, syscall

_SECONDS = 5


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one probe. `otherwise` is what is done without the feature."""

    name: str
    ok: bool
    needed: bool
    detail: str = ""
    otherwise: str = ""


class _Missing(Exception):
    """A probe's word for no, with the reason."""


Check = Callable[[], str]

CLONE_NEWTIME, CLONE_NEWNS = 0x80, 0x20000  # linux/sched.h
_ALL_NAMESPACES = 0x2000000 | 0x4000000 | 0x8000000 | 0x20000000 | 0x40000000 | CLONE_NEWNS | CLONE_NEWTIME


def _in_child(check: Check) -> str:
    """Run a check in a forked child, which is killed if it takes too long."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer = b"-the probe failed"
        try:
            signal.alarm(_SECONDS)
            answer = b"+" + check().encode()
        except BaseException as error:
            answer = b"-" + _reason(error).encode()
        finally:
            os.write(writer, answer[:4000])
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        answer = file.read()
    os.waitpid(pid, 0)
    if not answer.startswith(b"+"):
        raise _Missing(answer[1:].decode() or "the probe did not end")
    return answer[1:].decode()


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__


# Tracking of changed memory


def _userfaultfd() -> str:
    """UFFD_FEATURE_WP_ASYNC (1 << 15), linux/userfaultfd.h; Linux 6.7."""
    fd = syscall(NR.userfaultfd, os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, 0xC018AA3F, bytearray(struct.pack("=QQQ", 0xAA, 1 << 15 | 1 << 13, 0)))  # UFFDIO_API
    finally:
        os.close(fd)
    return "write protection without faults to user space"


def _pagemap_scan() -> str:
    """PAGEMAP_SCAN, _IOWR('f', 16, struct pm_scan_arg), linux/fs.h; Linux 6.7."""
    area = mmap.mmap(-1, PAGE_SIZE)
    area[0] = 1
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    found = (ctypes.c_uint64 * 6)()
    present = 1 << 3  # PAGE_IS_PRESENT
    argument = struct.pack(
        "=12Q", 96, 0, start, start + PAGE_SIZE, 0, ctypes.addressof(found), 2, 0, 0, present, 0, present
    )
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if fcntl.ioctl(fd, 3 << 30 | 96 << 16 | ord("f") << 8 | 16, bytearray(argument)) != 1:
            raise _Missing("finds no pages")
    finally:
        os.close(fd)
    return "finds and re-arms changed pages in one call"


def _soft_dirty() -> str:
    """Bit 55 of a new page's pagemap entry; Documentation/admin-guide/mm/soft-dirty.rst."""
    area = mmap.mmap(-1, PAGE_SIZE)
    area[0] = 1
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(start // PAGE_SIZE * 8)
        if not struct.unpack("=Q", file.read(8))[0] >> 55 & 1:
            raise _Missing("the kernel was built without CONFIG_MEM_SOFT_DIRTY")
    return "pagemap bit 55"


# Tasks


def _ptrace() -> str:
    """PTRACE_SEIZE, PTRACE_INTERRUPT, and PTRACE_GET_RSEQ_CONFIGURATION (Linux 5.13) on a child."""
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    try:
        syscall(NR.ptrace, 0x4206, pid, 0, 0)
        syscall(NR.ptrace, 0x4207, pid, 0, 0)
        os.waitpid(pid, 0)
        buffer = ctypes.create_string_buffer(24)
        try:
            syscall(NR.ptrace, 0x420F, pid, 24, ctypes.addressof(buffer))
        except OSError:
            return "seize; no rseq configuration"
        return "seize, interrupt, rseq configuration"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _set_tid() -> str:
    """clone3(2) with set_tid (Linux 5.5): a child with a chosen number."""
    limit = int(Path("/proc/sys/kernel/pid_max").read_text())
    wanted = next(pid for pid in range(limit - 2, 300, -1) if not os.path.exists(f"/proc/{pid}"))
    tids = (ctypes.c_int32 * 1)(wanted)
    # struct clone_args: flags pidfd child_tid parent_tid exit_signal stack stack_size tls set_tid size cgroup
    raw = struct.pack("=11Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(tids), 1, 0)
    pid = syscall(NR.clone3, raw, len(raw))
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    if pid != wanted:
        raise _Missing("the child got another number")
    return "children with chosen pids"


def _prctl(option: int, *args: int) -> int:
    return syscall(NR.prctl, option, *args, *[0] * (4 - len(args)))


def _timer_ids() -> str:
    """PR_TIMER_CREATE_RESTORE_IDS (77), _GET (2); Linux 6.15."""
    _prctl(77, 2)
    return "POSIX timers with chosen ids"


def _set_mm() -> str:
    """PR_SET_MM (35), PR_SET_MM_MAP_SIZE (15); needs CONFIG_CHECKPOINT_RESTORE."""
    size = ctypes.c_uint32()
    _prctl(35, 15, ctypes.addressof(size))
    return "heap, stack and argument bounds"


def _map_vdso() -> str:
    """arch_prctl(ARCH_MAP_VDSO_64 = 0x2003): EEXIST, since there is one already; EINVAL where unknown."""
    with contextlib.suppress(FileExistsError):
        syscall(NR.arch_prctl, 0x2003, 0)
    return "vdso at a chosen address"


def _kcmp() -> str:
    me = os.getpid()
    if syscall(NR.kcmp, me, me, 0, 0, 0) != 0:  # KCMP_FILE
        raise _Missing("says that a descriptor differs from itself")
    return "tells shared descriptions from equal ones"


def _pidfd_getfd() -> str:
    pidfd = syscall(NR.pidfd_open, os.getpid(), 0)
    try:
        os.close(syscall(NR.pidfd_getfd, pidfd, pidfd, 0))
    finally:
        os.close(pidfd)
    return "takes descriptors from a task"


def _process_vm() -> str:
    source, target = ctypes.create_string_buffer(b"memory"), ctypes.create_string_buffer(6)
    vectors = struct.pack("=QQ", ctypes.addressof(target), 6), struct.pack("=QQ", ctypes.addressof(source), 6)
    if syscall(NR.process_vm_readv, os.getpid(), vectors[0], 1, vectors[1], 1, 0) != 6 or target.raw != b"memory":
        raise _Missing("reads something else")
    return "reads another task's memory"


def _seccomp() -> str:
    """SECCOMP_GET_ACTION_AVAIL (2) for SECCOMP_RET_ERRNO; seccomp(2)."""
    syscall(NR.seccomp, 2, 0, struct.pack("=I", 0x00050000))
    return "system call filters"


# Containment


def _namespaces() -> str:
    syscall(NR.unshare, _ALL_NAMESPACES & ~CLONE_NEWTIME)
    return "mount, net, ipc, uts, cgroup, pid"


def _time_namespace() -> str:
    syscall(NR.unshare, CLONE_NEWTIME)
    Path("/proc/self/timens_offsets").write_text("monotonic 1 0\nboottime 1 0\n")
    return "CLOCK_MONOTONIC goes on where it was"


def _overlay() -> str:
    with tempfile.TemporaryDirectory(prefix="podtree-doctor-") as place:
        syscall(NR.unshare, CLONE_NEWNS)
        syscall(NR.mount, b"none\0", b"/\0", None, 1 << 18 | 1 << 14, None)  # MS_PRIVATE | MS_REC
        syscall(NR.mount, b"tmpfs\0", place.encode() + b"\0", b"tmpfs\0", 0, None)
        for name in ("lower", "upper", "work", "merged"):
            os.mkdir(f"{place}/{name}")
        options = f"lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/work"
        merged = f"{place}/merged"
        syscall(NR.mount, b"overlay\0", merged.encode() + b"\0", b"overlay\0", 0, options.encode() + b"\0")
        syscall(NR.umount2, merged.encode() + b"\0", 2)
        syscall(NR.umount2, place.encode() + b"\0", 2)  # MNT_DETACH
    return "the pod's root over the host's files"


def _mount_api() -> str:
    """fsopen(2), fsconfig(2), fsmount(2): mounts without a place (Linux 5.2)."""
    context = syscall(NR.fsopen, b"tmpfs\0", 1)
    try:
        syscall(NR.fsconfig, context, 6, None, None, 0)  # FSCONFIG_CMD_CREATE
        os.close(syscall(NR.fsmount, context, 1, 0))
    finally:
        os.close(context)
    return "fsopen, fsmount"


def _cgroups() -> str:
    """A group is made and removed in every hierarchy that podtree uses."""
    found = []
    for mount, kind, options in _cgroup_mounts():
        try:
            group = tempfile.mkdtemp(prefix="podtree-doctor-", dir=mount)
            os.rmdir(group)
        except OSError as error:
            found.append(f"{mount} ({_reason(error)})")
            continue
        if kind == "cgroup2":
            names = Path(mount, "cgroup.controllers").read_text().split()
            found.append("v2: " + (" ".join(names) or "no controllers"))
        else:
            wanted = {"memory", "cpu", "pids", "freezer", "devices"} & set(options)
            found += [f"v1: {' '.join(sorted(wanted))}"] if wanted else []
    if not found:
        raise _Missing("no cgroup hierarchy is mounted")
    return "; ".join(found)


def _cgroup_mounts() -> list[tuple[str, str, list[str]]]:
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _source, options = rest.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            found.append((fields.split()[4], kind, options.split(",")))
    return found


# Network


def _tcp_repair() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, 19, 1)  # TCP_REPAIR, linux/tcp.h
    return "connections with their queues and sequence numbers"


def _unix_diag() -> str:
    """A dump request of linux/unix_diag.h over NETLINK_SOCK_DIAG (4)."""
    request = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as sock:
        sock.settimeout(_SECONDS)
        sock.send(struct.pack("=IHHII", 16 + len(request), 20, 0x301, 1, 0) + request)
        if struct.unpack_from("=IH", sock.recv(65536))[1] == 2:  # NLMSG_ERROR
            raise _Missing("unix_diag is missing")
    return "finds the peers of unix sockets"


def _kernel_memory() -> str:
    try:
        KernelMemory().close()
    except KeyError as error:
        raise _Missing(str(error.args[0])) from error
    return "queues of sockets that nobody holds, SEM_UNDO"


# Pool


def _btrfs() -> str:
    if "btrfs" not in Path("/proc/filesystems").read_text().split():
        raise _Missing("not in /proc/filesystems; perhaps: modprobe btrfs")
    return "snapshots"


def _loop() -> str:
    fd = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        return f"/dev/loop{fcntl.ioctl(fd, 0x4C82)} is free"  # LOOP_CTL_GET_FREE
    finally:
        os.close(fd)


def _mkfs() -> str:
    found = shutil.which("mkfs.btrfs", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        raise _Missing("install the package btrfs-progs")
    return found


def _pool() -> str:
    from podtree.pool import home

    place = home.default_home()
    if not home.is_ready(place):
        return f"{place}: not there, or not mounted, yet; {home.disk_free(_existing(place)) >> 20} MiB free"
    return f"{place}: ready"


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _root() -> str:
    if os.geteuid() != 0:
        raise _Missing("not root")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:") and not int(line.split()[1], 16) >> 21 & 1:
            raise _Missing("no CAP_SYS_ADMIN")
    return "CAP_SYS_ADMIN"


# name, check, whether it needs a process of its own, what is done without it ("" where nothing can be)
_CHECKS: list[tuple[str, Check, bool, str]] = [
    ("root", _root, False, ""),
    ("userfaultfd WP_ASYNC", _userfaultfd, False, "every checkpoint reads and compares all memory"),
    ("PAGEMAP_SCAN", _pagemap_scan, False, "every checkpoint reads and compares all memory"),
    ("soft-dirty", _soft_dirty, False, "not needed where the two above are there"),
    ("ptrace", _ptrace, True, ""),
    ("clone3 set_tid", _set_tid, True, ""),
    ("pidfd_getfd", _pidfd_getfd, False, ""),
    ("kcmp", _kcmp, False, ""),
    ("process_vm_readv", _process_vm, False, ""),
    ("PR_SET_MM", _set_mm, False, ""),
    ("ARCH_MAP_VDSO_64", _map_vdso, True, ""),
    ("PR_TIMER_CREATE_RESTORE_IDS", _timer_ids, False, "timers are made and deleted until the id comes"),
    ("seccomp", _seccomp, False, "pods run without a filter of system calls"),
    ("namespaces", _namespaces, True, ""),
    ("time namespace", _time_namespace, True, "CLOCK_MONOTONIC jumps in a branch"),
    ("overlay", _overlay, True, ""),
    ("mount API", _mount_api, False, ""),
    ("cgroups", _cgroups, False, "--memory, --cpus and --pids are refused"),
    ("TCP_REPAIR", _tcp_repair, False, "pods with TCP connections are refused"),
    ("unix_diag", _unix_diag, False, "pods with connected unix sockets are refused"),
    ("kernel memory", _kernel_memory, False, "data before accept(2), pending errors and SEM_UNDO are refused"),
    ("btrfs", _btrfs, False, ""),
    ("loop devices", _loop, False, "PODTREE_HOME must be a directory on btrfs"),
    ("mkfs.btrfs", _mkfs, False, "PODTREE_HOME must be a directory on btrfs, or an existing pool"),
    ("pool", _pool, False, ""),
]


def examine() -> list[Probe]:
    """Try everything; takes a few tens of milliseconds and leaves nothing behind."""
    uname = os.uname()
    found = [Probe(name="kernel", ok=True, needed=False, detail=f"{uname.sysname} {uname.release} {uname.machine}")]
    for name, check, own_process, otherwise in _CHECKS:
        try:
            detail, ok = (_in_child(check) if own_process else check()), True
        except (_Missing, OSError, ValueError) as error:
            detail, ok = _reason(error), False
        found.append(Probe(name=name, ok=ok, needed=not otherwise, detail=detail, otherwise=otherwise))
    return found
