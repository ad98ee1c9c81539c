"""Starting a pod: the builder makes its world, then its first process.

The supervisor forks the *builder*, which joins the pod's cgroups, leaves the host's namespaces for new ones,
mounts the pod's root and makes it its own, makes the stdio, and clones the pod's first process as a child of
the supervisor. Then it runs `in_builder` (a restore makes all descriptors there: fully capable, / is the
pod's, everything but the pid namespace is the pod's). The first process, which shares the builder's
descriptors, waits for that; then it mounts /proc and goes on in `as_init`.

What went wrong in either comes back as the exception that it was, by `podtree.pod.wire`.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import select
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import msgspec

from podtree.errors import PodtreeError
from podtree.kernel import mount, tty
from podtree.kernel.mount import MountAttr
from podtree.kernel.namespaces import Clone, clone_python, loopback_up, set_time_offsets, unshare
from podtree.kernel.pidfd import pidfd_open
from podtree.kernel.prctl import Prctl, prctl
from podtree.objects.slots import raise_descriptor_limit
from podtree.pod import containment, wire
from podtree.pod.cgroup import Cgroup
from podtree.pod.dirs import PodDirs
from podtree.pod.live import INIT, ClockOffsets, Launched, StdioEnds
from podtree.pod.spec import PodSpec, StdioMode

_LOWEST_SLOT = 10  # descriptors that are kept stay clear of 0..9 while stdio is being arranged


class LaunchFailed(PodtreeError):
    """The pod's world could not be made; nothing of it is left."""

    exit_code = 125


@dataclass(slots=True)
class PodStdio:
    """The pod's side of StdioEnds: descriptors to become stdin, stdout, stderr."""

    mode: StdioMode
    fds: tuple[int, int, int]
    index: int = 0  # of the pty


@dataclass(slots=True)
class Builder:
    """What the builder, and in its turn the first process, has at hand."""

    spec: PodSpec
    dirs: PodDirs
    cgroup: Cgroup
    log_fd: int  # the pod's log, O_RDWR and O_APPEND: it lies outside of the pod's root
    host_proc_fd: int  # O_PATH on the host's /proc, for magic links: open("self/fd/5", dir_fd=...)
    report_fd: int  # for wire.report_failure: closed by a successful execve
    root_fd: int = -1  # the pod's overlay without what is mounted on top
    stdio: dict[str, PodStdio] = field(default_factory=dict)
    ends: dict[str, StdioEnds] = field(default_factory=dict)
    given: list[int] = field(default_factory=list)
    _spare_ptys: dict[int, int] = field(default_factory=dict)

    def make_stdio(self, name: str, mode: StdioMode, index: int = 0, *, merged: bool = False) -> PodStdio:
        """Make new stdio; the supervisor's side comes to it in Launched.stdio under the same name.

        For "tty", `index` is the wanted number in /dev/pts; for "pipes", `merged` as in PodSpec.
        """
        ends = StdioEnds(mode)
        if mode == "tty":
            ends.console, ends.index = self.open_pty(index), index
            slave = tty.open_slave(ends.console)
            pod = PodStdio(mode, (slave, slave, slave), index)
        elif mode == "pipes":
            pod, ends.pipes = make_pipes(merged)
        else:
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            out = self.open_log() if mode == "log" else null
            pod = PodStdio(mode, (null, out, out))
        self.stdio[name], self.ends[name] = pod, ends
        return pod

    def open_log(self) -> int:
        """A new write-only, appending open file description of the pod's log."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        return os.open(f"self/fd/{self.log_fd}", flags, dir_fd=self.host_proc_fd)

    def open_pty(self, index: int) -> int:
        """The master of pty number `index`, which nobody may have taken yet.

        The kernel hands out the lowest free number: those below are kept for later calls.
        """
        while index not in self._spare_ptys:
            master, number = tty.open_master("/dev/pts/ptmx")
            if number > index:
                os.close(master)
                raise LaunchFailed(f"/dev/pts/{index} is already taken")
            self._spare_ptys[number] = master
        return self._spare_ptys.pop(index)

    def close_spare_ptys(self) -> None:
        """Give up the numbers that nobody asked for."""
        for master in self._spare_ptys.values():
            os.close(master)
        self._spare_ptys.clear()

    def give(self, fd: int) -> int:
        """Hand a descriptor to the supervisor; returns its index in Launched.given."""
        self.given.append(fd)
        return len(self.given) - 1


InBuilder = Callable[[Builder], Any]
AsInit = Callable[[Builder], NoReturn]


def launch(
    spec: PodSpec,
    dirs: PodDirs,
    cgroup: Cgroup,
    clock: ClockOffsets | None,
    in_builder: InBuilder,
    as_init: AsInit,
    *,
    inherit: Sequence[int] = (),
    numbers: int = 0,
    built: Callable[[], None] | None = None,
) -> Launched:
    """Start a pod; returns once its first process has executed its program.

    `inherit`: descriptors that builder and first process get at their own numbers, close-on-exec or not as
    they are; all others of the caller are closed there. `numbers`: about how many they are going to have. Without a
    `clock` the pod has no time namespace yet: who starts it gives it one later. `in_builder` returns something
    msgpack can carry.
    `built` is called when the builder is gone and the first process has not gone on yet.
    The first process is a child of the caller, who owns everything in the result.
    Raises LaunchFailed, or whatever PodtreeError the builder or `as_init` met; then nothing is left running
    (the cgroup stays: the caller made it).
    """
    ours, theirs = socket.socketpair()
    report_r, report_w = os.pipe2(os.O_CLOEXEC)
    log = _open_log(dirs)
    go_r, go_w = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        builder = Builder(spec, dirs, cgroup, log, -1, report_w)
        _builder_main(builder, theirs, go_r, clock, in_builder, as_init, inherit, numbers)
    theirs.close()
    for fd in (report_w, go_r, log):
        os.close(fd)
    try:
        with contextlib.suppress(ProcessLookupError, BrokenPipeError):  # the builder has failed: it says why
            cgroup.add(pid)  # the kernel takes its time for this; the builder makes namespaces meanwhile
            wire.send(ours, "joined")

        def let_go() -> None:
            if built is not None:
                os.waitpid(pid, 0)
                built()
            os.write(go_w, b"g")

        return _receive(ours, report_r, pid, spec, cgroup, let_go)
    finally:
        ours.close()
        os.close(report_r)
        os.close(go_w)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _open_log(dirs: PodDirs) -> int:
    """The pod's log, through a mount of its own: by /proc/PID/fd a pod is told "/log", and not where the pool is."""
    vol = mount.clone_tree(str(dirs.vol))
    try:
        mount.set_attributes(vol, MountAttr.NOSUID | MountAttr.NODEV | MountAttr.NOEXEC)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open("log", flags, 0o600, dir_fd=vol)
    finally:
        os.close(vol)


