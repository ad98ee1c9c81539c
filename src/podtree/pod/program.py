"""From a process inside the pod to the pod's program: stdio, identity, privileges, the last hop.

Used by the first process of `run` and by those of `exec`.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import NoReturn

from podtree.errors import PodtreeError
from podtree.kernel import tty
from podtree.kernel.sys import NR, syscall
from podtree.pod import containment, hop, privileges, users
from podtree.pod.cgroup import Cgroup
from podtree.pod.dirs import PodDirs
from podtree.pod.launch import Builder, PodStdio, launch, raise_fd
from podtree.pod.live import INIT, ClockOffsets, Launched
from podtree.pod.spec import DEFAULT_PATH, PodSpec
from podtree.pod.users import Identity
from podtree.pod.wire import ExecFailed, exec_failed, report_failure


def launch_program(
    spec: PodSpec,
    dirs: PodDirs,
    cgroup: Cgroup,
    hop_fd: int,
    program: bytes,
    *,
    size: tuple[int, int] | None = None,
) -> Launched:
    """Start a new pod that runs `spec`'s program; `program` is the seccomp filter, `size` the terminal's.

    Errors as launch().
    """

    def in_builder(builder: Builder) -> None:
        containment.write_names(builder.root_fd, spec.hostname)
        containment.make_mark(builder.root_fd)
        console = builder.ends[INIT].console
        if console is not None and size:
            tty.set_size(console, *size)

    def as_init(builder: Builder) -> NoReturn:
        become(spec, builder.stdio[INIT], builder.report_fd, hop_fd, program, make_cwd=True)

    def limit() -> None:
        cgroup.limit_tasks(spec.pids)

    return launch(
        spec, dirs, cgroup, ClockOffsets(), in_builder, as_init, inherit=[hop_fd],
        built=limit,
    )  # fmt: skip


def become(
    spec: PodSpec, stdio: PodStdio, report_fd: int, hop_fd: int, filter_program: bytes, *, make_cwd: bool = False
) -> NoReturn:
    """Turn into the program of `spec`, or report why not and exit. `make_cwd`: its directory is made if missing.

    Needs the supervisor's privileges; / and all namespaces are the pod's already.
    """
    code = 126
    try:
        os.setsid()
        _arrange(stdio, report_fd, hop_fd)
        report_fd = hop.REPORT_FD
        if stdio.mode == "tty":
            tty.make_controlling(0)
        _execute(spec, stdio, filter_program, make_cwd)
    except BaseException as error:
        failure = _explain(error, spec.argv[0])
        code = failure.exit_code
        report_failure(report_fd, failure)
    os._exit(code)


def _execute(spec: PodSpec, stdio: PodStdio, filter_program: bytes, make_cwd: bool) -> NoReturn:
    with privileges.limited():
        identity = users.resolve(spec.user)
    env = {"HOME": identity.home, "HOSTNAME": spec.hostname, **spec.env}
    os.umask(0o022)
    _own_stdio(stdio, identity)
    with privileges.limited():
        if make_cwd:
            _make_directory(spec.cwd)
    privileges.drop(identity, filter_program)
    try:
        os.chdir(spec.cwd)
    except OSError as error:
        raise ExecFailed(f"working directory {spec.cwd}: {error.strerror}", "--workdir names another") from error
    path = find_program(spec.argv[0], env.get("PATH", DEFAULT_PATH))
    os.execve(hop.REPORT_FD + 1, [path, *spec.argv], env)


def _arrange(stdio: PodStdio, report_fd: int, hop_fd: int) -> None:
    """0, 1, 2: stdio; 3: the report pipe; 4: the hop; nothing else stays open."""
    wanted = [raise_fd(fd) for fd in (*stdio.fds, report_fd, hop_fd)]
    for number, fd in enumerate(wanted):
        os.dup2(fd, number, inheritable=number < hop.REPORT_FD + 1)
    syscall(NR.close_range, len(wanted), 0xFFFFFFFF, 0)


def _own_stdio(stdio: PodStdio, identity: Identity) -> None:
    """The program's user may open its own terminal by name, and its output pipes by /proc/self/fd."""
    if stdio.mode in ("tty", "pipes") and identity.uid:
        for fd in (0, 1, 2):
            with contextlib.suppress(OSError):
                os.fchown(fd, identity.uid, -1)


def _make_directory(path: str) -> None:
    """The working directory, if it doesn't exist, is made: as other container tools do."""
    if not os.path.isdir(path):
        with contextlib.suppress(OSError):
            os.makedirs(path, 0o755, exist_ok=True)


def find_program(name: str, search: str) -> str:
    """The path that execvp(3) would take; raises ExecFailed."""
    if "/" in name:
        return name
    denied = False
    for directory in search.split(":"):
        path = os.path.join(directory or ".", name)
        try:
            status = os.stat(path)
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode) and os.access(path, os.X_OK):
            return path
        denied = True
    if denied:
        raise ExecFailed(f"{name}: permission denied", f"found, but not to be executed, in PATH {search}")
    raise ExecFailed(f"{name}: no such program in the pod", f"PATH is {search}", code=127)


def _explain(error: BaseException, command: str) -> PodtreeError:
    """The failure to start `command`, for the user."""
    if isinstance(error, PodtreeError):
        return error
    if isinstance(error, OSError):
        return exec_failed(command, error.errno or 0)
    return ExecFailed(f"{command}: {error}")
