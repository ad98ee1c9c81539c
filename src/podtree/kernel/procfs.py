"""Parsers of /proc/PID (proc(5)): status, stat, smaps, threads. Numbers as the kernel prints them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field


def read_text(path: str) -> str:
    """A whole /proc file; bytes that are no UTF-8 survive as surrogates."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def threads(pid: int) -> list[int]:
    """Thread ids of a process, ascending."""
    return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))


def living_thread(pid: int) -> int:
    """The thread through which /proc and other calls reach what a process has: its leader while that lives.

    A leader that has ended shows no memory and no descriptors, though other threads have them. The process's own
    number if none of its threads lives.
    """
    if stat(pid).state not in "ZX":
        return pid
    return next((tid for tid in threads(pid) if stat(pid, tid).state not in "ZX"), pid)


def status(pid: int, tid: int | None = None) -> dict[str, str]:
    """/proc/PID[/task/TID]/status as a dictionary of stripped strings."""
    path = f"/proc/{pid}/task/{tid}/status" if tid else f"/proc/{pid}/status"
    result = {}
    for line in read_text(path).splitlines():
        key, _, value = line.partition(":")
        result[key] = value.strip()
    return result


@dataclass(frozen=True, slots=True)
class Stat:
    """/proc/PID/stat; ids are those of the reader's pid namespace."""

    state: str
    ppid: int
    pgrp: int
    session: int
    tty_nr: int
    tpgid: int
    exit_signal: int
    start_time: int  # clock ticks since boot
    start_code: int
    end_code: int
    start_stack: int
    start_data: int
    end_data: int
    start_brk: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    exit_code: int  # wait status
    processor: int  # CPU it last ran on
    num_threads: int


def stat(pid: int, tid: int | None = None) -> Stat:
    """Fields of /proc/PID[/task/TID]/stat (proc_pid_stat(5))."""
    text = read_text(f"/proc/{pid}/task/{tid}/stat" if tid else f"/proc/{pid}/stat")
    f = text[text.rindex(")") + 2 :].split()
    return Stat(
        state=f[0], ppid=int(f[1]), pgrp=int(f[2]), session=int(f[3]), tty_nr=int(f[4]), tpgid=int(f[5]),
        num_threads=int(f[17]), start_time=int(f[19]), start_code=int(f[23]), end_code=int(f[24]),
        start_stack=int(f[25]), exit_signal=int(f[35]), start_data=int(f[42]), end_data=int(f[43]),
        start_brk=int(f[44]), arg_start=int(f[45]), arg_end=int(f[46]), env_start=int(f[47]),
        env_end=int(f[48]), exit_code=int(f[49]), processor=int(f[36]),
    )  # fmt: skip


@dataclass(slots=True)
class MapEntry:
    """One line of /proc/PID/maps and, from smaps, its VmFlags (two-letter codes)."""

    start: int
    end: int
    perms: str
    offset: int
    device: tuple[int, int]
    inode: int
    path: str
    flags: frozenset[str] = field(default_factory=frozenset)
    protection_key: int = 0  # pkeys(7)

    @property
    def length(self) -> int:
        return self.end - self.start


_LINE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)$")


def _entry(line: str) -> MapEntry | None:
    match = _LINE.match(line)
    if not match:
        return None
    start, end, perms, offset, major, minor, inode, path = match.groups()
    return MapEntry(
        int(start, 16), int(end, 16), perms, int(offset, 16), (int(major, 16), int(minor, 16)), int(inode), path
    )


def maps(pid: int) -> list[MapEntry]:
    """The mappings of a process, ascending, without VmFlags."""
    return [e for e in map(_entry, read_text(f"/proc/{pid}/maps").split("\n")) if e]


# One mapping of smaps. Its forty other lines are skipped within the expression: a pod waits while this is read.
_SMAP = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)\n"
    r"(?:(?!ProtectionKey|VmFlags)[A-Z].*\n)*(?:ProtectionKey: *(\d+)\n)?VmFlags:(.*)$",
    re.MULTILINE,
)


def smaps(pid: int) -> list[MapEntry]:
    """The mappings of a process, ascending, with VmFlags. ValueError if the kernel's format isn't understood."""
    text = read_text(f"/proc/{pid}/smaps")
    found = [
        MapEntry(
            int(start, 16), int(end, 16), perms, int(offset, 16), (int(major, 16), int(minor, 16)), int(inode), path,
            frozenset(flags.split()), int(key or 0),
        )
        for start, end, perms, offset, major, minor, inode, path, key, flags in _SMAP.findall(text)
    ]  # fmt: skip
    if len(found) != text.count("\nVmFlags:"):  # a mapping that went unnoticed would be lost
        raise ValueError(f"/proc/{pid}/smaps looks as on no kernel that is known")
    return found


def current_call(tid: int) -> int:
    """Number of the system call that a thread is blocked in (proc_pid_syscall(5)); -1: none, or it is running."""
    first = read_text(f"/proc/{tid}/syscall").split()[0]
    return int(first) if first.lstrip("-").isdigit() else -1


def last_ran_ns(tid: int) -> int:
    """When a sleeping thread last was on a CPU, by the scheduler's clock; -1 where /proc/PID/sched is missing."""
    try:
        for line in read_text(f"/proc/{tid}/sched").split("\n", 4):
            if line.startswith("se.exec_start"):
                whole, _, fraction = line.partition(":")[2].strip().partition(".")
                return int(whole) * 1_000_000 + int(fraction.ljust(6, "0"))
    except FileNotFoundError:
        pass
    return -1


def pod_id(text: dict[str, str], key: str = "NSpid") -> int:
    """The number in the pod's pid namespace, the one below the reader's; 0 if it has none there.

    `key`: of which one: also NSpgid, NSsid.
    """
    ids = text.get(key, "").split()
    depth = len(ns_pids(text))
    return int(ids[min(1, depth - 1)]) if len(ids) == depth else 0


def inner_id(text: dict[str, str], key: str = "NSpid") -> int:
    """Likewise, in the innermost pid namespace that the task is in."""
    ids = text.get(key, "").split()
    return int(ids[-1]) if len(ids) == len(ns_pids(text)) else 0


def ns_pids(text: dict[str, str]) -> list[int]:
    """NSpid of a status: the id in each pid namespace, the reader's first, the innermost last."""
    return [int(v) for v in text["NSpid"].split()]


def memory_available() -> int:
    """Bytes that programs could have without swapping: MemAvailable of /proc/meminfo."""
    lines = read_text("/proc/meminfo").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
