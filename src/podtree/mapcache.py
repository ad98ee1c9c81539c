"""The mappings of a pod's processes, read while the pod is stopped only where they can have changed.

Only /proc/PID/smaps tells a mapping's flags, and for it the kernel looks at every page of the process: some 12 ms for
a gibibyte. But it counts how often an address space has been locked to change its mappings
(include/linux/mmap_lock.h, mm_lock_seq; Linux 6.4): while that is what it was, they are. It is read from kernel
memory (podtree.kernel.kmem), for processes large enough to matter. Where that can't be read smaps is, each time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from podtree.kernel import procfs
from podtree.kernel.kmem import KernelMemory
from podtree.kernel.pidfd import pidfd_open_living
from podtree.kernel.procfs import MapEntry
from podtree.kernel.sys import PAGE_SIZE
from podtree.objects import insight
from podtree.objects.context import FrozenProcess

LARGE_BYTES = 32 << 20  # of memory: from here on smaps takes longer than all else that is asked of a process

Count = tuple[int, int, int, int]
"""Inode of the pidfd, execve(2) calls, address of the mm_struct, mm_lock_seq: no two states have the same."""


class MapCache:
    """What is known of the mappings of one pod's processes, by host pid."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Count, list[MapEntry]]] = {}

    def prepare(self, pids: Iterable[int]) -> None:
        """Before the pod is stopped: learn the mappings of large processes, if they aren't known yet."""
        large = {pid: tid for pid in pids if _is_large(tid := _living(pid))}
        self._known = {pid: known for pid, known in self._known.items() if pid in large}
        if large and insight.memory() is None:
            insight.prepare()
        for pid, tid in large.items():
            with contextlib.suppress(OSError):  # it has ended
                pidfd = pidfd_open_living(pid)
                try:
                    self._learn(pid, tid, pidfd)
                finally:
                    os.close(pidfd)

    def _learn(self, pid: int, tid: int, pidfd: int) -> None:
        before = _count(pidfd)
        if before is None or self._known.get(pid, (None,))[0] == before:
            return
        entries = procfs.smaps(tid)
        if _count(pidfd) == before:
            self._known[pid] = before, entries

    def of(self, process: FrozenProcess) -> list[MapEntry]:
        """The mappings of a stopped process, as procfs.smaps() gives them."""
        known = self._known.get(process.host_pid)
        if known is not None and known[0] == _count(process.pidfd):
            return known[1]
        return procfs.smaps(process.living)

    def keep(self, process: FrozenProcess, entries: list[MapEntry]) -> None:
        """Nothing has changed them while the process was stopped, but what was undone: they hold until it goes on."""
        if process.host_pid in self._known:
            count = _count(process.pidfd)
            if count is not None:
                self._known[process.host_pid] = count, entries


def _living(pid: int) -> int:
    try:
        return procfs.living_thread(pid)
    except OSError:  # it has ended
        return pid


def _is_large(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * PAGE_SIZE >= LARGE_BYTES
    except (OSError, IndexError):
        return False


def _count(pidfd: int) -> Count | None:
    """None where it can't be told, or the address space is just being changed."""
    memory = insight.memory()
    if memory is None:
        return None
    try:
        return _read_count(memory, pidfd)
    except (OSError, KeyError, ValueError):
        return None


def _read_count(memory: KernelMemory, pidfd: int) -> Count | None:
    task = memory.task(pidfd)
    mm = task.pointer("mm")
    offset, size = memory.btf.member("mm_struct", "mm_lock_seq")
    sequence = int.from_bytes(memory.read(mm + offset, size), "little")
    exec_id = task.number("self_exec_id")
    return (os.fstat(pidfd).st_ino, exec_id, mm, sequence) if mm else None
