"""epoll(7): which files are watched, under which numbers, for what, with what data.

A registration is keyed by (open file description, descriptor number) and lives as long as the description, so it can
be made anew by whoever has both descriptions: the builder puts the target at the number for a moment. A number that
the tasks have closed since, while a duplicate lives on, is restored the same way.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping

import msgspec

from podtree.errors import Damaged, RestoreFailed
from podtree.kernel import fdops
from podtree.kernel.kcmp import is_epoll_target
from podtree.kernel.sys import NR, syscall
from podtree.objects import pidfd
from podtree.objects.context import CollectContext
from podtree.objects.held import Held

EPOLL_CTL_ADD = 1
EPOLLONESHOT, EPOLLET = 1 << 30, 1 << 31
PRIVATE_BITS = EPOLLONESHOT | EPOLLET | 1 << 29 | 1 << 28  # EPOLLWAKEUP, EPOLLEXCLUSIVE: fs/eventpoll.c
ANY_EVENT = 0x7FF  # EPOLLIN ... EPOLLMSG
ALWAYS = select.EPOLLERR | select.EPOLLHUP  # added by epoll_ctl to whatever is asked for


class Watch(msgspec.Struct, frozen=True):
    """One registration: number `fd` and OpenFile `file`; `events` of 0 but private bits: a spent EPOLLONESHOT."""

    fd: int
    file: int
    events: int
    data: int

    @property
    def spent(self) -> bool:
        return not self.events & ~PRIVATE_BITS


class Epoll(msgspec.Struct, frozen=True, tag="epoll"):
    """An epoll instance. `busy_poll` is its struct epoll_params, empty where all is 0 or the kernel has none."""

    watches: tuple[Watch, ...]
    busy_poll: bytes = b""


_LINE = re.compile(r"\s*(\d+) events:\s*([0-9a-f]+) data:\s*([0-9a-f]+)\s+pos:-?\d+ ino:([0-9a-f]+) sdev:([0-9a-f]+)")


def collect_epolls(epolls: list[Held], everything: list[Held], ctx: CollectContext) -> dict[int, Epoll]:
    """States of all epoll instances. `everything`: all open file descriptions of the pod."""
    by_number = {(p.host_pid, fd): held for held in everything for p, fd in held.holders}
    by_inode: dict[int, list[Held]] = {}
    for held in everything:
        by_inode.setdefault(held.stat.st_ino, []).append(held)
    result = {}
    for epoll in epolls:
        watches: list[Watch] = []
        counts: dict[int, int] = {}
        for line in epoll.info.extra.get("tfd", []):
            match = _LINE.match(line)
            if not match:
                raise ValueError(f"unknown epoll line in fdinfo: {line!r}")
            fd, events, data, ino = int(match[1]), int(match[2], 16), int(match[3], 16), int(match[4], 16)
            occurrence = counts.get(fd, 0)
            counts[fd] = occurrence + 1
            likely = [by_number.get((p.host_pid, fd)) for p, _ in epoll.holders]
            target = _find(epoll, fd, occurrence, [h for h in likely if h] + by_inode.get(ino, []))
            if target is None:
                epoll.refuse(ctx, f"it watches number {fd}, of which no process of the pod has the file open any more")
                continue
            watch = Watch(fd, target.id, events, data)
            if watch.spent and not _can_spend(target):
                epoll.refuse(
                    ctx,
                    f"its EPOLLONESHOT registration of fd {fd} has fired, and {target.link.decode(errors='replace')} "
                    "is not ready for anything now",
                    "try again: it can be saved when it is ready, or registered anew",
                )
                continue
            watches.append(watch)
        result[epoll.id] = Epoll(tuple(watches), _busy_poll(epoll.fd))
    return result


def _find(epoll: Held, fd: int, occurrence: int, candidates: list[Held]) -> Held | None:
    for candidate in candidates:
        if is_epoll_target(candidate.fd, epoll.fd, fd, occurrence):
            return candidate
    return None


def _can_spend(target: Held) -> bool:
    """Whether a new registration can be made to fire. A signalfd tells each process of its own signals only."""
    if target.link in (b"anon_inode:[signalfd]", pidfd.LINK) or target.link.startswith(b"/proc/"):
        return False
    return target.link.startswith(b"pipe:") or bool(_ready(target.fd))


def _ready(fd: int) -> int:
    poll = select.poll()
    poll.register(fd, ANY_EVENT)
    return next((events for _, events in poll.poll(0)), 0)


def _busy_poll(fd: int) -> bytes:
    try:
        raw = fcntl.ioctl(fd, fdops.EPIOCGPARAMS, bytes(8))
    except OSError:  # before Linux 6.9
        return b""
    return raw if any(raw) else b""


# ----------------------------------------------------------------------------------------------- restore


def restore(state: Epoll) -> int:
    """A new instance; `register_all` follows when all files are there."""
    fd = select.epoll(flags=select.EPOLL_CLOEXEC)
    number = os.dup(fd.fileno())
    fd.close()
    if state.busy_poll:
        fcntl.ioctl(number, fdops.EPIOCSPARAMS, state.busy_poll)
    return number


class OwnWatch(msgspec.Struct, frozen=True):
    """A registration that a process that has both files has to make itself."""

    epoll: int  # OpenFile id
    watch: Watch


def register_all(
    epolls: Iterable[tuple[int, Epoll]], slots: Mapping[int, int], own: Collection[int]
) -> list[OwnWatch]:
    """Make all registrations. `epolls`: (OpenFile id, state); `slots`: OpenFile id -> the caller's descriptor.

    The caller must have one thread only: numbers that it uses itself are borrowed for a moment. Those of files in
    `own` are returned: a signalfd wakes the process that registered it (fs/signalfd.c, signalfd_poll()), a pidfd
    isn't there yet.
    """
    left: list[OwnWatch] = []
    for number, state in epolls:
        for watch in sorted(state.watches, key=lambda w: not w.spent):
            if watch.file not in slots:
                raise Damaged(f"the image's epoll {number} watches a file {watch.file} that is not in it")
            if watch.file in own and not watch.spent:
                left.append(OwnWatch(number, watch))
            else:
                _register(slots[number], slots[watch.file], watch)
    return left


def _register(epoll: int, target: int, watch: Watch) -> None:
    with contextlib.ExitStack() as stack:
        if watch.spent and not _ready(target):
            stack.enter_context(_made_readable(target))
        epoll, target = stack.enter_context(_Borrowed(watch.fd, (epoll, target)))
        try:
            os.dup2(target, watch.fd, inheritable=False)
            events = watch.events | ANY_EVENT if watch.spent else watch.events
            event = struct.pack("=IQ", events & ~ALWAYS & 0xFFFFFFFF, watch.data)  # packed on x86_64
            syscall(NR.epoll_ctl, epoll, EPOLL_CTL_ADD, watch.fd, event)
            if watch.spent:  # let it fire: only spent ones are there yet, so nobody else's event is taken
                syscall(NR.epoll_wait, epoll, bytearray(12 * 64), 64, 0)
        except OSError as error:
            raise RestoreFailed(f"can't watch fd {watch.fd} by epoll again: {error}") from error


@contextlib.contextmanager
def _made_readable(pipe: int) -> Iterator[None]:
    """A byte is in an empty pipe while inside the `with`."""
    writer = fdops.reopen(pipe, os.O_WRONLY | os.O_NONBLOCK)
    os.write(writer, b"\n")
    try:
        yield
    finally:
        reader = fdops.reopen(pipe, os.O_RDONLY | os.O_NONBLOCK)
        os.read(reader, 1)
        os.close(reader)
        os.close(writer)


class _Borrowed:
    """Number `fd` of this process is free inside the `with`; what was there comes back afterwards.

    Gives the descriptors to use for `wanted`, of which one may have had that very number.
    """

    def __init__(self, fd: int, wanted: tuple[int, int]) -> None:
        self.fd = fd
        self.wanted = wanted
        self.kept: int | None = None
        self.flags = 0

    def __enter__(self) -> tuple[int, int]:
        try:
            self.flags = fcntl.fcntl(self.fd, fcntl.F_GETFD)
        except OSError:
            return self.wanted
        self.kept = fcntl.fcntl(self.fd, fcntl.F_DUPFD_CLOEXEC, self.fd + 1)
        epoll, target = (self.kept if number == self.fd else number for number in self.wanted)
        return epoll, target

    def __exit__(self, *_: object) -> None:
        if self.kept is None:
            os.close(self.fd)
            return
        os.dup2(self.kept, self.fd)
        fcntl.fcntl(self.fd, fcntl.F_SETFD, self.flags)
        os.close(self.kept)
