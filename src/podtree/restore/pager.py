"""Large memory comes in while the branch runs already: at first touch, and in the background until all is there.

Anonymous memory that is restored so is anonymous memory, of which pages are missing. A process of its own, the
*pager*, answers for them (userfaultfd(2)) from the page file: a page that was saved is copied into place, one that
wasn't, or that the program has dropped since, is zeros. It hears of every munmap, mremap, madvise and fork before it
takes effect, so what belongs where is known at any instant; it is one thread, so nothing is under way meanwhile.
Every page is compared with its checksum in the buffer that it is copied from.

What must not happen is that a missing page reads as zeros because nobody answers. The kernel gives up waiting only
when the last descriptor of a userfaultfd is closed. So the supervisor has one, and so has the process itself, out of
sight (`Lazy.hidden`), until all is filled; then it is stopped for a moment and that is closed (`Filling.settled`).
If the pager dies before, or finds a page damaged, the pod can't go on and is ended. The pager marks its life by a
locked file, and leaves there why it gave up: the supervisor that replaces one that died waits for it, or learns that
it died (`await_orphan`).
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import fcntl
import mmap
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from podtree.errors import RestoreFailed
from podtree.image.verify import SavedPages
from podtree.kernel import mm, procfs, userfaultfd
from podtree.kernel.pageruns import Run
from podtree.kernel.pidfd import pidfd_send_signal
from podtree.kernel.prctl import set_name
from podtree.kernel.sys import NR, PAGE_SIZE, syscall
from podtree.kernel.userfaultfd import Event, Message
from podtree.objects.memory import Vma, VmaKind

FILE = "filling"  # in the pod's run directory while a pager is at work
LEAST_BYTES = int(os.environ.get("PODTREE_LAZY_BYTES", 16 << 20))
"""Address spaces with less to bring in are filled before they run: that takes no longer than setting this up."""
LEAST_VMA_BYTES = min(LEAST_BYTES, 1 << 18)  # mappings with less to bring in are always filled at once
CHUNK = 128 << 10  # brought in around a page that was touched, or by a step in the background
RESERVE_BYTES = int(os.environ.get("PODTREE_LAZY_RESERVE", os.sysconf("SC_PHYS_PAGES") * PAGE_SIZE // 4))
"""Of the machine's memory, which is left alone as long as nobody asks for more: many branches may never touch it."""
PACE_MS = int(os.environ.get("PODTREE_LAZY_PACE_MS", 0))  # between steps in the background: tests want it to take time
_BEGIN, _DONE = b"b", b"f"
_NO_MEMORY_PATIENCE_S = 30.0
_SHORT_OF_MEMORY_MS = 500  # between two looks whether there is room now
_LOOK_EVERY = 32  # steps
_HEARD_S = 1.0  # how long a supervisor may take to hear that its pager gives up


class Piece(NamedTuple):
    """Pages [start, end) that are still to come; in the page file they lie at address - `moved`."""

    start: int
    end: int
    moved: int = 0

    def clip(self, start: int, end: int) -> Piece:
        """The part of it that lies in [start, end)."""
        return Piece(max(start, self.start), min(end, self.end), self.moved)


class Missing:
    """What is still to come of one address space: disjoint pieces, ascending."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = sorted(pieces)

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def copy(self) -> Missing:
        """The same for a child that was just forked."""
        return Missing(self._pieces)

    def add(self, piece: Piece) -> None:
        """This is to come (again)."""
        if piece.start < piece.end:
            bisect.insort(self._pieces, piece)

    def cut(self, start: int, end: int) -> list[Piece]:
        """Take out and return all that lies in [start, end)."""
        first = bisect.bisect_left(self._pieces, (start,))
        if first and self._pieces[first - 1].end > start:
            first -= 1
        last = bisect.bisect_left(self._pieces, (end,))
        touched = self._pieces[first:last]
        rest = [p.clip(a, b) for p in touched for a, b in ((p.start, start), (end, p.end)) if a < b]
        self._pieces[first:last] = sorted(rest)
        return [p.clip(start, end) for p in touched]

    def around(self, page: int) -> Piece | None:
        """Take out the aligned chunk around a page, as far as it is one piece; None if that page isn't to come."""
        at = bisect.bisect_right(self._pieces, (page, 1 << 64)) - 1
        if at < 0 or self._pieces[at].end <= page:
            return None
        start = page & -CHUNK
        chunk = self._pieces[at].clip(start, start + CHUNK)
        self.cut(chunk.start, chunk.end)
        return chunk

    def next_chunk(self) -> Piece:
        """Take out some of the lowest."""
        lowest = self._pieces[0]
        chunk = lowest.clip(lowest.start, lowest.start + CHUNK)
        self.cut(chunk.start, chunk.end)
        return chunk

    def move(self, source: int, target: int, length: int) -> None:
        """mremap(2)."""
        for piece in self.cut(source, source + length):
            by = target - source
            self.add(Piece(piece.start + by, piece.end + by, piece.moved + by))


