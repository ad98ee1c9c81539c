"""`exec`: a new process in a running pod, with the namespaces, groups and privileges of the pod's own.

A helper joins the namespaces by the first process's pidfd, makes the stdio inside, and clones the new
process as a child of the supervisor. Processes of the pod can see the new process before it has executed
its program; until then it is not dumpable, so that they can't reach into it (runc's CVE-2016-9962).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
from dataclasses import dataclass
from typing import NoReturn

import msgspec

from podtree.kernel import tty
from podtree.kernel.mount import Resolve, openat2
from podtree.kernel.namespaces import Clone, clone_python, setns
from podtree.kernel.pidfd import pidfd_open, pidfd_open_living
from podtree.kernel.prctl import Prctl, prctl
from podtree.pod import wire
from podtree.pod.launch import LaunchFailed, PodStdio, make_pipes
from podtree.pod.live import ExecSession, LivePod, StdioEnds
from podtree.pod.program import become
from podtree.pod.spec import PodSpec

_POD = (
    Clone.NEWNS | Clone.NEWNET | Clone.NEWIPC | Clone.NEWUTS | Clone.NEWCGROUP | Clone.NEWTIME | Clone.NEWPID
)
_PTMX = os.makedev(5, 2)


@dataclass(slots=True)
class Entered:
    """A process that is about to execute its program."""

    session: ExecSession
    ends: StdioEnds
    command: str
    report_r: int  # wire.parse_report: readable once it is known whether the program could be executed


def enter(
    live: LivePod, name: str, spec: PodSpec, hop_fd: int, program: bytes, size: tuple[int, int] | None
) -> Entered:
    """Start `spec`'s program (argv, env, cwd, user, stdio) in the pod. Raises LaunchFailed."""
    ours, theirs = socket.socketpair()
    report_r, report_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(report_w, True)
    procs = live.cgroup.open_procs()
    inside = pidfd_open_living(live.init_pid)
    pid = os.fork()
    if pid == 0:
        keep = [theirs.fileno(), report_w, inside, hop_fd, *procs]
        _helper_main(inside, procs, spec, theirs, keep, report_w, hop_fd, program, size)
    theirs.close()
    for fd in (inside, report_w, *procs):
        os.close(fd)
    message, fds = wire.receive(ours)
    ours.close()
    os.waitpid(pid, 0)
    if message is None:
        failure = wire.parse_report(_read_all(report_r), spec.argv[0])
        os.close(report_r)
        raise failure or LaunchFailed("the pod ended while it was being entered")
    ends = msgspec.convert(message["ends"], StdioEnds)
    if ends.mode == "tty":
        ends.console = fds[0]
    elif ends.mode == "pipes":
        ends.pipes = (fds[0], fds[1], None if spec.merged else fds[2])
    child = int(message["pid"])
    return Entered(ExecSession(name, child, pidfd_open(child)), ends, spec.argv[0], report_r)


def _read_all(fd: int) -> bytes:
    with contextlib.suppress(BlockingIOError):
        return os.read(fd, 1 << 20)
    return b""


def _helper_main(
    inside: int,
    procs: list[int],
    spec: PodSpec,
    channel: socket.socket,
    keep: list[int],
    report_w: int,
    hop_fd: int,
    program: bytes,
    size: tuple[int, int] | None,
) -> NoReturn:
    try:
        prctl(Prctl.SET_PDEATHSIG, signal.SIGKILL)
        wire.isolate_child(keep)
        wire.leave_keyring()
        setns(inside, _POD)
        os.close(inside)
        stdio, ends = _make_stdio(spec, size)
        joined_r, joined_w = os.pipe2(os.O_CLOEXEC)
        pid = clone_python(Clone.PARENT)
        if pid == 0:
            channel.close()
            for fd in ends.fds():
                os.close(fd)
            _join(procs)
            os.close(joined_w)
            become(spec, stdio, report_w, hop_fd, program)
        os.close(joined_w)
        os.read(joined_r, 1)  # until then a checkpoint wouldn't see it
        wire.send(channel, {"pid": pid, "ends": msgspec.to_builtins(ends)}, ends.fds())
    except BaseException as error:
        wire.report_failure(report_w, error)
        os._exit(1)
    os._exit(0)


def _join(procs: list[int]) -> None:
    """Enter the pod's groups. That is never refused: a pod that has all tasks it may have can be looked into, too."""
    for fd in procs:
        os.write(fd, b"0")
        os.close(fd)


def _make_stdio(spec: PodSpec, size: tuple[int, int] | None) -> tuple[PodStdio, StdioEnds]:
    ends = StdioEnds(spec.stdio)
    if spec.stdio == "tty":
        master = _open_pod_ptmx()
        ends.console, ends.index = master, tty.pty_number(master)
        if size:
            tty.set_size(master, *size)
        slave = tty.open_slave(master)
        return PodStdio("tty", (slave, slave, slave), ends.index), ends
    if spec.stdio == "pipes":
        stdio, ends.pipes = make_pipes(spec.merged)
        return stdio, ends
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    return PodStdio("null", (null, null, null)), ends


def _open_pod_ptmx() -> int:
    """A master of the pod's devpts; the pod decides what its paths are, so look what it is before opening."""
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    found = openat2(root, "dev/pts/ptmx", os.O_PATH, Resolve.IN_ROOT | Resolve.NO_SYMLINKS)
    status = os.fstat(found)
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != _PTMX:
        raise LaunchFailed("the pod's /dev/pts/ptmx isn't what it was made as", "exec without -t works")
    os.close(found)
    os.close(root)
    return tty.open_master("/dev/pts/ptmx")[0]
