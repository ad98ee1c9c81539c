"""The keeper: the parent of a pod's supervisor, which it replaces when it dies.

It does nothing else: holds copies of the descriptors that can't be had again (the console's master, the
stdio pipes, the root, the control socket), remembers what the supervisor told it about the pod, and reaps
what becomes its child when a supervisor dies (PR_SET_CHILD_SUBREAPER): the pod's first process among them.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from podtree.errors import Conflict, PodtreeError
from podtree.kernel.pidfd import pidfd_open
from podtree.kernel.prctl import Prctl, prctl, set_name
from podtree.pod import nursery, wire
from podtree.pod.cgroup import Cgroup
from podtree.pod.dirs import PodDirs
from podtree.pod.nursery import Nursery, Start
from podtree.pool import locks
from podtree.pool.pool import Pool
from podtree.pool.records import PodId

CONTROL = "ctl"
_LOCK_S = 60.0  # how long to wait for whoever works on the pod
_SETTLED_S = 1.0  # a pod that lives longer may be branched: its keeper gets ready to help
_QUICK_DEATHS = 5  # in a row, each within a second of its birth: then it is tried less and less often


def write_exit(path: Path, status: int) -> None:
    """Note how a process ended; `status` as from waitpid(2). Atomic; the first to write wins."""
    code = os.waitstatus_to_exitcode(status)
    data = {"code": code if code >= 0 else 128 - code, "signal": -code if code < 0 else 0, "time_ns": time.time_ns()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(msgspec.json.encode(data))
    with contextlib.suppress(FileExistsError):
        os.link(temporary, path)
    temporary.unlink()


def read_exit(path: Path) -> int | None:
    """The exit code that write_exit noted: 128 + n for signal n; None if there is none."""
    with contextlib.suppress(FileNotFoundError, msgspec.DecodeError, KeyError):
        return int(msgspec.json.decode(path.read_bytes())["code"])
    return None


class Keeper:
    """One pod's keeper. `starter`: the socket of whoever wants the pod.

    From its first step until the pod runs it, and then its supervisor, has the pod's lock: nobody else starts,
    rewinds or removes the pod meanwhile. Raises Conflict when another keeper has it already.
    """

    def __init__(self, start: Start, dirs: PodDirs, starter: socket.socket) -> None:
        self._start = start
        self._dirs = dirs
        self._starter: socket.socket | None = starter
        self._held: dict[str, int] = {}
        self._state: dict[str, Any] = {}
        self._done = False
        self._lock = _take_lock(dirs, _LOCK_S)
        _refuse_second(dirs.run)
        _clear(dirs.run)
        self._listener = nursery.listen(dirs.run, CONTROL)
        self._control = _inode(dirs.run)
        self._nursery = Nursery(dirs.run, lambda start, starter: keep(start, start.dirs(), starter))
        self._warm = start.needs_engine
        self._wake_r, wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._wake_w = wake_w

    def run(self) -> NoReturn:
        """Until the supervisor says that the pod's story is over."""
        prctl(Prctl.SET_CHILD_SUBREAPER, 1)
        if self._warm:  # the supervisor is going to need it at once: load it for both
            nursery.load_engine()
        quick = 0
        while True:
            begun = time.monotonic()
            self._watch(self._fork_supervisor())
            if self._done:
                os._exit(0)
            if "init_pid" not in self._state:
                self._give_up()
            quick = quick + 1 if time.monotonic() - begun < 1 else 0
            if quick > _QUICK_DEATHS:
                time.sleep(min(quick / 4, 5))

    def _fork_supervisor(self) -> tuple[int, socket.socket]:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                self._nursery.close()
                for fd in (self._wake_r, self._wake_w):
                    os.close(fd)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.set_wakeup_fd(-1)
                set_name("podtree-superv")
                self._supervise(theirs)
                os._exit(0)
            except BaseException as error:
                import traceback

                traceback.print_exc()
                if self._starter is not None:
                    _tell(self._starter, error)
                os._exit(1)
        theirs.close()
        if self._starter is not None:
            os.close(self._lock)
            self._starter.close()
            self._starter = None
        return pid, ours

    def _supervise(self, channel: socket.socket) -> None:
        """In the fork."""
        from podtree.pod.supervisor import Supervisor

        start = msgspec.structs.replace(self._start, branch=None) if self._state else self._start
        supervisor = Supervisor(start, self._dirs, self._listener, channel, self._held)
        if self._state:
            supervisor.adopt(self._state)
        else:
            assert self._starter is not None
            starter, self._starter = self._starter, None
            supervisor.begin(starter, self._lock)
        supervisor.run()

    def _watch(self, supervisor: tuple[int, socket.socket]) -> None:
        """Serve one supervisor until it is dead, and everything it said is heard."""
        pid, channel = supervisor
        pidfd = pidfd_open(pid)
        signal.set_wakeup_fd(self._wake_w)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        watched = [channel.fileno(), self._wake_r, pidfd]
        ended = False
        while not ended:
            ready = self._wait([*watched, *self._nursery.fds()])
            if not ready or self._nursery.is_asked(ready):
                self._warm_up()
            ended = pidfd in ready
            if ended:  # of all that it started, before those are reaped
                while self._hear(channel):
                    pass
            elif channel.fileno() in ready and not self._hear(channel):
                watched.remove(channel.fileno())
            if self._wake_r in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_r, 4096)
            self._nursery.tend(ready)
            self._reap(pid)
        os.waitpid(pid, 0)
        self._reap(pid)
        os.close(pidfd)
        channel.close()

    def _wait(self, fds: list[int]) -> set[int]:
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLIN)
        return {fd for fd, _ in poll.poll(self._nursery.timeout_ms() if self._warm else _SETTLED_S * 1000)}

    def _warm_up(self) -> None:
        """Load the engine, once: for supervisors to come, of this pod or another."""
        if not self._warm:
            self._warm = True
            with contextlib.suppress(Exception):  # whoever needs it will say what is wrong
                nursery.load_engine()

    def _hear(self, channel: socket.socket) -> bool:
        """One message of the supervisor; False when there won't be another."""
        try:
            message, fds = wire.receive(channel)
        except OSError:
            return False
        if message is None:
            return False
        for name, fd in zip(message.get("hold", ()), fds, strict=True):
            self._drop(name)
            self._held[name] = fd
        for name in message.get("drop", ()):
            self._drop(name)
        if "state" in message:
            self._state = message["state"]
        self._done = self._done or bool(message.get("done"))
        return True

    def _drop(self, name: str) -> None:
        fd = self._held.pop(name, None)
        if fd is not None:
            os.close(fd)

    def _reap(self, supervisor: int) -> None:
        """Children other than the supervisor, which is waited for when nothing is left to hear of it."""
        while True:
            with contextlib.suppress(ChildProcessError):
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if found is not None and found.si_pid != supervisor:
                    self._note(found.si_pid, os.waitpid(found.si_pid, 0)[1])
                    continue
            return

    def _note(self, pid: int, status: int) -> None:
        if pid == self._state.get("init_pid"):
            write_exit(self._dirs.pod / "exit.json", status)
        elif pid in self._state.get("sessions", {}).values():
            write_exit(self._dirs.run / f"exit-{pid}.json", status)

    def _give_up(self) -> NoReturn:
        """The first supervisor died before it had a pod: leave nothing of what it had begun."""
        with contextlib.suppress(PodtreeError, FileNotFoundError):
            lock = _take_lock(self._dirs, _LOCK_S)
            if _inode(self._dirs.run) == self._control:  # or another keeper has the pod by now
                self._clean_up()
            os.close(lock)
            if self._start.branch is not None:
                pool, pod = Pool.open(self._dirs.home), PodId(self._start.pod_id)
                if pool.has_pod(pod):
                    pool.remove_pod(pod)
        os._exit(1)

    def _clean_up(self) -> None:
        groups = self._state.get("cgroup")
        if groups is not None:
            cgroup = Cgroup(tuple(groups))
            if cgroup.dirs:
                for pid in cgroup.pids(0):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            self._reap(0)
            cgroup.remove()
        remove_run_dir(self._dirs)


