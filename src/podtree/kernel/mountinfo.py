"""/proc/PID/mountinfo (proc_pid_mountinfo(5)): the mounts of a process's mount namespace, by id."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount. Paths are bytes, as the kernel has them."""

    id: int
    parent: int
    device: int  # st_dev of the superblock
    root: bytes  # which directory (or file) of the file system is mounted
    point: bytes  # where, below the reader's view of the process's root
    options: bytes
    fstype: str
    source: bytes
    settings: bytes  # of the superblock


_ESCAPE = re.compile(rb"\\([0-7]{3})")


def _unescape(text: bytes) -> bytes:
    return _ESCAPE.sub(lambda m: bytes([int(m.group(1), 8)]), text)


@functools.lru_cache(maxsize=4)
def parse_mountinfo(text: bytes) -> Mapping[int, Mount]:
    """Mounts by id, in the order of the file (an upper mount at the same point comes later)."""
    mounts = {}
    for line in text.splitlines():
        left, _, right = line.partition(b" - ")
        fields = left.split()
        fstype, source, settings = right.split(b" ", 2)
        major, minor = fields[2].split(b":")
        mount = Mount(
            id=int(fields[0]),
            parent=int(fields[1]),
            device=os.makedev(int(major), int(minor)),
            root=_unescape(fields[3]),
            point=_unescape(fields[4]),
            options=fields[5],
            fstype=fstype.decode(),
            source=_unescape(source),
            settings=_unescape(settings),
        )
        mounts[mount.id] = mount
    return MappingProxyType(mounts)


def mounts_of(pid: int | str) -> Mapping[int, Mount]:
    """Mounts that `pid` sees."""
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        return parse_mountinfo(file.read())
