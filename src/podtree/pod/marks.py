"""What tells a recorded pod's supervisor that a moment is worth keeping: the pod itself, and the ends of its processes.

A program writes a line to /run/podtree/mark, a plain file, so nothing about it has to be saved or can block; its
supervisor watches the directory by inotify(7), on the overlay's own inode. The kernel's process connector tells of
processes that end with an error. Both come right after the fact: the moment before is the last recorded checkpoint.

Deletions of many files aren't noticed: fanotify(7) tells of them only one by one and afterwards, and to be asked
before each would slow down every program of the pod.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from podtree.kernel import inotify, procevents, procfs
from podtree.kernel.inotify import Event
from podtree.kernel.mount import Resolve, openat2
from podtree.pod.containment import MARK

if TYPE_CHECKING:
    from podtree.pod.live import LivePod
    from podtree.pod.loop import Loop

DIRECTORY, NAME = os.path.split(MARK.lstrip("/"))
_LONGEST = 4096  # bytes that are looked at
#: Ends that somebody wanted: no error.
_ASKED_FOR = (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGTERM)
_INSIDE = Resolve.BENEATH | Resolve.NO_SYMLINKS

Mark = Callable[[str], None]


class MarkSources:
    """Calls `mark` with a text for each such moment, from `start` to `stop`."""

    def __init__(self, loop: Loop, live: LivePod, mark: Mark) -> None:
        self._loop = loop
        self._live = live
        self._mark = mark
        self._notify = -1
        self._ends: socket.socket | None = None

    def start(self) -> list[str]:
        """What can't be watched here, for people."""
        missing = []
        try:
            self._watch_file()
        except OSError as error:
            missing.append(f"/{DIRECTORY}/{NAME} ({os.strerror(error.errno or 0)})")
        try:
            self._ends = procevents.listen()
            self._loop.watch(self._ends.fileno(), read=self._ended)
        except OSError as error:
            missing.append(f"processes that end with an error ({os.strerror(error.errno or 0)})")
        return missing

    def stop(self) -> None:
        if self._notify >= 0:
            self._loop.forget(self._notify)
            os.close(self._notify)
            self._notify = -1
        if self._ends is not None:
            self._loop.forget(self._ends.fileno())
            self._ends.close()
            self._ends = None

    def _watch_file(self) -> None:
        """No link is followed: the tree is the pod's. Files and directories that it puts in the place are watched."""
        directory = openat2(self._live.root_fd, DIRECTORY, os.O_PATH | os.O_DIRECTORY, _INSIDE)
        try:
            notify = inotify.inotify_init(os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                inotify.add_watch(notify, f"/proc/self/fd/{directory}", Event.CLOSE_WRITE | Event.MOVED_TO)
            except BaseException:
                os.close(notify)
                raise
        finally:
            os.close(directory)
        self._notify = notify
        self._loop.watch(notify, read=self._written)

    def _written(self) -> None:
        raw = b""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._notify, 1 << 16):
                raw += part
        if NAME.encode() + b"\0" in raw:  # struct inotify_event has the name, filled up with NULs
            text = self._text()
            if text:
                self._mark(text)

    def _text(self) -> str:
        """The file's last line."""
        with contextlib.suppress(OSError):
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOATIME
            fd = openat2(self._live.root_fd, f"{DIRECTORY}/{NAME}", flags, _INSIDE)
            try:
                size = os.fstat(fd).st_size
                raw = os.pread(fd, _LONGEST, max(0, size - _LONGEST))
            finally:
                os.close(fd)
            lines = raw.decode(errors="replace").split("\n")
            return next((line.strip() for line in reversed(lines) if line.strip()), "")
        return ""

    def _ended(self) -> None:
        assert self._ends is not None
        for end in procevents.read(self._ends):
            try:
                if self._is_ours(end.pid) or self._is_ours(end.parent):
                    text = _describe(end)
                    if text:
                        self._mark(text)
            except Exception:
                traceback.print_exc()

    def _is_ours(self, pid: int) -> bool:
        """A process that has been waited for is in no group any more; then its parent tells."""
        with contextlib.suppress(OSError, ValueError):
            if pid in self._live.pids():
                return True
        return False


def _describe(end: procevents.ErrorExit) -> str:
    """"process 7 (make) ended with 2"; empty if that is no error."""
    code = os.waitstatus_to_exitcode(end.status & 0xFFFF & ~0x80)  # 0x80: it has left a core dump
    if code < 0 and -code in _ASKED_FOR:
        return ""
    who = "a process"
    with contextlib.suppress(OSError, ValueError, LookupError):
        status = procfs.status(end.pid)
        who = f"process {procfs.ns_pids(status)[-1]} ({status['Name']})"
    if code < 0:
        return f"{who} was ended by {signal.Signals(-code).name if -code in set(signal.Signals) else -code}"
    return f"{who} ended with {code}"