def remove_run_dir(dirs: PodDirs) -> None:
    """The pod has ended: its control socket and what lies beside it go."""
    import shutil

    shutil.rmtree(dirs.run, ignore_errors=True)


def _take_lock(dirs: PodDirs, timeout_s: float) -> int:
    return locks.acquire(str(dirs.home / "locks" / dirs.pod.name), timeout=timeout_s, what=f"pod {dirs.pod.name}")


def _refuse_second(run: Path) -> None:
    """Raise Conflict when somebody keeps the pod already: two would wreck each other."""
    with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):
        nursery.connect(run, CONTROL).close()
        raise Conflict(f"pod {run.name} is running already")


def _inode(run: Path) -> int:
    """Tells this keeper's control socket from another's of the same name."""
    return os.stat(run / CONTROL).st_ino


def _clear(run: Path) -> None:
    """An empty directory for the pod's sockets: what is in it is of a keeper that went down with its machine."""
    run.mkdir(mode=0o700, parents=True, exist_ok=True)
    for entry in run.iterdir():
        with contextlib.suppress(OSError):
            entry.unlink()


def keep(start: Start, dirs: PodDirs, starter: socket.socket) -> NoReturn:
    """Be the keeper of a pod: in a process of its own, a session of its own, with nothing else open."""
    try:
        set_name("podtree-keeper")
        os.chdir("/")
        os.umask(0o077)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGTTOU):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        keeper = Keeper(start, dirs, starter)
        _redirect(dirs.run / "supervisor.log")
        keeper.run()
    except BaseException as error:
        _tell(starter, error)
        os._exit(1)


def _tell(starter: socket.socket, error: BaseException) -> None:
    """What kept the pod from starting."""
    with contextlib.suppress(OSError):
        data = msgspec.msgpack.encode(wire.encode_error(error))
        starter.sendall(len(data).to_bytes(4, "little") + data)


def _redirect(path: Path) -> None:
    """What a bug in here prints is kept, as long as the pod runs."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(null)
    os.close(log)