def _receive(
    channel: socket.socket,
    report_r: int,
    builder_pid: int,
    spec: PodSpec,
    cgroup: Cgroup,
    let_go: Callable[[], None],
) -> Launched:
    """Take over what the builder made: one message with descriptors, then the outcome of the execve."""
    builder = pidfd_open(builder_pid)
    first, _ = _next_message(channel, builder)
    init_pid = int(first["init_pid"]) if first else 0
    message, fds = _next_message(channel, builder)
    os.close(builder)
    if message is None and init_pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(init_pid, signal.SIGKILL)  # it would wait for the builder for ever
    if message is not None:
        let_go()
    failure = wire.read_report(report_r, spec.argv[0])
    if message is None or failure is not None:
        for fd in fds:
            os.close(fd)
        if init_pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(init_pid, signal.SIGKILL)
            os.waitpid(init_pid, 0)
        hint = "its limit on memory may be too small for that" if spec.memory is not None else ""
        raise failure or LaunchFailed("the process that builds the pod ended without a word", hint)
    taken = iter(fds)
    root_fd = next(taken)
    stdio = {name: _take_ends(ends, taken) for name, ends in message["stdio"].items()}
    given = [next(taken) for _ in range(message["given"])]
    return Launched(init_pid, pidfd_open(init_pid), root_fd, stdio, cgroup, message["result"], given)


def _next_message(channel: socket.socket, builder: int) -> tuple[Any, list[int]]:
    """The builder's next message, (None, []) if it failed or is gone; the first process may hold the channel too."""
    readable, _, _ = select.select([channel.fileno(), builder], [], [])
    with contextlib.suppress(ConnectionResetError):  # it failed before it read that it is in its groups
        return wire.receive(channel) if channel.fileno() in readable else (None, [])
    return None, []


def _take_ends(data: dict[str, Any], taken: Any) -> StdioEnds:
    ends = msgspec.convert(data, StdioEnds)
    if ends.console is not None:
        ends.console = next(taken)
    in_w, out_r, err_r = (None if fd is None else next(taken) for fd in ends.pipes)
    ends.pipes = (in_w, out_r, err_r)
    return ends


