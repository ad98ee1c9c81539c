"""What the supervisor holds of a running pod, and what launching one gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from podtree.pod.cgroup import Cgroup
from podtree.pod.dirs import PodDirs
from podtree.pod.spec import PodSpec, StdioMode

if TYPE_CHECKING:
    from podtree.restore.pager import Filling

#: The name of the stdio of the pod's first process; those of `exec` are "exec-1" and so on.
INIT = "init"


@dataclass(frozen=True, slots=True)
class ClockOffsets:
    """The pod's time namespace against the host's clocks, in nanoseconds: time_namespaces(7)."""

    monotonic_ns: int = 0
    boottime_ns: int = 0


@dataclass(slots=True)
class StdioEnds:
    """The supervisor's side of one process tree's stdin, stdout and stderr.

    "tty": `console` is the master of pty `index` of the pod's own /dev/pts.
    "pipes": `pipes` are the write end of stdin (None once closed: end of file was passed on), and the read
    ends of stdout and stderr. "log" and "null": nothing.
    """

    mode: StdioMode
    console: int | None = None
    index: int = 0
    pipes: tuple[int | None, int | None, int | None] = (None, None, None)

    def fds(self) -> list[int]:
        """All descriptors that are open."""
        return [fd for fd in (self.console, *self.pipes) if fd is not None]


@dataclass(slots=True)
class Launched:
    """A pod whose first process runs; its parent is the caller, who has to wait for it."""

    init_pid: int  # on the host
    init_pidfd: int
    root_fd: int  # the pod's overlay as a detached mount, without the mounts on top of it
    stdio: dict[str, StdioEnds]
    cgroup: Cgroup
    result: Any = None  # what `in_builder` returned
    given: list[int] = field(default_factory=list)  # what `in_builder` handed over with Builder.give


@dataclass(slots=True)
class ExecSession:
    """A process that `exec` put into the pod: inside it has parent 0. Its parent is the supervisor."""

    name: str  # of its stdio in LivePod.stdio
    pid: int  # on the host
    pidfd: int


@dataclass(slots=True)
class LivePod:
    """A running pod, as the supervisor knows it. Made by `run` and by a restore; see the fields."""

    pod_id: str
    spec: PodSpec
    dirs: PodDirs
    init_pid: int  # host pid of the pod's pid 1
    init_pidfd: int
    root_fd: int
    cgroup: Cgroup
    clock: ClockOffsets
    stdio: dict[str, StdioEnds]  # INIT and those of `sessions`
    sessions: dict[str, ExecSession] = field(default_factory=dict)  # by name; those still running
    filling: Filling | None = None  # memory of a restored pod that is still coming in

    @property
    def vol_dir(self) -> Path:
        """The volume (upper/, work/, log)."""
        return self.dirs.vol

    @property
    def img_dir(self) -> Path:
        """The live image directory."""
        return self.dirs.img

    @property
    def log_path(self) -> Path:
        """The pod's log."""
        return self.dirs.log

    @property
    def console(self) -> int | None:
        """The supervisor's master of the first process's console."""
        return self.stdio[INIT].console

    @property
    def extra_inits(self) -> list[int]:
        """Host pids of the processes that `exec` put into the pod and that still run."""
        return [session.pid for session in self.sessions.values()]

    def pids(self) -> list[int]:
        """Host pids of everything in the pod."""
        return self.cgroup.pids(self.init_pid)
