"""New keepers forked from one that runs: an interpreter with the engine loaded, instead of a fresh start.

Loading the engine takes longer than restoring a small pod. A keeper has nothing to do while its pod runs; so it
listens at a socket of its own, and whoever wants a branch asks a running relative's keeper to fork. The new
keeper has none of its descriptors, and becomes what a freshly started one would be. Where nobody answers, or
runs other code, the caller starts one itself.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import msgspec

import podtree
from podtree.pod.dirs import PodDirs

SOCKET = "nursery"
_PATIENCE_S = 5.0  # for the other end of a local socket
_MANY = 1 << 20  # above any descriptor: os.closerange uses close_range(2)
_YES, _NO = b"y", b"n"


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """What a supervisor has to do first."""

    home: str
    pod_id: str
    restore: bool = False  # from the pod's image instead of starting its program
    rewind: str | None = None  # the checkpoint that the pod is put back to before that
    attach: bool = False  # the starter stays connected to the first process's stdio
    size: tuple[int, int] | None = None  # of its terminal

    def dirs(self) -> PodDirs:
        """Where the pod's things lie."""
        home = Path(self.home)
        return PodDirs(home, home / "pool" / "pods" / self.pod_id, home / "run" / self.pod_id)


@functools.cache
def code_identity() -> str:
    """Tells whether two processes run the same podtree: where it lies, and its newest file when this was asked."""
    package = os.path.dirname(podtree.__file__)
    newest = max(
        entry.stat().st_mtime_ns
        for directory, _, _ in os.walk(package)
        for entry in os.scandir(directory)
        if entry.name.endswith(".py")
    )
    return f"{podtree.__version__} {package} {newest}"


def listen(run: Path, name: str) -> socket.socket:
    """A listening socket in `run`; its path is given through a descriptor, as it may be longer than 108 bytes."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    place = os.open(run, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{place}/{name}")
    finally:
        os.close(place)
    listener.listen(64)
    return listener


def connect(run: Path, name: str) -> socket.socket:
    """A connection to a socket that `listen` made. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    place = -1
    try:
        place = os.open(run, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        sock.connect(f"/proc/self/fd/{place}/{name}")  # the path itself may be too long
    except BaseException:
        sock.close()
        raise
    finally:
        if place >= 0:
            os.close(place)
    return sock


def load_engine() -> None:
    """Load all that a restore and a checkpoint need, for this process and those that it forks."""
    import podtree.checkpoint
    import podtree.pod.supervisor
    import podtree.restore.pod  # noqa: F401


def ask(start: Start, runs: Iterable[Path]) -> socket.socket | None:
    """Have the keeper of one of the pods with these run directories fork the keeper of another pod.

    Returns the starter's connection to it, or None when none of them can.
    """
    request = msgspec.msgpack.encode((code_identity(), start))
    for run in runs:
        try:
            sock = connect(run, SOCKET)
        except OSError:
            continue
        try:
            sock.settimeout(_PATIENCE_S)
            sock.sendall(len(request).to_bytes(4, "little") + request)
            if sock.recv(1) == _YES:
                sock.settimeout(None)
                return sock
        except OSError:
            pass
        sock.close()
    return None


def be_born(sock: socket.socket) -> tuple[Start, socket.socket]:
    """In a fresh fork of a keeper: leave everything of it behind; returns what is wanted, and by whom.

    Ends the process if whoever asks isn't served.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    leave_all_but(sock.fileno())
    os.setsid()
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        sock.settimeout(_PATIENCE_S)
        identity, start = msgspec.msgpack.decode(_request(sock), type=tuple[str, Start])
        if identity == code_identity():
            sock.sendall(_YES)
            sock.settimeout(None)
            return start, sock
        sock.sendall(_NO)
    _leave()


def _request(sock: socket.socket) -> bytes:
    head = sock.recv(4, socket.MSG_WAITALL)
    return sock.recv(int.from_bytes(head, "little"), socket.MSG_WAITALL)


def _leave() -> NoReturn:
    os._exit(0)


def leave_all_but(fd: int) -> None:
    """Close what this process was forked with, except for `fd` and 0, 1, 2, which are replaced later."""
    os.closerange(3, fd)
    os.closerange(fd + 1, _MANY)
