"""/proc/PID/fdinfo/N: what the kernel tells of an open file description (proc_pid_fdinfo(5))."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LockLine:
    """A file lock held through this description: lock_get_status() in fs/locks.c."""

    kind: str  # POSIX, FLOCK, OFDLCK, LEASE, DELEG, ACCESS
    write: bool
    start: int
    end: int | None  # inclusive; None: to the end of the file, however it grows
    text: str


@dataclass(frozen=True, slots=True)
class FdInfo:
    """The common lines, the locks, and all lines of each key in `extra` (stripped, in order)."""

    pos: int
    flags: int  # as F_GETFL, with O_CLOEXEC where this descriptor has it
    mount_id: int
    locks: tuple[LockLine, ...] = ()
    extra: dict[str, list[str]] = field(default_factory=dict)

    def one(self, key: str) -> str:
        """The value of a line that must be there; ValueError otherwise."""
        if key not in self.extra:
            raise ValueError(f"the kernel's fdinfo has no line {key!r}")
        return self.extra[key][0]


_LOCK = re.compile(r"\d+:\s+(?:-> )?(\w+)\s+(\w+)\s+(\w+)\s+\S+\s+\S+\s+(\d+)\s+(\d+|EOF)")


def parse_fdinfo(text: str) -> FdInfo:
    """Parse the text of a fdinfo file; ValueError where it is not understood."""
    fields: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if not colon:  # "inotify wd:1 ino:..." splits at the first colon too: keep the first word as key
            continue
        fields.setdefault(key, []).append(value.strip())
    locks = tuple(_lock(value) for value in fields.pop("lock", ()))
    return FdInfo(
        pos=int(fields.pop("pos")[0]),
        flags=int(fields.pop("flags")[0], 8),
        mount_id=int(fields.pop("mnt_id")[0]),
        locks=locks,
        extra=fields,
    )


def _lock(value: str) -> LockLine:
    match = _LOCK.match(value)
    if not match:
        raise ValueError(f"unknown lock line {value!r}")
    kind, _advisory, access, start, end = match.groups()
    return LockLine(kind, access == "WRITE", int(start), None if end == "EOF" else int(end), value)


def read_fdinfo(pid: int | str, fd: int) -> FdInfo:
    """fdinfo of descriptor `fd` of a process (its pid in the reader's namespace, or "self")."""
    file = os.open(f"/proc/{pid}/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while chunk := os.read(file, 65536):
            parts.append(chunk)
    finally:
        os.close(file)
    return parse_fdinfo(b"".join(parts).decode())
