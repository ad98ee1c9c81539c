"""Namespaces and the processes in them: unshare, setns, clone3, time offsets, the loopback.

Source: clone(2), unshare(2), setns(2), time_namespaces(7), netdevice(7); include/uapi/linux/sched.h.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import fcntl
import os
import socket
import struct

from podtree.kernel.sys import NR, syscall

SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
IFF_UP = 0x1


class Clone(enum.IntFlag):
    """CLONE_*: include/uapi/linux/sched.h."""

    NEWTIME = 0x80
    FILES = 0x400
    PIDFD = 0x1000
    PARENT = 0x8000
    NEWNS = 0x20000
    NEWCGROUP = 0x2000000
    NEWUTS = 0x4000000
    NEWIPC = 0x8000000
    NEWUSER = 0x10000000
    NEWPID = 0x20000000
    NEWNET = 0x40000000


#: Names in /proc/PID/ns of what a pod has for itself.
POD_NAMESPACES = ("mnt", "net", "ipc", "uts", "cgroup", "time", "pid")


def unshare(flags: Clone) -> None:
    """Leave the caller's own namespaces of these kinds for new ones."""
    syscall(NR.unshare, flags)


def setns(fd: int, flags: Clone | int = 0) -> None:
    """Join the namespaces of a pidfd (several flags), or the one of a /proc/PID/ns file."""
    syscall(NR.setns, fd, flags)


# clone3 must not let go of the interpreter's lock: the child is a copy of the caller and goes on in Python.
_fork_syscall = ctypes.PyDLL(None, use_errno=True).syscall
_fork_syscall.restype = ctypes.c_long


def clone_python(flags: Clone, set_tid: tuple[int, ...] = ()) -> int:
    """fork(2) with clone3's flags, both sides going on in Python: 0 in the child, its pid in the parent.

    With Clone.PARENT the child's parent is the caller's parent, told of its end by the caller's exit signal.
    `set_tid` are the wanted pids, innermost pid namespace first.
    """
    tids = (ctypes.c_int * max(len(set_tid), 1))(*set_tid)
    exit_signal = 0 if flags & Clone.PARENT else 17
    raw = struct.pack("11Q", flags, 0, 0, 0, exit_signal, 0, 0, 0,
                      ctypes.addressof(tids) if set_tid else 0, len(set_tid), 0)  # fmt: skip
    args = ctypes.create_string_buffer(raw, len(raw))
    api = ctypes.pythonapi
    api.PyOS_BeforeFork()
    pid = int(_fork_syscall(ctypes.c_long(NR.clone3), args, ctypes.c_size_t(len(raw))))
    code = ctypes.get_errno()
    if pid == 0:
        api.PyOS_AfterFork_Child()
        return 0
    api.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(code, f"clone3: {os.strerror(code)} ({errno.errorcode.get(code, code)})")
    return pid


def set_time_offsets(monotonic_ns: int, boottime_ns: int, pid: int | str = "self") -> None:
    """Offsets of the new time namespace that a process's children will live in.

    Only before there is anybody in it: time_namespaces(7). `unshare(Clone.NEWTIME)` comes first.
    """
    lines = []
    for clock, offset in (("monotonic", monotonic_ns), ("boottime", boottime_ns)):
        seconds, nanoseconds = divmod(offset, 1_000_000_000)
        lines.append(f"{clock} {seconds} {nanoseconds}\n")
    fd = os.open(f"/proc/{pid}/timens_offsets", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, "".join(lines).encode())
    finally:
        os.close(fd)


def loopback_up() -> None:
    """Bring up `lo` of this network namespace; the kernel then gives it 127.0.0.1 and ::1 by itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        request = struct.pack("16sH22x", b"lo", 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(sock, SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | IFF_UP))


def namespace_id(pid: int, kind: str) -> str:
    """The identity of a namespace: "net:[4026531840]"."""
    return os.readlink(f"/proc/{pid}/ns/{kind}")
