"""Which module is for which kind of open file: the two places at which a new kind is entered.

Collect: by type, device and the name that the kernel shows. Restore: by the type of the state, in an order in which
each finds what it needs.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from podtree.errors import Damaged
from podtree.objects import (
    devices,
    epoll,
    eventfd,
    files,
    inotify,
    memfd,
    mqueue,
    nsfiles,
    pidfd,
    pipes,
    procfiles,
    signalfd,
    sockets,
    timerfd,
    tty,
)
from podtree.objects.contents import Contents
from podtree.objects.context import CollectContext, FrozenProcess, RestoreContext
from podtree.objects.held import Held, PodView

FileState: TypeAlias = (
    files.FileStates
    | pipes.Pipe
    | pipes.StdioPipe
    | eventfd.EventFd
    | timerfd.TimerFd
    | signalfd.SignalFd
    | epoll.Epoll
    | inotify.Inotify
    | pidfd.PidFd
    | procfiles.ProcFile
    | nsfiles.NamespaceFile
    | mqueue.QueueFile
    | memfd.MemoryFile
    | devices.Device
    | tty.TtyStates
    | sockets.SocketState
)

#: What can only be made when the tasks are there; until then something else is in its slot.
LATE = (pidfd.PidFd, procfiles.ProcFile, nsfiles.NamespaceFile)
#: What has an offset.
POSITIONED = (
    *(files.RegularFile, files.Ghost, files.Directory, files.LogFile),
    *(memfd.MemoryFile, procfiles.ProcFile, mqueue.QueueFile),
)


class Table(Protocol):
    """What the collectors need of descriptors.FileTable. `all` may grow while it is collected."""

    view: PodView
    contents: Contents
    ghosts: files.GhostKeeper
    watchers: inotify.Watchers
    queues: mqueue.Queues
    all: list[Held]

    def add_local(self, fd: int, display: str, access: int | None = None) -> int: ...
    def add_passed(self, fd: int, process: FrozenProcess, display: str) -> int: ...


# ----------------------------------------------------------------------------------------------- collect

_UNSAVED = {
    "io_uring": "the rings are shared with the kernel",
    "fanotify": "the marks can't be found again by name",
    "userfaultfd": "faults may be waiting for it",
    "perf_event": "counters belong to the machine",
    "seccomp notify": "another process may be waiting for an answer",
}


def collect(table: Table, ctx: CollectContext) -> dict[int, FileState]:
    """States by Held.id; one that can't be saved is named in ctx.problems and left out."""
    return _States(table, ctx).collect()


