"""What the object modules get from the engine: who is frozen, where problems go, where bytes go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from podtree.errors import Problem
from podtree.kernel.ptrace import Regs
from podtree.objects import external
from podtree.objects.tables import Sharing
from podtree.objects.tracing import Tracing

if TYPE_CHECKING:
    from podtree.objects.mqueue import PosixQueue


@dataclass(slots=True)
class FrozenTask:
    """A stopped thread. `tid` is the host's number, `inner_tid` the pod's."""

    tid: int
    inner_tid: int
    regs: Regs
    sigmask: int
    status: dict[str, str]  # /proc/PID/task/TID/status
    group_stop: int = 0  # the stop signal if the process is stopped by job control
    restart_nr: int = -1  # the system call that restart_syscall(2) would go on with
    waited_ns: int = 0  # how long the timed call that it is in has been waiting
    tracing: Tracing | None = None  # by another task of the pod


@dataclass(slots=True)
class FrozenProcess:
    """One process (thread group) of the pod while it is stopped.

    `host_pid` is the number in the supervisor's pid namespace, `pid` the one inside the pod. What the process has is
    reached through `living`: a leader that has ended shows nothing of it.
    """

    host_pid: int
    pid: int
    comm: str
    pidfd: int  # of a living thread; -1 for a zombie
    tasks: list[FrozenTask] = field(default_factory=list)  # those that live, leader first; none for a zombie
    zombie: bool = False

    @property
    def first(self) -> FrozenTask:
        """The thread that speaks for the process: the leader, unless it has ended."""
        return self.tasks[0]

    @property
    def living(self) -> int:
        """Host tid of `first`; the process's own number where its tasks aren't told."""
        return self.tasks[0].tid if self.tasks else self.host_pid

    @property
    def leaderless(self) -> bool:
        """The leader has ended while other threads live on."""
        return self.living != self.host_pid


@dataclass(slots=True)
class CollectContext:
    """State shared by all collectors during one checkpoint; the pod is frozen all along."""

    root_fd: int  # the pod's root overlay, without the mounts on top (hidden directory reachable)
    log_path: Path  # the pod's log file on the volume, outside of the pod's root
    image_dir: Path  # the live image directory, as the last checkpoint left it
    processes: list[FrozenProcess]
    consoles: dict[int, int] = field(default_factory=dict)  # pty number -> the supervisor's master
    stdio_fds: tuple[int, ...] = ()  # the supervisor's ends of stdio pipes, three per process tree; -1: none
    clock_offset_ns: int = 0  # the pod's CLOCK_MONOTONIC less ours
    dry_run: bool = False  # `check`: look, but write nothing (no ghosts)
    external: external.Policy = "refuse"  # what becomes of what is shared with the outside
    shown: tuple[bytes, ...] = ()  # where -v shows something of the host, in the pod
    problems: list[Problem] = field(default_factory=list)
    networks: dict[int, int] = field(default_factory=dict)  # id of a net namespace made inside -> host pid of one in it
    on_hold: Callable[[], None] = lambda: None  # the pod stays stopped from here on even if the supervisor dies
    on_let_go: Callable[[], None] = lambda: None  # the reverse
    holds: int = 0
    sharing: Sharing = field(default_factory=Sharing)

    def hold(self) -> None:
        """Something of the pod's is not as it was: keep it stopped, even if the supervisor dies, until `let_go`."""
        self.holds += 1
        if self.holds == 1:
            self.on_hold()

    def let_go(self) -> None:
        """It is again. Once for each `hold`."""
        self.holds -= 1
        if not self.holds:
            self.on_let_go()

    def refuse(self, process: FrozenProcess | None, obj: str, reason: str, hint: str = "") -> None:
        """Note that `obj` can't be saved; the checkpoint will be refused, naming it."""
        self.problems.append(
            Problem(
                pid=process.pid if process else 0,
                comm=process.comm if process else "",
                object=obj,
                reason=reason,
                hint=hint,
            )
        )


@dataclass(slots=True)
class RestoreContext:
    """What restorers work with, inside the builder: root of the pod is `/`, all namespaces but pid are the pod's."""

    root_fd: int  # unmasked overlay root
    log_path_fd: int  # the pod's log file, opened O_RDWR outside of the pod's root
    image_dir_fd: int  # the image directory
    host_proc_fd: int  # O_PATH on a /proc that works: inside the builder /proc isn't mounted
    queues: tuple[PosixQueue, ...] = ()  # POSIX message queues that have a name
    stdio_fds: tuple[int, ...] = ()  # pod-side ends of new stdio pipes, numbered as at collection; -1: none
    networks: dict[int, int] = field(default_factory=dict)  # id of a net namespace made inside -> host pid of one in it
