"""Calls on descriptors that Python's os and fcntl lack: tee, linkat, reflinks, owners, reopening.

Source: tee(2), link(2), ioctl_ficlone(2), F_GETOWN_EX(2const), fcntl_locking(2); include/uapi/linux/fs.h,
fcntl.h and eventpoll.h (Linux 6.18).
"""

from __future__ import annotations

import array
import contextlib
import enum
import errno
import fcntl
import functools
import os
import struct
import termios
from collections.abc import Iterator

from podtree.kernel import mount
from podtree.kernel.sys import NR, syscall

AT_EMPTY_PATH = 0x1000
SPLICE_F_NONBLOCK = 2
FICLONE = 0x40049409
F_SETSIG, F_GETSIG = 10, 11
F_SETOWN_EX, F_GETOWN_EX = 15, 16
F_ADD_SEALS, F_GET_SEALS = 1033, 1034
F_SETPIPE_SZ, F_GETPIPE_SZ = 1031, 1032
F_OFD_SETLK = 37
F_GETLEASE = 1025
O_LARGEFILE = 0o100000  # Python's os.O_LARGEFILE is 0 on 64 bit, the kernel's is not
O_TMPFILE_BIT = 0o20000000  # __O_TMPFILE, without O_DIRECTORY
EPIOCSPARAMS = 0x40088A01
EPIOCGPARAMS = 0x80088A02  # struct epoll_params, Linux 6.9


class OwnerType(enum.IntEnum):
    """F_OWNER_*: whom SIGIO goes to."""

    TID = 0
    PID = 1
    PGRP = 2


def tee(source: int, target: int, length: int) -> int:
    """Duplicate up to `length` bytes between two pipes without consuming them; 0 when the source has none."""
    try:
        return syscall(NR.tee, source, target, length, SPLICE_F_NONBLOCK)
    except BlockingIOError:
        return 0


def link_fd(fd: int, dir_fd: int, name: str) -> None:
    """Give the inode behind `fd` another name; its link count must not be 0 (linkat(2), AT_EMPTY_PATH)."""
    syscall(NR.linkat, fd, b"\0", dir_fd, os.fsencode(name) + b"\0", AT_EMPTY_PATH)


def clone_contents(source: int, target: int) -> None:
    """Make `target` share all extents of `source` (FICLONE): O(extents)."""
    fcntl.ioctl(target, FICLONE, source)


def queued_bytes(fd: int) -> int:
    """FIONREAD."""
    count = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]


def get_owner(fd: int) -> tuple[int, int]:
    """(OwnerType, id in the caller's pid namespace; 0 for nobody)."""
    kind, pid = struct.unpack("ii", fcntl.fcntl(fd, F_GETOWN_EX, bytes(8)))
    return kind, pid


@functools.cache
def _proc_of(pid: int) -> int:
    """A mount of procfs for the caller's own pid namespace, attached nowhere: works whatever / is."""
    return mount.make_mount("proc", {})


def proc_fd() -> int:
    """A directory descriptor of a procfs in which "self" is the caller, also inside of a pod's root."""
    return _proc_of(os.getpid())


def reopen(fd: int, flags: int) -> int:
    """A new open file description of the same file, opened with `flags`; close-on-exec.

    Goes through /proc/self/fd, so it works for what has no name (any more): unlinked files, memfds, pipes.
    """
    flags = flags & ~os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY
    return os.open(f"self/fd/{fd}", flags, dir_fd=proc_fd())


@contextlib.contextmanager
def working_directory(fd: int) -> Iterator[None]:
    """A directory, which may be O_PATH, is this process's working directory inside the `with`."""
    before = os.open(".", os.O_PATH | os.O_CLOEXEC)
    try:
        os.fchdir(fd)
        yield
    finally:
        os.fchdir(before)
        os.close(before)


def set_lock(fd: int, *, write: bool, start: int, end: int | None) -> None:
    """Take an open file description lock (F_OFD_SETLK) without waiting."""
    length = 0 if end is None else end - start + 1
    kind = fcntl.F_WRLCK if write else fcntl.F_RDLCK
    fcntl.fcntl(fd, F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0))


def data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the parts of a file of `size` bytes that are no holes, in bytes; moves the file's position."""
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole follows
                return
            raise
        position = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, position
