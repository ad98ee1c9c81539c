"""Open file descriptions and the descriptors that refer to them: the hub of files, pipes, sockets and the rest.

Collect: every descriptor of every frozen process is duplicated into the supervisor (pidfd_getfd(2)); kcmp(2) tells
which are the same open file description. Restore: the builder makes each description once and leaves it at number
`slot_base + id`; the tasks, its descendants, take their own numbers from there with dup2(2).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import resource
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from podtree.errors import Damaged, Refused, RestoreFailed
from podtree.kernel import fdops, procfs
from podtree.kernel.fdinfo import FdInfo, read_fdinfo
from podtree.kernel.kcmp import compare_files
from podtree.kernel.pidfd import pidfd_getfd, pidfd_open_living, pidfd_open_thread
from podtree.objects import epoll, files, inotify, kinds, mqueue, signalfd, timerfd, tty
from podtree.objects.contents import Contents
from podtree.objects.context import CollectContext, FrozenProcess, FrozenTask, RestoreContext
from podtree.objects.held import Held, PodView, pod_id
from podtree.objects.slots import RAISE_LIMIT, raise_descriptor_limit, slot_base, too_many
from podtree.objects.tty import ControllingTerminal

#: Flags that F_SETFL can set (fs/fcntl.c, SETFL_MASK), without O_ASYNC, which records the setter's descriptor.
SETTABLE = os.O_APPEND | os.O_NONBLOCK | os.O_DIRECT | os.O_NOATIME
#: Flags that are saved. O_LARGEFILE says nothing for a 64-bit process; O_TMPFILE only how the file was made.
SAVED_FLAGS = files.OPEN_FLAGS | os.O_ASYNC
MAX_FILES = 1 << 20


class Fd(msgspec.Struct, frozen=True):
    """Descriptor number `fd` of a process refers to OpenFile `file`."""

    fd: int
    file: int
    cloexec: bool = False


class FileLock(msgspec.Struct, frozen=True):
    """A lock held through a description: flock(2) ("flock"), F_OFD_SETLK ("ofd"), or fcntl's own ("posix").

    A posix lock belongs to process `pid`. `end` is inclusive; None: for ever.
    """

    kind: str
    write: bool
    start: int = 0
    end: int | None = None
    pid: int = 0


class Owner(msgspec.Struct, frozen=True):
    """F_SETOWN_EX (`type`: OwnerType, `id`: pod's number), F_SETSIG and O_ASYNC, as process `pid` sets them on `fd`."""

    type: int
    id: int
    signal: int
    asynchronous: bool
    pid: int
    fd: int


class OpenFile(msgspec.Struct, frozen=True):
    """One open file description. `flags` as F_GETFL; `pos` in bytes, for files and directories."""

    id: int
    flags: int
    pos: int
    what: kinds.FileState
    owner: Owner | None = None
    locks: tuple[FileLock, ...] = ()


# ----------------------------------------------------------------------------------------------- collect

class FileTable:
    """All open file descriptions of a frozen pod. `contents` takes what memory files hold.

    add_process and add_local first, finish once, release when the duplicates are no longer needed; drop_ghosts when
    the volume's snapshot has been made.
    """

    def __init__(self, ctx: CollectContext, contents: Contents) -> None:
        self._limit: tuple[int, int] | None = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise_descriptor_limit()
        self.ctx = ctx
        self.contents = contents
        self.view = PodView(ctx)
        self.ghosts = files.GhostKeeper(ctx, self.view)
        self.all: list[Held] = []
        self._same: dict[tuple[int, int, int], list[Held]] = {}
        self._local: dict[tuple[int, int, int], Held] = {}
        self._pidfds: list[int] = []
        self._locks: dict[int, dict[FileLock, None]] = {}
        self.watchers = inotify.Watchers(ctx, self.view, self.all)
        self.queues = mqueue.Queues(ctx, self.view, self.all)

    def add_process(self, process: FrozenProcess) -> list[Fd]:
        """All descriptors of one process; OSError when it vanishes (the pod isn't frozen)."""
        found = []
        base = f"/proc/{process.living}/fd/"
        for number in sorted(int(name) for name in os.listdir(base)):
            info = read_fdinfo(process.living, number)
            link = os.readlink(os.fsencode(base + str(number)))
            display = f"fd {number} ({link.decode(errors='backslashreplace')})"
            fd = self._duplicate(process, number)
            held = self._unify(self._hold(fd, link, info, display, process, number))
            held.holders.append((process, number))
            self._note_locks(held, info, process)
            found.append(Fd(number, held.id, bool(info.flags & os.O_CLOEXEC)))
        return found

    def add_thread(self, process: FrozenProcess, task: FrozenTask) -> list[Fd]:
        """All descriptors of a thread that has a table for itself. It holds them like a process of its number."""
        pidfd = pidfd_open_thread(task.tid)
        self._pidfds.append(pidfd)
        alone = dataclasses.replace(process, host_pid=task.tid, pid=task.inner_tid, pidfd=pidfd, tasks=[task])
        return self.add_process(alone)

    def _duplicate(self, process: FrozenProcess, number: int) -> int:
        try:
            return pidfd_getfd(process.pidfd, number)
        except OSError as error:
            if error.errno == errno.EMFILE:
                self.ctx.refuse(None, "descriptors", "the pod has more open files than podtree may have", RAISE_LIMIT)
                raise Refused(self.ctx.problems) from error
            raise

    def add_local(self, fd: int, display: str, access: int | None = None) -> int:
        """A file that the engine came by (a mapping's, an executable, a directory); returns its OpenFile id.

        `fd` may be O_PATH, so that looking at it tells no watcher of the pod: `access` is then how it is to be opened.
        The same inode with the same access mode is added once. `fd` remains the caller's.
        """
        st = os.fstat(fd)
        flags = fcntl.fcntl(fd, fcntl.F_GETFL) if access is None else access
        key = (st.st_dev, st.st_ino, flags & (os.O_ACCMODE | os.O_PATH))
        if key not in self._local:
            link = os.readlink(f"/proc/self/fd/{fd}".encode())
            copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
            held = self._hold(copy, link, read_fdinfo("self", fd), display, None, -1)
            held.flags = flags & ~os.O_CLOEXEC
            self._local[key] = self._register(held)
        return self._local[key].id

    def hush(self) -> None:
        """Keep the pod's watchers from what is about to be looked at, until `release`. All processes are added."""
        self.watchers.hush()

    def add_passed(self, fd: int, process: FrozenProcess, display: str) -> int:
        """A descriptor on its way in a socket's queue; returns its OpenFile id. `fd` becomes the table's own.

        `process` is one that can receive it.
        """
        link = os.readlink(f"/proc/self/fd/{fd}".encode())
        display = f"{display} ({link.decode(errors='backslashreplace')})"
        held = self._unify(self._hold(fd, link, read_fdinfo("self", fd), display, process, -1))
        self._note_locks(held, held.info, process)
        return held.id

    def _hold(
        self, fd: int, link: bytes, info: FdInfo, display: str, process: FrozenProcess | None, number: int
    ) -> Held:
        flags = info.flags & ~os.O_CLOEXEC
        return Held(-1, fd, link, os.fstat(fd), info, flags, display, process, number)

    def _register(self, held: Held) -> Held:
        held.id = len(self.all)
        self.all.append(held)
        if held.writable and held.kind == stat.S_IFREG:
            self.ghosts.written.add(held.inode)
        return held

    def _unify(self, held: Held) -> Held:
        """The known Held of the same open file description (and `held`'s duplicate is closed), or this one."""
        known = self._same.setdefault((*held.inode, held.flags), [])
        low, high = 0, len(known)
        while low < high:  # kcmp orders them, so a bisection finds it
            middle = (low + high) // 2
            order = compare_files(held.fd, known[middle].fd)
            if order == 0:
                os.close(held.fd)
                return known[middle]
            low, high = (middle + 1, high) if order > 0 else (low, middle)
        known.insert(low, self._register(held))
        return held

    def _note_locks(self, held: Held, info: FdInfo, process: FrozenProcess) -> None:
        kinds = {"POSIX": "posix", "FLOCK": "flock", "OFDLCK": "ofd"}
        for line in info.locks:
            if line.kind not in kinds:
                held.refuse(self.ctx, f"a {line.kind.lower()} (fcntl F_SETLEASE) is on it", "give the lease up")
                continue
            owner = process.pid if line.kind == "POSIX" else 0
            lock = FileLock(kinds[line.kind], line.write, line.start, line.end, owner)
            self._locks.setdefault(held.id, {})[lock] = None

    def finish(self) -> list[OpenFile]:
        """States of all; one that can't be saved is named in ctx.problems and left out."""
        self.hush()
        states = kinds.collect(self, self.ctx)
        result = []
        for held in self.all:
            if held.id not in states:
                continue
            what = states[held.id]
            pos = held.info.pos if isinstance(what, kinds.POSITIONED) else 0
            locks = tuple(self._locks.get(held.id, ()))
            result.append(OpenFile(held.id, _saved_flags(held), pos, what, self._owner(held), locks))
        self._refuse_too_many(result)
        return result

    def _refuse_too_many(self, found: list[OpenFile]) -> None:
        """What this machine couldn't restore is not to be saved."""
        base = slot_base(max((number for held in self.all for _, number in held.holders), default=0))
        if reason := too_many(numbers_needed(base, found)):
            self.ctx.refuse(None, "descriptors", reason, RAISE_LIMIT)

    def _owner(self, held: Held) -> Owner | None:
        if held.flags & os.O_PATH or held.process is None:
            return None
        kind, host = fdops.get_owner(held.fd)
        number = fcntl.fcntl(held.fd, fdops.F_GETSIG)
        asynchronous = bool(held.flags & os.O_ASYNC)
        if not (host or number or asynchronous):
            return None
        if host and held.kind == stat.S_IFDIR:
            held.refuse(self.ctx, "it may be watched by fcntl F_NOTIFY (dnotify), and nobody can tell for what")
            return None
        inner = pod_id(self.ctx, host) if host else 0
        if host and not inner:
            held.refuse(self.ctx, "its signals (F_SETOWN) go to a process outside of the pod")
        if held.number < 0:
            held.refuse(self.ctx, "it has an owner for signals (F_SETOWN), and no process holds it")
        return Owner(kind, inner, number, asynchronous, held.process.pid, held.number)

    def drop_ghosts(self) -> None:
        """After the snapshot: remove the ghosts from the live volume."""
        self.ghosts.release()

    def release(self) -> None:
        """Close the supervisor's duplicates; ghosts go too. May be called again."""
        self.drop_ghosts()
        self.watchers.release()
        for fd in [*self._pidfds, *(held.fd for held in self.all)]:
            os.close(fd)
        self._pidfds.clear()
        self.all.clear()
        self._same.clear()
        self._local.clear()
        self.view.close()
        if self._limit:  # what this process starts later is not to inherit more than before
            resource.setrlimit(resource.RLIMIT_NOFILE, self._limit)
            self._limit = None


def recover(image_dir: Path, root_fd: int, pids: Iterable[int], consoles: Iterable[int]) -> None:
    """Put right what a killed checkpointer may have left: ghosts in the volume, bytes taken out of terminals.

    `pids`: host pids of the pod's processes, which may be running. `consoles`: the supervisor's pty masters.
    """
    files.sweep(root_fd)
    if not tty.is_interrupted(image_dir):
        return
    masters = [os.dup(fd) for fd in consoles]
    try:
        for pid in pids:
            masters += _masters_of(pid)
        tty.recover(image_dir, masters)
    finally:
        for fd in masters:
            os.close(fd)


def _masters_of(pid: int) -> list[int]:
    """Duplicates of the pty masters that a process has open."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        tid = procfs.living_thread(pid)
        pidfd = pidfd_open_living(pid)
        try:
            for name in os.listdir(f"/proc/{tid}/fd"):
                if os.readlink(f"/proc/{tid}/fd/{name}").endswith("/ptmx"):
                    found.append(pidfd_getfd(pidfd, int(name)))
        finally:
            os.close(pidfd)
    return found


def _saved_flags(held: Held) -> int:
    """O_TMPFILE leaves O_DIRECTORY behind on what is a regular file."""
    return held.flags & (SAVED_FLAGS if held.kind == stat.S_IFDIR else SAVED_FLAGS & ~os.O_DIRECTORY)


# ----------------------------------------------------------------------------------------------- restore


class PosixLock(msgspec.Struct, frozen=True):
    """Process `pid` must take this lock (F_SETLK) on OpenFile `file`."""

    pid: int
    file: int
    write: bool
    start: int
    end: int | None


@dataclass(slots=True)
class Deferred:
    """What only the tasks themselves can do.

    `owners`: when the process has its own numbers: F_SETSIG, F_SETOWN_EX, then O_ASYNC added by F_SETFL.
    `locks`: after the process has closed all slots, since closing any descriptor of a file drops them.
    `notifications`: of POSIX message queues, likewise: they end when their owner closes a queue. (OpenFile id, what)
    `watches`: epoll registrations, made with the watched number and the slots, before own numbers are taken.
    `terminals`: slots with a slave each, `slot_base` and above, to be closed like the others.
    `end`: the first number above all that are used.
    """

    owners: list[tuple[int, Owner]] = field(default_factory=list)
    locks: list[PosixLock] = field(default_factory=list)
    notifications: list[tuple[int, mqueue.Notification]] = field(default_factory=list)
    watches: list[epoll.OwnWatch] = field(default_factory=list)
    terminals: list[ControllingTerminal] = field(default_factory=list)
    end: int = 0


def numbers_needed(base: int, entries: Sequence[OpenFile]) -> int:
    """How many descriptors the builder needs: the slots, and what is made all at once before it is placed."""
    passing = sum(not isinstance(entry.what, files.RegularFile) for entry in entries)
    return max((e.id for e in entries), default=-1) + 1 + max(base, passing)


def restore_files(entries: list[OpenFile], ctx: RestoreContext, slot_base: int) -> Deferred:
    """Make all descriptions; each is then at descriptor `slot_base + id`, not close-on-exec.

    For the builder: one thread, root, inside the pod's root. Raises RestoreFailed or Damaged.
    """
    _validate(entries)
    slots = _Slots(entries, slot_base)
    leads: list[tuple[int, tty.Settings]] = []
    try:
        for number, fd in kinds.make_all(entries, ctx, leads, slot_base):
            slots.place(number, fd)
        watches = epoll.register_all(
            [(e.id, e.what) for e in entries if isinstance(e.what, epoll.Epoll)],
            {e.id: slot_base + e.id for e in entries},
            {e.id for e in entries if isinstance(e.what, (signalfd.SignalFd, *kinds.LATE))},
        )
        inotify.watch_all(
            [(e.id, e.what) for e in entries if isinstance(e.what, inotify.Inotify)],
            {e.id: slot_base + e.id for e in entries},
        )
    except OSError as error:
        raise RestoreFailed(f"a file of the pod can't be opened again: {error}") from error
    deferred = slots.deferred
    deferred.watches = watches
    for entry in entries:
        if isinstance(entry.what, mqueue.QueueFile) and entry.what.notification:
            deferred.notifications.append((entry.id, entry.what.notification))
    for fd, settings in leads:
        if settings.session:
            slot = slots.add(fd)
            deferred.terminals.append(ControllingTerminal(slot, settings.session, settings.foreground))
        else:
            os.close(fd)
    deferred.end = slots.end
    return deferred


def arm_timers(entries: Iterable[OpenFile], fetch: Callable[[int], int], pod_now_ns: int) -> None:
    """Have the timers of restored timerfds go on. `fetch(id)`: a descriptor of that OpenFile, ours to close.
    `pod_now_ns`: CLOCK_MONOTONIC of the pod, now. Outside of the pod's time namespace. Raises OSError.
    """
    for entry in entries:
        if isinstance(entry.what, timerfd.TimerFd):
            fd = fetch(entry.id)
            try:
                timerfd.arm(fd, entry.what, pod_now_ns - entry.what.read_ns)
            finally:
                os.close(fd)


def _validate(entries: list[OpenFile]) -> None:
    ids = [e.id for e in entries]
    if len(set(ids)) != len(ids) or any(not 0 <= number < MAX_FILES for number in ids):
        raise Damaged("the image's open files have impossible numbers")


class _Slots:
    """The range of numbers that the descriptions end in; reserved first, so that nothing else is opened there."""

    def __init__(self, entries: list[OpenFile], base: int) -> None:
        self.base = base
        self.by_id = {e.id: e for e in entries}
        self.deferred = Deferred()
        self.end = base + max(self.by_id, default=-1) + 1
        if reason := too_many(max(self.end, numbers_needed(base, entries))):
            raise RestoreFailed(f"descriptors: {reason}", RAISE_LIMIT)
        dummy = os.open("/", os.O_PATH | os.O_CLOEXEC)
        for number in self.by_id:
            os.dup2(dummy, base + number, inheritable=False)
        os.close(dummy)

    def place(self, number: int, fd: int) -> None:
        """Set what is common to all kinds, and move `fd` to its slot."""
        entry = self.by_id[number]
        if not entry.flags & os.O_PATH:
            self._finish(entry, fd)
        os.dup2(fd, self.base + number)
        os.close(fd)

    def add(self, fd: int) -> int:
        """One more slot."""
        os.dup2(fd, self.end)
        os.close(fd)
        self.end += 1
        return self.end - 1

    def _finish(self, entry: OpenFile, fd: int) -> None:
        if isinstance(entry.what, kinds.POSITIONED) and entry.pos != os.lseek(fd, 0, os.SEEK_CUR):
            os.lseek(fd, entry.pos, os.SEEK_SET)
        fcntl.fcntl(fd, fcntl.F_SETFL, entry.flags & SETTABLE)
        checked = os.O_ACCMODE | SETTABLE | os.O_SYNC | os.O_DSYNC
        found = fcntl.fcntl(fd, fcntl.F_GETFL)
        if (found ^ entry.flags) & checked:
            raise RestoreFailed(f"{entry.what}: its flags {entry.flags:#o} became {found & SAVED_FLAGS:#o}")
        if entry.owner:
            self.deferred.owners.append((entry.id, entry.owner))
        for lock in entry.locks:
            self._lock(entry, lock, fd)

    def _lock(self, entry: OpenFile, lock: FileLock, fd: int) -> None:
        try:
            if lock.kind == "posix":
                self.deferred.locks.append(PosixLock(lock.pid, entry.id, lock.write, lock.start, lock.end))
            elif lock.kind == "flock":
                fcntl.flock(fd, (fcntl.LOCK_EX if lock.write else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            else:
                fdops.set_lock(fd, write=lock.write, start=lock.start, end=lock.end)
        except BlockingIOError as error:
            raise RestoreFailed(
                f"{entry.what}: the lock that was held on it is taken by somebody else",
                "the file is shared with another pod or the host; end whoever has it locked",
            ) from error
