"""Locks between processes: flock(2) on files that no other thing is kept in.

A lock ends with the process that holds it, however that ends, so there are no stale ones.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from podtree.errors import Conflict


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Take the lock if that is possible at once."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def acquire(path: str, *, shared: bool = False, timeout: float | None = None, what: str = "") -> int:
    """Lock the file at `path`, making it if needed; the lock is held until the descriptor is closed.

    Waits `timeout` seconds, for ever if None, then raises Conflict. A lock file may be removed by
    its holder: whoever waited for it then tries again on the new one.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _wait(fd, shared, deadline, what or path)
            if is_same(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _wait(fd: int, shared: bool, deadline: float | None, what: str) -> None:
    if deadline is None:
        fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        return
    pause = 0.0005
    while not try_lock(fd, shared=shared):
        if time.monotonic() >= deadline:
            raise Conflict(f"{what} is in use by another podtree command", "wait for it to end, then try again")
        time.sleep(pause)
        pause = min(pause * 2, 0.05)


def is_same(fd: int, path: str) -> bool:
    """Whether `path` still names the open file `fd`."""
    try:
        on_disk = os.stat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (on_disk.st_dev, on_disk.st_ino) == (mine.st_dev, mine.st_ino)


@contextmanager
def held(path: str, *, shared: bool = False, timeout: float | None = None, what: str = "") -> Iterator[None]:
    """`acquire` as a scope."""
    fd = acquire(path, shared=shared, timeout=timeout, what=what)
    try:
        yield
    finally:
        os.close(fd)