def _builder_main(
    builder: Builder,
    channel: socket.socket,
    go_r: int,
    clock: ClockOffsets | None,
    in_builder: InBuilder,
    as_init: AsInit,
    inherit: Sequence[int],
    numbers: int,
) -> NoReturn:
    """The builder, from fork to its end; every error goes to the supervisor."""
    try:
        prctl(Prctl.SET_PDEATHSIG, signal.SIGKILL)  # not inherited by the first process: prctl(2)
        wire.isolate_child([channel.fileno(), go_r, builder.log_fd, builder.report_fd, *inherit])
        _make_world(builder, clock)
        _enter_cgroup_namespace(channel)
        builder.make_stdio(INIT, builder.spec.stdio, merged=builder.spec.merged)
        _show_console(builder)
        _make_room_for(numbers)
        gc.disable()  # the descriptor table is shared from here on: a collection must not close anything
        pid = clone_python(Clone.PARENT | Clone.FILES)
        if pid == 0:
            _init_main(builder, as_init, go_r)
        wire.send(channel, {"init_pid": pid}, [])
        result = in_builder(builder)
        builder.close_spare_ptys()
        stdio = {name: msgspec.to_builtins(ends) for name, ends in builder.ends.items()}
        message = {"stdio": stdio, "result": result, "given": len(builder.given)}
        ends = [fd for e in builder.ends.values() for fd in e.fds()]
        wire.send(channel, message, [builder.root_fd, *ends, *builder.given])
    except BaseException as error:
        wire.report_failure(builder.report_fd, error)
        with contextlib.suppress(OSError):
            wire.send(channel, None, [])
        os._exit(1)
    os._exit(0)


def _make_room_for(numbers: int) -> None:
    """Have the table of descriptors as large as it will be. Where it is shared, and it is from here on, each growth
    waits until no processor can be looking at the old one: some 10 ms (fs/file.c, expand_fdtable).
    """
    if raise_descriptor_limit(numbers) >= numbers > 1:
        null = os.open("/", os.O_PATH | os.O_CLOEXEC)
        os.dup2(null, numbers - 1, inheritable=False)
        os.close(numbers - 1)
        os.close(null)


def make_pipes(merged: bool) -> tuple[PodStdio, tuple[int, int, int | None]]:
    """Three pipes, or with `merged` one for stdin and one for both outputs: the pod's side, the supervisor's."""
    (in_r, in_w), (out_r, out_w) = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    if merged:
        return PodStdio("pipes", (in_r, out_w, out_w)), (in_w, out_r, None)
    err_r, err_w = os.pipe2(os.O_CLOEXEC)
    return PodStdio("pipes", (in_r, out_w, err_w)), (in_w, out_r, err_r)


def _make_world(builder: Builder, clock: ClockOffsets | None) -> None:
    """Namespaces and mounts; the root becomes the pod's."""
    spec, dirs = builder.spec, builder.dirs
    os.umask(0)
    wire.leave_keyring()
    builder.host_proc_fd = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    containment.prepare_volume(spec, dirs)
    unshare(Clone.NEWNS | Clone.NEWNET | Clone.NEWIPC | Clone.NEWUTS | Clone.NEWPID)
    if clock is not None:
        unshare(Clone.NEWTIME)
        try:
            set_time_offsets(clock.monotonic_ns, clock.boottime_ns)
        except OSError as error:
            raise LaunchFailed(f"the pod's clocks can't be set: {error.strerror}") from error
    mount.make_private()
    loopback_up()
    _allow_low_ports()
    plan = containment.outer_plan(spec, dirs)
    root, builder.root_fd = containment.make_root(spec, dirs)
    containment.execute(plan, root)
    mount.pivot_into(root)
    os.close(root)
    socket.sethostname(spec.hostname)
    os.umask(0o022)


def _enter_cgroup_namespace(channel: socket.socket) -> None:
    """Its root is the group that this process is in: the pod's, once the supervisor has said so."""
    message, _ = wire.receive(channel)
    if message is None:
        raise LaunchFailed("the supervisor is gone")
    unshare(Clone.NEWCGROUP)


def _allow_low_ports() -> None:
    """Any user of the pod may listen below port 1024: they are the pod's own ports."""
    with contextlib.suppress(OSError), open("/proc/sys/net/ipv4/ip_unprivileged_port_start", "w") as file:
        file.write("0")


def _show_console(builder: Builder) -> None:
    """/dev/console is the first process's terminal, if it has one."""
    pod = builder.stdio[INIT]
    if pod.mode == "tty":
        tree = mount.clone_tree(f"/dev/pts/{pod.index}")
        os.close(os.open("/dev/console", os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        place = os.open("/dev/console", os.O_PATH | os.O_CLOEXEC)
        mount.attach(tree, place)
        os.close(tree)
        os.close(place)


def _init_main(builder: Builder, as_init: AsInit, go_r: int) -> NoReturn:
    """The pod's pid 1, before it is anything else.

    It exists early, so that the builder can make processes in the pid namespace, and shares the builder's
    descriptors, so that it has all that the builder makes; its execve ends the sharing.
    """
    try:
        if not os.read(go_r, 1):  # the supervisor is gone
            os._exit(126)
        # The supervisor's ends would keep the stdio from ever reaching end of file.
        for fd in [fd for ends in builder.ends.values() for fd in ends.fds()]:
            os.close(fd)
        root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        containment.execute(containment.inner_plan(), root)
        os.close(root)
        as_init(builder)
    except BaseException as error:
        wire.report_failure(builder.report_fd, error)
        os._exit(126)


def raise_fd(fd: int) -> int:
    """A close-on-exec duplicate out of the way of 0..9."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _LOWEST_SLOT)