@dataclass(slots=True)
class Lazy:
    """One address space to fill, from its page file. `uffd` is the supervisor's descriptor."""

    uffd: int
    pages: SavedPages
    pieces: list[Piece]


def split(vmas: Sequence[Vma], runs: Sequence[Run]) -> tuple[list[Run], list[Piece], list[Vma]]:
    """What of the saved pages is filled before the process runs, what later, and the mappings that the latter are in.

    Later: large private anonymous memory that is plainly read and written. Nothing if it isn't worth it.
    """
    by_vma: dict[int, list[Piece]] = {}
    now: list[Run] = []
    candidates = [v for v in vmas if _may_wait(v)]
    starts = [v.start for v in candidates]
    for first, count in runs:
        at, end = first * PAGE_SIZE, (first + count) * PAGE_SIZE
        while at < end:
            index = bisect.bisect_right(starts, at) - 1
            if index >= 0 and candidates[index].end > at:
                upto = min(end, candidates[index].end)
                by_vma.setdefault(index, []).append(Piece(at, upto))
            else:
                upto = min(end, starts[index + 1]) if index + 1 < len(starts) else end
                now.append((at // PAGE_SIZE, (upto - at) // PAGE_SIZE))
            at = upto
    small = {i for i, pieces in by_vma.items() if sum(p.end - p.start for p in pieces) < LEAST_VMA_BYTES}
    later = [p for i, pieces in by_vma.items() if i not in small for p in pieces]
    if sum(p.end - p.start for p in later) < LEAST_BYTES:
        return list(runs), [], []
    now += [(p.start // PAGE_SIZE, (p.end - p.start) // PAGE_SIZE) for i in small for p in by_vma[i]]
    return sorted(now), later, [candidates[i] for i in by_vma if i not in small]


def _may_wait(vma: Vma) -> bool:
    readable = mm.PROT_READ | mm.PROT_WRITE
    plain = vma.kind is VmaKind.ANON and not (vma.shared or vma.locked or vma.grows_down)
    return plain and vma.prot & readable == readable and "wf" not in vma.advice


class Filling:
    """The supervisor's side: memory of a pod that is still coming in."""

    def __init__(self, pid: int, link: socket.socket, uffds: list[int], mark: Path, passing: Path) -> None:
        self._pid = pid
        self._mark = mark
        self._passing = passing  # the mark's name before it counts
        self._link = link
        self._uffds = uffds
        self._all_there = False
        self._begun = False

    def fileno(self) -> int:
        """Readable when `wait` won't wait, and once this is closed."""
        return self._link.fileno()

    def begin(self) -> None:
        """Have the pager answer, and fill."""
        os.rename(self._passing, self._mark)
        self._begun = True
        with contextlib.suppress(OSError):  # it is gone, which shows when it is missed
            self._link.send(_BEGIN)

    def hurry(self) -> None:
        """Have all of it come in, however short the machine is of memory."""
        with contextlib.suppress(OSError):
            self._link.send(_BEGIN, socket.MSG_DONTWAIT)

    def wait(self) -> None:
        """Until all pages are there. Raises RestoreFailed if the pager has died or given up: the pod must be ended."""
        self.hurry()
        if not self._all_there and self._link.recv(1) != _DONE:
            raise _stays_away(self._mark)
        self._all_there = True

    def failure(self) -> RestoreFailed | None:
        """Why the pager gave up, if it has."""
        return _stays_away(self._mark) if _reason(self._mark) else None

    def settled(self) -> None:
        """Nobody's memory depends on the pager any more: no process has a descriptor of its userfaultfds."""
        self._close()
        os.waitpid(self._pid, 0)

    def abandon(self) -> None:
        """The pod has ended, or is going to be."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        self.settled()
        self._passing.unlink(missing_ok=True)
        if self._begun:  # whoever comes to this pod later is not to wait for that pager
            self._mark.unlink(missing_ok=True)

    def _close(self) -> None:
        with contextlib.suppress(OSError):  # ENOTCONN: the pager is gone
            self._link.shutdown(socket.SHUT_RDWR)
        self._link.close()
        for fd in self._uffds:
            os.close(fd)
        self._uffds.clear()


def start(lazies: Sequence[Lazy], run: Path, init_pidfd: int) -> Filling | None:
    """Start the pager, which waits for `Filling.begin`; the page files' descriptors are its own from now on. None if
    there is nothing to fill.

    `init_pidfd`: the pod's first process, which is killed when the pager gives up and nobody else sees to that.
    """
    if not lazies:
        return None
    ours, theirs = socket.socketpair()
    passing = run / f"{FILE}.{os.getpid()}.{time.monotonic_ns()}"
    lock = os.open(passing, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    pid = os.fork()
    if pid == 0:
        _main(lazies, theirs, lock, run / FILE, init_pidfd)
    theirs.close()
    os.close(lock)
    for lazy in lazies:
        lazy.pages.close()
    return Filling(pid, ours, [lazy.uffd for lazy in lazies], run / FILE, passing)


def await_orphan(run: Path) -> None:
    """Wait for a pager that has outlived its supervisor. Raises RestoreFailed if one ended before it was done."""
    try:
        fd = os.open(run / FILE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        if (run / FILE).exists():
            raise _stays_away(run / FILE)
    finally:
        os.close(fd)


def _stays_away(mark: Path) -> RestoreFailed:
    """Why a pod's memory doesn't come."""
    reason = _reason(mark)
    why = reason or "the process that brought in the pod's memory was killed"
    return RestoreFailed(f"{why}: the pod can't go on", "podtree fsck" if reason else "")


def _reason(mark: Path) -> str:
    try:
        return mark.read_text(errors="replace")
    except OSError:
        return ""


# --- the pager itself


def _main(lazies: Sequence[Lazy], link: socket.socket, lock: int, mark: Path, init_pidfd: int) -> NoReturn:
    """A fork of the supervisor that keeps only what it needs."""
    try:
        set_name("podtree-pager")
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        keep = {link.fileno(), lock, init_pidfd}
        keep.update(fd for lazy in lazies for fd in (lazy.uffd, *lazy.pages.descriptors))
        lowest = 3
        for fd in sorted(keep):
            if fd > lowest:
                syscall(NR.close_range, lowest, fd - 1, 0)
            lowest = fd + 1
        syscall(NR.close_range, lowest, 0xFFFFFFFF, 0)
        if link.recv(1) != _BEGIN:
            os._exit(0)
        Pager(lazies).run(link.fileno(), lambda: os.unlink(mark))
        os._exit(0)
    except BaseException as error:
        import traceback

        traceback.print_exc()
        with contextlib.suppress(OSError):
            os.write(lock, (str(error) or type(error).__name__).encode(errors="replace"))
            _give_up(link, init_pidfd)
        os._exit(1)


def _give_up(link: socket.socket, init_pidfd: int) -> None:
    """Have the pod ended: by its supervisor, unless that waits for a task that waits for us (in a restore)."""
    link.shutdown(socket.SHUT_WR)
    poll = select.poll()
    poll.register(link, select.POLLIN)
    if not poll.poll(_HEARD_S * 1000):
        pidfd_send_signal(init_pidfd, signal.SIGKILL)


def _heard(link: int) -> bool:
    """Whether the supervisor is in a hurry; False when it has hung up."""
    try:
        return os.read(link, 64) != b""
    except ConnectionError:
        return False


class _Gone(Exception):
    """The address space doesn't exist any more."""


class _Space:
    """One address space: the original's, or that of a child which it has forked since."""

    def __init__(self, uffd: int, pages: SavedPages, missing: Missing) -> None:
        self.uffd = uffd
        self.pages = pages
        self.missing = missing
        self.again: set[int] = set()  # pages that somebody waits for and that had to wait for an event


class Pager:
    """Answers for missing pages, and brings in the rest when nobody asks."""

    def __init__(self, lazies: Sequence[Lazy]) -> None:
        self._spaces = {lazy.uffd: _Space(lazy.uffd, lazy.pages, Missing(lazy.pieces)) for lazy in lazies}
        self._buffer = memoryview(mmap.mmap(-1, CHUNK))
        self._address = mm.address_of(self._buffer)
        self._poll = select.poll()
        for fd in self._spaces:
            self._poll.register(fd, select.POLLIN)
        self._no_memory_since = 0.0
        self._hurries = False  # somebody waits for all of it
        self._has_room = True
        self._steps = 0

    def run(self, link: int, done: Callable[[], None]) -> None:
        """Until all is filled and the supervisor has hung up; `done` is called right before the end."""
        told = alone = False
        self._poll.register(link, select.POLLIN)
        while True:
            busy = any(space.missing or space.again for space in self._spaces.values())
            if not busy:
                if alone:
                    done()
                    return
                if not told:
                    told = True
                    with contextlib.suppress(OSError):  # no supervisor any more
                        os.write(link, _DONE)
            ready = [fd for fd, _ in self._poll.poll(self._pause_ms() if busy else None)]
            if link in ready:
                ready.remove(link)
                self._hurries = True
                if not _heard(link):
                    self._poll.unregister(link)
                    alone = True
            for fd in ready:
                self._hear(self._spaces[fd])
            if not ready and busy and self._may_step():
                self._step()

    def _pause_ms(self) -> int:
        """Until the next step in the background, if nobody asks."""
        return PACE_MS if self._hurries or self._has_room else _SHORT_OF_MEMORY_MS

    def _may_step(self) -> bool:
        """Not for nothing: while the machine is short of memory only what is touched comes in."""
        if self._hurries or any(space.again for space in self._spaces.values()):
            return True
        if not self._has_room or self._steps % _LOOK_EVERY == 0:
            self._has_room = procfs.memory_available() > RESERVE_BYTES
        self._steps += 1
        return self._has_room

    def _step(self) -> None:
        """One chunk of some address space that lacks something."""
        for space in list(self._spaces.values()):
            try:
                for page in list(space.again):
                    self._fault(space, page)
                if space.missing:
                    self._fill(space, space.missing.next_chunk())
                    return
            except _Gone:
                self._drop(space)

    def _hear(self, space: _Space) -> None:
        try:
            for message in userfaultfd.messages(space.uffd):
                self._obey(space, message)
        except _Gone:
            self._drop(space)

    def _obey(self, space: _Space, message: Message) -> None:
        match message.event:
            case Event.PAGEFAULT:
                self._fault(space, message.args[1] & -PAGE_SIZE)
            case Event.FORK:
                uffd = message.args[0]
                self._spaces[uffd] = _Space(uffd, space.pages, space.missing.copy())
                self._poll.register(uffd, select.POLLIN)
            case Event.REMAP:
                space.missing.move(*message.args)
            case Event.REMOVE | Event.UNMAP:
                space.missing.cut(message.args[0], message.args[1])

    def _fault(self, space: _Space, page: int) -> None:
        """Somebody waits for a page."""
        space.again.discard(page)
        chunk = space.missing.around(page)
        if chunk is None:
            self._zero(space, page)
        elif not self._fill(space, chunk):
            space.again.add(page)

    def _zero(self, space: _Space, page: int) -> None:
        match userfaultfd.zero(space.uffd, page, PAGE_SIZE):
            case 0:
                pass
            case errno.EAGAIN:
                space.again.add(page)
            case errno.ESRCH:
                raise _Gone
            case errno.EEXIST | errno.ENOENT:  # it is there, or is no memory any more: the waiting task will see
                userfaultfd.wake(space.uffd, page, PAGE_SIZE)
            case code:
                raise OSError(code, f"UFFDIO_ZEROPAGE: {os.strerror(code)}")

    def _fill(self, space: _Space, chunk: Piece) -> bool:
        """Bring in a chunk; False if an event has to be heard first: what wasn't done is to come again."""
        size = chunk.end - chunk.start
        space.pages.read((chunk.start - chunk.moved) // PAGE_SIZE, self._buffer[:size])
        at, step = chunk.start, size
        while at < chunk.end:
            length = min(step, chunk.end - at)
            done, code = userfaultfd.copy(space.uffd, at, self._address + at - chunk.start, length)
            at += done
            match code:
                case 0:
                    self._no_memory_since = 0.0
                case errno.EEXIST:
                    userfaultfd.wake(space.uffd, at, PAGE_SIZE)
                    at += PAGE_SIZE
                case errno.ENOENT if length > PAGE_SIZE:  # several mappings by now: page by page
                    step = PAGE_SIZE
                case errno.ENOENT:
                    userfaultfd.wake(space.uffd, at, PAGE_SIZE)
                    at += PAGE_SIZE
                case errno.ESRCH:
                    raise _Gone
                case errno.EAGAIN | errno.ENOMEM:
                    space.missing.add(Piece(at, chunk.end, chunk.moved))
                    self._pause(code)
                    return False
                case _:
                    raise OSError(code, f"UFFDIO_COPY: {os.strerror(code)}")
        return True

    def _pause(self, code: int) -> None:
        """EAGAIN passes when the event was read; no memory is waited for, as a fault would, but not for ever."""
        if code == errno.ENOMEM:
            now = time.monotonic()
            self._no_memory_since = self._no_memory_since or now
            if now - self._no_memory_since > _NO_MEMORY_PATIENCE_S:
                raise OSError(code, "UFFDIO_COPY: no memory")
            time.sleep(0.01)
        else:
            time.sleep(0.00005)

    def _drop(self, space: _Space) -> None:
        self._poll.unregister(space.uffd)
        del self._spaces[space.uffd]
        os.close(space.uffd)
