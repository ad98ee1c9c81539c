"""inotify(7): the calls, the flags, and the lines of its fdinfo (fs/notify/fdinfo.c, inotify_fdinfo(), Linux 6.18)."""

from __future__ import annotations

import enum
import fcntl
import os
import re
from dataclasses import dataclass

from podtree.kernel.fhandle import FileHandle
from podtree.kernel.sys import NR, syscall

INOTIFY_IOC_SETNEXTWD = 0x40044900  # include/uapi/linux/inotify.h: _IOW('I', 0, __s32)


class Event(enum.IntFlag):
    """IN_*: what happened, or what to be told of; include/uapi/linux/inotify.h."""

    ACCESS = 0x1
    MODIFY = 0x2
    ATTRIB = 0x4
    CLOSE_WRITE = 0x8
    CLOSE_NOWRITE = 0x10
    OPEN = 0x20
    MOVED_FROM = 0x40
    MOVED_TO = 0x80
    CREATE = 0x100
    DELETE = 0x200
    DELETE_SELF = 0x400
    MOVE_SELF = 0x800
    UNMOUNT = 0x2000
    Q_OVERFLOW = 0x4000
    IGNORED = 0x8000
    EXCL_UNLINK = 0x04000000
    ISDIR = 0x40000000
    ONESHOT = 0x80000000


@dataclass(frozen=True, slots=True)
class WatchLine:
    """One watch. `device` is the superblock's number (not always st_dev), `handle` None where the kernel shows none."""

    wd: int
    ino: int
    device: int
    mask: int  # as inotify_add_watch(2) takes it, IN_ONESHOT and IN_EXCL_UNLINK included
    handle: FileHandle | None


_LINE = re.compile(
    r"([0-9a-f]+) ino:([0-9a-f]+) sdev:([0-9a-f]+) mask:([0-9a-f]+) ignored_mask:[0-9a-f]+ ?"
    r"(?:fhandle-bytes:[0-9a-f]+ fhandle-type:([0-9a-f]+) f_handle:([0-9a-f]*))?"
)


def parse_watch(value: str) -> WatchLine:
    """A line of fdinfo behind "inotify wd:"; ValueError if it is not understood."""
    match = _LINE.match(value)
    if not match:
        raise ValueError(f"unknown inotify line in fdinfo: {value!r}")
    device = int(match[3], 16)
    handle = FileHandle(int(match[5], 16), bytes.fromhex(match[6])) if match[5] else None
    number = os.makedev(device >> 20, device & 0xFFFFF)  # include/linux/kdev_t.h
    return WatchLine(int(match[1], 16), int(match[2], 16), number, int(match[4], 16), handle)


def inotify_init(flags: int) -> int:
    """inotify_init1(2)."""
    return syscall(NR.inotify_init1, flags)


def add_watch(fd: int, path: str, mask: int) -> int:
    """inotify_add_watch(2): the watch's number. One that is there already gets the new mask."""
    return syscall(NR.inotify_add_watch, fd, os.fsencode(path) + b"\0", mask & 0xFFFFFFFF)


def remove_watch(fd: int, wd: int) -> None:
    """inotify_rm_watch(2)."""
    syscall(NR.inotify_rm_watch, fd, wd)


def set_next(fd: int, wd: int) -> None:
    """The next watch gets the number `wd`, or the first free one above (CONFIG_CHECKPOINT_RESTORE)."""
    fcntl.ioctl(fd, INOTIFY_IOC_SETNEXTWD, wd)
