"""New keepers forked from one that runs: an interpreter with the engine loaded, instead of a fresh start.

Loading the engine takes longer than restoring a small pod. A keeper has nothing to do while its pod runs; so it
listens at a socket of its own, and whoever wants a branch asks a running relative's keeper to fork. The new
keeper has none of its descriptors, and becomes what a freshly started one would be. Where nobody answers, or
runs other code, the caller starts one itself.

Who asks for a branch often asks for another of the same checkpoint. So the keeper has one made ready ahead: the
*standby*, whose processes are there, stopped, but for what depends on when they go on (podtree.restore.pod). The
next who asks gets that. It waits for a while, or until its keeper ends or somebody asks for another checkpoint's.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import msgspec

import podtree
from podtree.pod import wire
from podtree.pod.dirs import PodDirs
from podtree.pool.records import new_id

SOCKET = "nursery"
_PATIENCE_S = 5.0  # for the other end of a local socket
_MANY = 1 << 20  # above any descriptor: os.closerange uses close_range(2)
_REQUEST_S = 1.0  # for a request that is on its way: the keeper waits for it
_YES, _NO = b"y", b"n"
READY = b"r"
STANDBY_S = float(os.environ.get("PODTREE_STANDBY_S", 30))
"""How long a branch is kept ready; 0: none is made."""
_STANDBY_PAUSE_S = 0.1  # a new branch has the processors for itself at first


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """What a supervisor has to do first."""

    home: str
    pod_id: str
    restore: bool = False  # from the pod's image instead of starting its program
    branch: str | None = None  # the checkpoint that the pod, which isn't there yet, is to be a branch of
    name: str | None = None  # of the branch
    standby: bool = False  # make it ready, and wait for somebody who wants it
    rewind: str | None = None  # the checkpoint that the pod is put back to before that
    attach: bool = False  # the starter stays connected to the first process's stdio
    size: tuple[int, int] | None = None  # of its terminal

    @property
    def needs_engine(self) -> bool:
        """Whether a restore comes first."""
        return self.restore or self.branch is not None

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


class _Standby:
    """A branch in waiting: `sock` leads to its supervisor, which waits for an order there."""

    def __init__(self, checkpoint: str, sock: socket.socket) -> None:
        self.checkpoint = checkpoint
        self.sock = sock
        self.ready = False
        self.until = time.monotonic() + STANDBY_S

    def hear(self) -> bool:
        """It is ready, or (False) it is gone."""
        with contextlib.suppress(OSError):
            if self.sock.recv(1, socket.MSG_DONTWAIT) == READY:
                self.ready = True
                return True
        return False


class Nursery:
    """Where a keeper forks others. `birth`: what a new process does, in a session of its own."""

    def __init__(self, run: Path, birth: Callable[[Start, socket.socket], NoReturn]) -> None:
        self._birth = birth
        self._listener = listen(run, SOCKET)
        self._standby: _Standby | None = None
        self._next: tuple[float, Start] | None = None  # when the next standby is to be made, and after whom
        self._hopeless: set[str] = set()  # checkpoints whose branches can't wait
        code_identity()  # of the code that this process runs, noted before anybody changes it

    def fds(self) -> list[int]:
        """What to watch for reading; `tend` follows."""
        return [self._listener.fileno(), *([self._standby.sock.fileno()] if self._standby else [])]

    def timeout_ms(self) -> float | None:
        """When to call `tend` at the latest."""
        times = [self._next[0]] if self._next else [self._standby.until] if self._standby else []
        return max(0.0, (times[0] - time.monotonic()) * 1000) if times else None

    def is_asked(self, ready: Iterable[int]) -> bool:
        """Whether somebody wants a birth."""
        return self._listener.fileno() in ready

    def close(self) -> None:
        """For a fork that is no keeper."""
        self._listener.close()
        if self._standby:
            self._standby.sock.close()

    def tend(self, ready: Iterable[int]) -> None:
        """See to whoever wants something, and to the standby."""
        standby = self._standby
        if standby and standby.sock.fileno() in ready and not standby.hear():
            if not standby.ready:
                self._hopeless.add(standby.checkpoint)
            self._drop()
        elif standby and time.monotonic() >= standby.until:
            self._drop()
        if self.is_asked(ready):
            self._serve()
        if self._next and time.monotonic() >= self._next[0]:
            (_, after), self._next = self._next, None
            self._make_standby(after)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            with sock:
                start = _request(sock)
                if start is None:
                    return
                if not self._hand_over(start, sock):
                    self._fork(start, sock)
                if start.branch is not None and STANDBY_S > 0 and start.branch not in self._hopeless:
                    self._next = (time.monotonic() + _STANDBY_PAUSE_S, start)

    def _hand_over(self, start: Start, sock: socket.socket) -> bool:
        """Give whoever asks to the standby, if it is what is wanted."""
        standby = self._standby
        if standby is None or not standby.ready or standby.checkpoint != start.branch:
            return False
        try:
            wire.send(standby.sock, {"name": start.name}, [sock.fileno()])
        except OSError:
            return False
        finally:
            self._drop()
        return True

    def _drop(self) -> None:
        """The standby isn't ours any more: it ends, if it has no order."""
        if self._standby:
            self._standby.sock.close()
            self._standby = None

    def _make_standby(self, after: Start) -> None:
        if self._standby and self._standby.checkpoint == after.branch:
            return
        self._drop()
        ours, theirs = socket.socketpair()
        assert after.branch is not None
        self._standby = _Standby(after.branch, ours)
        self._fork(Start(home=after.home, pod_id=new_id(), branch=after.branch, standby=True), theirs)
        theirs.close()

    def _fork(self, start: Start, sock: socket.socket) -> None:
        """The new process leaves everything of this one behind."""
        if os.fork() == 0:
            try:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                leave_all_but(sock.fileno())
                os.setsid()
                self._birth(start, sock)
            finally:
                os._exit(1)


def _request(sock: socket.socket) -> Start | None:
    """What is wanted, if it can be served; whoever asks has been told."""
    sock.settimeout(_REQUEST_S)
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        head = sock.recv(4, socket.MSG_WAITALL)
        request = sock.recv(int.from_bytes(head, "little"), socket.MSG_WAITALL)
        identity, start = msgspec.msgpack.decode(request, type=tuple[str, Start])
        fits = identity == code_identity()
        sock.sendall(_YES if fits else _NO)
        sock.settimeout(None)
        return start if fits else None
    return None


def leave_all_but(fd: int) -> None:
    """Close what this process was forked with, except for `fd` and 0, 1, 2, which are replaced later."""
    os.closerange(3, fd)
    os.closerange(fd + 1, _MANY)