class _States:
    """Sorts the descriptions of a table by kind and has each kind collected."""

    def __init__(self, table: Table, ctx: CollectContext) -> None:
        self.table = table
        self.ctx = ctx
        self.states: dict[int, FileState] = {}
        self.pipes: list[Held] = []
        self.ttys: list[Held] = []
        self.epolls: list[Held] = []
        self.queues: list[Held] = []
        self.passed: set[int] = set()  # ids of what is on its way in sockets' queues
        self.sockets = sockets.SocketCollector(ctx, self._add_passed)

    def collect(self) -> dict[int, FileState]:
        for held in self.table.all:  # which grows: by what is on its way
            with self._naming(held):
                self._sort(held)
        self._group(self.pipes, lambda: pipes.collect_pipes(self.pipes, self.ctx, self.table.view))
        self._group(self.ttys, lambda: tty.collect_ttys(self.ttys, self.ctx, self.table.view))
        self._group(self.queues, lambda: self.table.queues.files(self.queues))
        self._group(self.epolls, lambda: epoll.collect_epolls(self.epolls, self.table.all, self.ctx))
        self.states.update(self.sockets.finish())
        for held in self.table.all:
            if held.id in self.passed and isinstance(self.states.get(held.id), LATE):
                held.refuse(self.ctx, "is on its way in a socket's queue, where it can't be put before its task exists")
        return self.states

    def _add_passed(self, fd: int, process: FrozenProcess, display: str) -> int:
        number = self.table.add_passed(fd, process, display)
        self.passed.add(number)
        return number

    @contextlib.contextmanager
    def _naming(self, held: Held) -> Iterator[None]:
        """Whatever goes wrong with one object refuses that object."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            held.refuse(self.ctx, f"its state can't be read: {error}")

    def _group(self, group: list[Held], collect: Callable[[], Mapping[int, FileState]]) -> None:
        if group:
            with self._naming(group[0]):
                self.states.update(collect())

    def _sort(self, held: Held) -> None:
        if procfiles.is_one(held, self.table.view):
            self._put(held, procfiles.collect(held, self.ctx, self.table.view))
        elif held.flags & os.O_PATH or held.kind in (stat.S_IFDIR, stat.S_IFLNK):
            self._file(held)
        elif held.kind == stat.S_IFSOCK:
            process = held.process or self.ctx.processes[0]
            self.sockets.add(held.id, process, held.display, held.fd)
        elif held.kind == stat.S_IFIFO:
            self.pipes.append(held)
        elif tty.is_tty(held):
            self.ttys.append(held)
        elif held.kind in (stat.S_IFCHR, stat.S_IFBLK):
            self._put(held, devices.collect(held, self.ctx, self.table.view))
        elif held.link.startswith(b"anon_inode:") or held.kind == 0:
            self._anonymous(held)
        elif mqueue.is_one(held, self.table.view):
            self.queues.append(held)
        elif nsfiles.is_one(held):
            self._put(held, nsfiles.collect(held, self.ctx))
        else:
            self._regular(held)

    def _put(self, held: Held, state: FileState | None) -> None:
        if state is not None:
            self.states[held.id] = state

    def _file(self, held: Held) -> None:
        self._put(held, files.collect_file(held, self.ctx, self.table.view, self.table.ghosts))

    def _regular(self, held: Held) -> None:
        kind = memfd.classify(held, self.table.view)
        if held.link.startswith(b"/anon_hugepage"):
            held.refuse(self.ctx, memfd.HUGE, memfd.HUGE_HINT)
        elif kind:
            self._put(held, memfd.collect(held, kind, self.ctx, self.table.contents))
        else:
            self._file(held)

    def _anonymous(self, held: Held) -> None:
        name = held.link.decode(errors="replace").removeprefix("anon_inode:").strip("[]")
        match name:
            case "eventfd":
                self._put(held, eventfd.collect(held))
            case "timerfd":
                self._put(held, timerfd.collect(held, self.ctx.clock_offset_ns))
            case "signalfd":
                self._put(held, signalfd.collect(held))
            case "eventpoll":
                self.epolls.append(held)
            case pidfd.NAME:
                self._put(held, pidfd.collect(held, self.ctx))
            case "inotify":
                self._put(held, self.table.watchers.collect(held, self.table.add_local))
            case _:
                self._refuse_anonymous(held, name)

    def _refuse_anonymous(self, held: Held, name: str) -> None:
        reason = _UNSAVED.get(name, "this kind of object is not known")
        held.refuse(self.ctx, f"{name} can't be saved: {reason}", "close it, or run the program without it")


# ----------------------------------------------------------------------------------------------- restore


class Entry(Protocol):
    """What the restorers need of descriptors.OpenFile."""

    @property
    def id(self) -> int: ...
    @property
    def flags(self) -> int: ...
    @property
    def what(self) -> FileState: ...


def make_all(
    entries: Sequence[Entry], ctx: RestoreContext, leads: list[tuple[int, tty.Settings]], slot_base: int
) -> Iterable[tuple[int, int]]:
    """(id, descriptor) of everything, kind after kind; sockets last: all others are in their slots by then."""

    def of(*kinds: type) -> list[Any]:
        return [(e.id, e.flags, e.what) for e in entries if isinstance(e.what, kinds)]

    yield from files.restore_ghosts(of(files.Ghost), ctx).items()
    yield from files.restore_directories(of(files.Directory)).items()
    yield from memfd.restore_memory_files(of(memfd.MemoryFile), ctx).items()
    for number, flags, state in of(files.RegularFile, files.LogFile, files.PathNode):
        yield number, files.restore_file(state, flags, ctx)
    for number, flags, state in of(devices.Device):
        yield number, devices.restore(state, flags)
    yield from mqueue.restore_queues(ctx.queues, of(mqueue.QueueFile)).items()
    yield from pipes.restore_pipes(of(pipes.Pipe, pipes.StdioPipe), ctx).items()
    for module, kind in (
        (eventfd, eventfd.EventFd), (signalfd, signalfd.SignalFd), (timerfd, timerfd.TimerFd)
    ):  # fmt: skip
        for number, _, state in of(kind):
            yield number, module.restore(state)
    for number, _, state in of(epoll.Epoll):
        yield number, epoll.restore(state)
    for number, _, state in of(inotify.Inotify):
        yield number, inotify.restore(state)
    for number, _, _ in of(pidfd.PidFd):
        yield number, pidfd.restore()
    for number, flags, _ in of(procfiles.ProcFile, nsfiles.NamespaceFile):
        yield number, procfiles.restore(flags)
    found, needs = tty.restore_ttys(of(tty.PtyMaster, tty.PtySlave, tty.HungUpTty), ctx)
    leads += needs
    yield from found.items()
    found_sockets = {e.id: e.what for e in entries if isinstance(e.what, sockets.SocketState)}
    others = {e.id for e in entries if not isinstance(e.what, LATE)} - found_sockets.keys()

    def in_slot(number: int) -> int:
        if number not in others:
            raise Damaged(f"a file {number} is on its way in a socket's queue, and not in the image")
        return slot_base + number

    yield from sockets.restore_sockets(found_sockets, ctx, in_slot).items()
