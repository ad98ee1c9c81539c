"""inotify(7): what is watched, for what, under which numbers.

A watch is of an inode, which is found again (`inodes`) and saved as any open file is, by name or as a ghost. Events
that wait to be read can't be looked at without taking them, nor put back: an instance that has some is refused until
its program has read them.

The checkpointer opens and reads files of the pod, of which its watchers would be told. They are hushed meanwhile: a
watch that would see it is given a mask without events and gets its own back before the pod runs on. What was
changed is noted in a journal, for a successor of a checkpointer that was killed, and the pod is held that long.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from podtree.errors import Damaged, RestoreFailed
from podtree.kernel import fdops, procfs
from podtree.kernel import inotify as kernel
from podtree.kernel.fdinfo import read_fdinfo
from podtree.kernel.inotify import Event, WatchLine
from podtree.kernel.pidfd import pidfd_getfd, pidfd_open_living
from podtree.objects.context import CollectContext
from podtree.objects.held import Held, PodView, open_in
from podtree.objects.inodes import InodeFinder
from podtree.objects.socketcommon import RETRY

LINK = b"anon_inode:inotify"
JOURNAL = "inotify.journal"
SILENT = int(Event.UNMOUNT)  # inotify_add_watch(2) wants some event; this one comes anyway
MAX_WD = 0x7FFFFFFF


class Watch(msgspec.Struct, frozen=True):
    """Number `wd` is of the inode of OpenFile `file`; `mask` as inotify_add_watch(2) takes it."""

    wd: int
    file: int
    mask: int


class Inotify(msgspec.Struct, frozen=True, tag="inotify"):
    """An inotify instance without unread events. The next watch gets the number `next`."""

    watches: tuple[Watch, ...]
    next: int = 1


# ----------------------------------------------------------------------------------------------- collect


class _Hushed(msgspec.Struct, frozen=True):
    """A watch without its events. `way`: where the inode is, below the root of `pid` or as one of its descriptors."""

    pid: int  # on the host
    fd: int
    wd: int
    mask: int
    ino: int
    way: bytes


@dataclass(slots=True)
class _Instance:
    held: Held
    lines: list[WatchLine]
    targets: dict[int, int] = field(default_factory=dict)  # wd -> O_PATH descriptor of what is watched


class Watchers:
    """All inotify instances of a frozen pod. `everything`: its open file descriptions, as they come to be known."""

    def __init__(self, ctx: CollectContext, view: PodView, everything: list[Held]) -> None:
        self.ctx = ctx
        self.view = view
        self.everything = everything
        self.finder = InodeFinder(ctx, view, everything)
        self._instances: dict[int, _Instance] = {}  # by id of the Held
        self._hushed: list[tuple[_Instance, WatchLine]] | None = None

    def _of(self, held: Held) -> _Instance:
        if held.id not in self._instances:
            lines = [kernel.parse_watch(value) for value in held.info.extra.get("inotify wd", ())]
            self._instances[held.id] = _Instance(held, lines)
        return self._instances[held.id]

    def _target(self, instance: _Instance, line: WatchLine) -> int | None:
        """An O_PATH descriptor of what is watched."""
        if line.wd not in instance.targets:
            fd = self.finder.open(line.device, line.ino, line.handle)
            if fd is None:
                return None
            instance.targets[line.wd] = fd
        return instance.targets[line.wd]

    def collect(self, held: Held, add: Callable[[int, str], int]) -> Inotify | None:
        """State of an instance; None when refused. `add(fd, display)` takes in a watched file and gives its id."""
        instance = self._of(held)
        if unread := fdops.queued_bytes(held.fd):
            reason = f"{unread} bytes of inotify events are unread, and can't be looked at without taking them"
            held.refuse(self.ctx, reason, RETRY)
        watches = []
        for line in instance.lines:
            fd = self._target(instance, line)
            if fd is None:
                reason = f"watch {line.wd} is of inode {line.ino} of device {_text(line.device)}, which can't be found"
                held.refuse(self.ctx, reason, "remove the watch")
                continue
            where = self.view.mounts.get(read_fdinfo("self", fd).mount_id)
            name = os.readlink(f"/proc/self/fd/{fd}")
            if where and where.fstype == "proc":
                held.refuse(self.ctx, f"watch {line.wd} is of a file of /proc: {name}", "remove the watch")
                continue
            watches.append(Watch(line.wd, add(fd, f"{held.display} watching {name}"), line.mask))
        watches.sort(key=lambda watch: watch.wd)
        return Inotify(tuple(watches), max((watch.wd for watch in watches), default=0) % MAX_WD + 1)

    # --- so that nobody sees us

    def hush(self) -> None:
        """Keep all watchers from what is about to be looked at: the pod's tmpfs, message queues, and unlinked files.

        To be called when all processes are known, before anything else is opened; once is enough.
        """
        if self._hushed is not None:
            return
        self._hushed = []
        instances = [self._of(held) for held in self.everything if held.link == LINK]
        devices = self._devices_looked_at() if instances else set()
        found = [(i, line) for i in instances for line in i.lines if line.device in devices]
        entries = [entry for i, line in found if (entry := self._entry(i, line))]
        if not entries:
            return
        (self.ctx.image_dir / JOURNAL).write_bytes(msgspec.msgpack.encode(entries))
        self.ctx.hold()
        noted = {(entry.fd, entry.pid, entry.wd) for entry in entries}
        self._hushed = [(i, line) for i, line in found if (*_place(i.held), line.wd) in noted]
        for instance, line in self._hushed:
            _set_mask(instance.held.fd, instance.targets[line.wd], SILENT)

    def _devices_looked_at(self) -> set[int]:
        mounts = self.view.mounts.values()
        found = {m.device for m in mounts if self.view.on_own_tmpfs(m) or m.fstype == "mqueue"}
        for held in self.everything:
            where = self.view.mount_of(held)
            if held.kind == stat.S_IFREG and where and self.view.current_name(held) is None:
                found.add(where.device)
        return found

    def _entry(self, instance: _Instance, line: WatchLine) -> _Hushed | None:
        target = self._target(instance, line)
        if target is None:
            return None
        fd, pid = _place(instance.held)
        way = os.readlink(f"/proc/self/fd/{target}".encode())
        if os.fstat(target).st_nlink == 0:
            holders = [h.holders[0] for h in self.everything if h.holders and h.inode == _inode(target)]
            if not holders:
                return None
            way = b"%d/%d" % (holders[0][0].living, holders[0][1])
        return _Hushed(pid, fd, line.wd, line.mask, line.ino, way)

    def release(self) -> None:
        """Give the watches their masks back. May be called again."""
        hushed, self._hushed = self._hushed or [], []
        for instance, line in hushed:
            _set_mask(instance.held.fd, instance.targets[line.wd], line.mask)
        if hushed:
            (self.ctx.image_dir / JOURNAL).unlink()
            self.ctx.let_go()
        for instance in self._instances.values():
            for fd in instance.targets.values():
                os.close(fd)
        self._instances.clear()


def _place(held: Held) -> tuple[int, int]:
    """(descriptor, host pid) of somebody who has it."""
    process, number = held.holders[0]
    return number, process.host_pid


def _inode(fd: int) -> tuple[int, int]:
    st = os.fstat(fd)
    return st.st_dev, st.st_ino


def _text(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _set_mask(inotify: int, target: int, mask: int) -> int:
    return kernel.add_watch(inotify, f"/proc/self/fd/{target}", mask | SILENT)


def recover(image_dir: Path) -> None:
    """Give the watches that a killed checkpointer had hushed their masks back, where they still are."""
    journal = image_dir / JOURNAL
    with contextlib.suppress(FileNotFoundError):
        try:
            entries = msgspec.msgpack.decode(journal.read_bytes(), type=list[_Hushed])
        except msgspec.DecodeError:  # killed while writing it: nothing was changed yet
            entries = []
        for entry in entries:
            with contextlib.suppress(OSError):  # the process has ended, the file has gone
                _unhush(entry)
        journal.unlink()


def _unhush(entry: _Hushed) -> None:
    with contextlib.ExitStack() as stack:
        pidfd = pidfd_open_living(entry.pid)
        stack.callback(os.close, pidfd)
        fd = pidfd_getfd(pidfd, entry.fd)
        stack.callback(os.close, fd)
        lines = [kernel.parse_watch(value) for value in read_fdinfo("self", fd).extra.get("inotify wd", ())]
        if not any((line.wd, line.ino) == (entry.wd, entry.ino) for line in lines):
            return
        if entry.way.startswith(b"/"):
            root = os.open(f"/proc/{procfs.living_thread(entry.pid)}/root", os.O_PATH | os.O_CLOEXEC)
            stack.callback(os.close, root)
            target = open_in(root, entry.way)
        else:
            target = os.open(b"/proc/%s" % entry.way.replace(b"/", b"/fd/"), os.O_PATH | os.O_CLOEXEC)
        stack.callback(os.close, target)
        if os.fstat(target).st_ino == entry.ino:
            _set_mask(fd, target, entry.mask)


# ----------------------------------------------------------------------------------------------- restore


def restore(state: Inotify) -> int:
    """A new instance; `watch_all` follows when all files are there, `arm` when the processes have theirs."""
    try:
        return kernel.inotify_init(os.O_CLOEXEC)
    except OSError as error:
        raise RestoreFailed(f"inotify: {error.strerror}", "raise fs.inotify.max_user_instances") from error


def watch_all(instances: Iterable[tuple[int, Inotify]], slots: Mapping[int, int]) -> None:
    """Make all watches, still without events. `instances`: (OpenFile id, state); `slots`: OpenFile id -> descriptor.

    For a process whose working directory is nobody else's.
    """
    with fdops.working_directory(fdops.proc_fd()):  # inotify_add_watch(2) takes no directory descriptor
        for number, state in instances:
            for watch in state.watches:
                if watch.file not in slots:
                    raise Damaged(f"the image has an inotify watch of a file {watch.file} that is not in it")
                _watch(slots[number], watch, f"self/fd/{slots[watch.file]}")
            _set_next(slots[number], state.next)


def _watch(inotify: int, watch: Watch, path: str) -> None:
    _set_next(inotify, watch.wd)
    try:
        got = kernel.add_watch(inotify, path, SILENT)
    except OSError as error:
        hint = "raise fs.inotify.max_user_watches"
        raise RestoreFailed(f"inotify watch {watch.wd} can't be made again: {error.strerror}", hint) from error
    if got != watch.wd:
        raise Damaged(f"inotify watch {watch.wd} of the image came back as {got}")


def _set_next(inotify: int, wd: int) -> None:
    if not 0 < wd <= MAX_WD:
        raise Damaged(f"the image has an impossible inotify watch number: {wd}")
    kernel.set_next(inotify, wd)


class Sleepers:
    """Watches that are to be told of nothing until their processes run: closing the descriptors that a restore used,
    say. `take(id)` gives a duplicate of an OpenFile."""

    def __init__(self, instances: Iterable[tuple[int, Inotify]], take: Callable[[int], int]) -> None:
        self._fds: dict[int, int] = {}
        self._instances = [(number, state) for number, state in instances if state.watches]
        for number, state in self._instances:
            for file in (number, *(watch.file for watch in state.watches)):
                if file not in self._fds:
                    self._fds[file] = take(file)

    def arm(self) -> None:
        """Give all watches their events."""
        for number, state in self._instances:
            for watch in state.watches:
                if _set_mask(self._fds[number], self._fds[watch.file], watch.mask) != watch.wd:
                    raise RestoreFailed(f"inotify watch {watch.wd} has vanished during the restore")

    def close(self) -> None:
        """Let go of the duplicates."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
