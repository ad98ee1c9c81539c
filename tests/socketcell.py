"""A process with sockets in network and mount namespaces of its own: stopped, looked at, and brought back elsewhere.

The original goes on afterwards and passes the same check as the copy: looking must not disturb it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from podtree.errors import Problem
from podtree.kernel import kcmp
from podtree.kernel.namespaces import Clone, loopback_up, unshare
from podtree.kernel.pidfd import pidfd_getfd, pidfd_open
from podtree.objects import insight, sockets
from podtree.objects.context import CollectContext, FrozenProcess, RestoreContext
from podtree.objects.sockets import SocketCollector, SocketState

Sockets = dict[str, socket.socket]
HOME = Path(tempfile.mkdtemp(prefix="socketcell-"))  # a tmpfs of the cell's own is mounted there
atexit.register(HOME.rmdir)
TIMEOUT_S = 150  # of a cell's process, and
PATIENCE_S = 60  # of a socket in it: reached only by a failure, however busy the machine


def _own_world() -> None:
    unshare(Clone.NEWNET | Clone.NEWNS)
    os.system("mount --make-rprivate /")
    assert os.system(f"mount -t tmpfs none {HOME}") == 0
    os.chdir(HOME)
    os.umask(0o22)


def child(work: Callable[[], None]) -> int:
    """Fork; the child runs `work` and ends with status 0, or 1 after a traceback."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(TIMEOUT_S)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def join(pid: int, what: str) -> None:
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"{what} ended with status {status:#x} (traceback above)"


class Cell:
    """The frozen original: `states` and `problems` are what was collected from it."""

    def __init__(self, pid: int, names: dict[str, int], go: int, pod_pid: int = 1) -> None:
        self.pid = pid
        self.names = names
        self.go = go
        self.pod_pid = pod_pid
        self.states: dict[int, SocketState] = {}
        self.problems: list[Problem] = []

    def collect(self) -> None:
        """As a checkpoint does it, which tries again when a collector asked for kernel memory."""
        self._collect()
        if self.problems and insight.prepare():
            self._collect()

    def _collect(self) -> None:
        pidfd = pidfd_open(self.pid)
        root = os.open("/", os.O_PATH)
        ctx = CollectContext(root, Path("/nowhere"), Path("/nowhere"),
                             [FrozenProcess(self.pid, self.pod_pid, "cell", pidfd)])  # fmt: skip
        collector = SocketCollector(ctx, self._passed)
        try:
            for number in self.names.values():
                fd = pidfd_getfd(pidfd, number)
                collector.add(number, ctx.processes[0], f"fd {number} (socket)", fd)
                os.close(fd)
            self.states = collector.finish()
            self.problems = ctx.problems
        finally:
            sockets.forget_namespace()
            os.close(pidfd)
            os.close(root)

    def _passed(self, fd: int, process: FrozenProcess, display: str) -> int:
        """A descriptor in a queue: of one of the cell's own sockets, as everything else needs a whole pod."""
        for number in self.names.values():
            pidfd = pidfd_open(self.pid)
            own = pidfd_getfd(pidfd, number)
            os.close(pidfd)
            same = kcmp.compare_files(fd, own) == 0
            os.close(own)
            if same:
                os.close(fd)
                return number
        raise AssertionError(f"{display} of process {process.pid} is no socket of the cell")

    def named(self, name: str) -> SocketState:
        return self.states[self.names[name]]


@contextlib.contextmanager
def frozen(setup: Callable[[], Sockets], check: Callable[[Sockets], None] | None = None,
           traffic: Callable[[Sockets], None] | None = None, delay_s: float = 0,
           pod_pid: int = 1) -> Iterator[Cell]:  # fmt: skip
    """A cell whose process made `setup`, was stopped (after `delay_s` of `traffic`) and collected.

    On leaving, the original runs on, and `check` is made in it (not with traffic).
    """
    told, tell = os.pipe()
    wait, go = os.pipe()

    def original() -> None:
        os.close(go)
        _own_world()
        loopback_up()
        made = setup()
        os.write(tell, msgspec.json.encode({name: sock.fileno() for name, sock in made.items()}))
        if traffic:
            traffic(made)
        os.read(wait, 1)
        if check and not traffic:
            check(made)

    pid = child(original)
    os.close(wait)
    try:
        os.close(tell)
        raw = os.read(told, 1 << 20)
        assert raw, "the original did not come up (traceback above)"
        if delay_s:
            time.sleep(delay_s)
        os.kill(pid, signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
        cell = Cell(pid, msgspec.json.decode(raw, type=dict[str, int]), go, pod_pid)
        cell.collect()
        yield cell
        os.kill(pid, signal.SIGCONT)
        if not traffic:
            os.write(go, b"g")
            original_pid, pid = pid, 0
            join(original_pid, "the original")
    finally:
        os.close(told)
        os.close(go)
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def restored(cell: Cell, check: Callable[[Sockets], None], prepare: Callable[[], None] | None = None) -> None:
    """Bring the cell's sockets back in fresh namespaces and check them; states go through the image's encoding."""
    assert not cell.problems, cell.problems
    states = msgspec.msgpack.decode(msgspec.msgpack.encode(cell.states), type=dict[int, SocketState])

    def copy() -> None:
        _own_world()
        if prepare:
            prepare()
        root = os.open("/proc", os.O_PATH)  # whichever directory: sockets need none of the context
        before = os.listdir("/proc/self/fd")
        fds = sockets.restore_sockets(states, RestoreContext(root, root, root, root), lambda number: number)
        assert set(fds) == set(cell.names.values())
        assert not [name for name in os.listdir(HOME) if name.startswith(".podtree")]
        extra = len(os.listdir("/proc/self/fd")) - len(before) - len(fds)
        assert extra <= 1, f"{extra} descriptors left open"  # the procfs of podtree.kernel.fdops stays
        made = {name: socket.socket(fileno=fds[number]) for name, number in cell.names.items()}
        for sock in made.values():
            sock.setblocking(True)
            sock.settimeout(PATIENCE_S)
        check(made)

    join(child(copy), "the copy")


def transplant(setup: Callable[[], Sockets], check: Callable[[Sockets], None],
               prepare: Callable[[], None] | None = None) -> Cell:  # fmt: skip
    """`check` holds for the copy, for a second copy, and for the original."""
    with frozen(setup, check) as cell:
        restored(cell, check, prepare)
        restored(cell, check, prepare)
    return cell


def refused(setup: Callable[[], Sockets], text: str, check: Callable[[Sockets], None] | None = None) -> None:
    """The cell can't be saved, for a reason that says `text`; the original is unharmed."""
    with frozen(setup, check) as cell:
        assert any(text in str(problem) for problem in cell.problems), cell.problems
