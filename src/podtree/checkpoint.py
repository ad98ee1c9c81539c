"""Checkpoints of one pod: freeze, collect, copy what changed, snapshot, let go, write.

The `Checkpointer` lives as long as the pod's supervisor: it keeps, for each address space, the
userfaultfd through which the kernel tells which pages were written since the last checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from podtree import collect
from podtree.beside import beside
from podtree.collect import ProcessView
from podtree.errors import Problem, Refused, RestoreFailed
from podtree.freeze import Freezer, Frozen
from podtree.image import manifest as manifest_file
from podtree.image import pages
from podtree.image.manifest import Clock, Manifest, StdioSet
from podtree.image.pages import PageFile
from podtree.kernel import mm, procfs
from podtree.kernel.pageruns import Run, merge_runs, subtract_runs
from podtree.kernel.sys import PAGE_SIZE
from podtree.mapcache import MapCache
from podtree.objects import aio, descriptors, external, inotify, insight, memory, socketcommon, sockets, sysvipc
from podtree.objects.contents import Contents
from podtree.objects.context import CollectContext
from podtree.objects.descriptors import FileTable
from podtree.objects.memory import ScannedPages
from podtree.objects.processes import Process
from podtree.objects.tables import clone_flags
from podtree.pod.live import INIT, LivePod
from podtree.pool.pending import State
from podtree.restore import pager, plan
from podtree.restore.pager import Filling
from podtree.script import vdso

PRECOPY_BYTES = 32 << 20  # address spaces with more unsaved memory are copied before the pod is stopped
PRECOPY_ROUNDS = 3
COPY_CHUNK = 32 << 20
KEPT_BUFFER = 128 << 20
RETRY_PAUSES_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)  # for what passes by itself


class Draft(Protocol):
    """What the pool offers for one checkpoint in the making."""

    id: str

    def flush_volume(self) -> None: ...
    def snapshot_volume(self) -> None: ...
    def snapshot_image(self) -> None: ...
    def commit(self, message: str, summary: dict[str, Any]) -> Any: ...


@dataclass(slots=True)
class Tracker:
    """Write tracking of one address space. `complete`: the page file holds all but what is written since."""

    uffd: int
    complete: bool = False
    doubtful: list[Run] = field(default_factory=list)  # pages to copy whatever the kernel says of them

    def close(self) -> None:
        """Stop tracking."""
        if self.uffd >= 0:
            os.close(self.uffd)
            self.uffd = -1


@dataclass(slots=True)
class Copied:
    """Pages of one address space, copied while the pod was stopped."""

    name: str
    tracker: Tracker
    saved: list[Run]
    written: list[Run]
    data: memoryview


class Checkpointer:
    """Takes the checkpoints of one pod. Not thread-safe: ptrace binds it to the thread that uses it."""

    def __init__(self, live: LivePod) -> None:
        self.live = live
        self._trackers: dict[int, Tracker] = {}  # by pid inside the pod
        self._external = live.spec.external
        self._freezer = Freezer(live.pids)
        self._maps = MapCache()
        self._buffer: mmap.mmap | None = None
        self._borrowers: set[int] = set()  # pids inside the pod: their address spaces are other processes'
        self._precopied = 0  # bytes written ahead of the stop
        # at the last checkpoint: host pid -> a living thread, the pages of rseq(2)
        self._seen: dict[int, tuple[int, set[int]]] | None = None
        self._arena = bytearray()  # for changed pages of shared memory
        os.makedirs(live.img_dir / "mem", mode=0o700, exist_ok=True)
        os.makedirs(live.img_dir / "shm", mode=0o700, exist_ok=True)

    # --- the verbs

    def check(self, shared: external.Policy | None = None) -> list[Problem]:
        """What would keep a checkpoint from working now. Stops the pod for a moment, writes nothing.

        `shared` as in `checkpoint`.

        What passes by itself is given the same time to pass as by `checkpoint`.
        """
        self._external = shared or self.live.spec.external
        pauses = iter(RETRY_PAUSES_S)
        while True:
            problems = self._check()
            if problems and insight.prepare():
                continue
            pause = next(pauses, None)
            if pause is None or not problems or not _passes(problems):
                return problems
            time.sleep(pause)

    def _check(self) -> list[Problem]:
        try:
            frozen = self._freeze()
        except Refused as refused:
            return refused.problems
        try:
            context = self._context(frozen, dry_run=True)
            with self._table(context) as table:
                self._collect(frozen, context, table, track=False)
            return context.problems
        finally:
            self._release(frozen)

    def checkpoint(
        self,
        draft: Draft,
        *,
        stop: bool = False,
        message: str = "",
        commit: bool = True,
        settle: Callable[[], None] = lambda: None,
        reached: Callable[[State, float], None] = lambda _state, _pause_s: None,
        notes: dict[str, Any] | None = None,
        shared: external.Policy | None = None,
    ) -> dict[str, Any]:
        """Take one checkpoint, durable on return. With `stop` the pod is ended once that is so.

        `settle` is called when the pod is stopped, right before the volume's snapshot: what the supervisor
        holds of the pod's output has to be in the log by then. Without `commit` the draft is left complete
        but uncommitted, for a look at it. `notes` go into the summary. `reached` is told when it is captured and when
        it is written, and for how long the pod was stopped, in seconds. `shared`: what becomes of what is shared with
        the outside of the pod; None: as the pod's spec says.

        Returns the summary. Raises Refused when something can't be saved; nothing was written then.
        """
        begun = time.monotonic()
        self._external = shared or self.live.spec.external
        draft.flush_volume()
        self._precopied = 0
        self._precopy()
        pauses = iter(RETRY_PAUSES_S)
        while True:
            try:
                with _no_garbage_collection():
                    return self._checkpoint(draft, stop, message, begun, commit, settle, reached, notes or {})
            except Refused as refused:  # nothing was copied yet: tracking is as it was
                if insight.prepare():
                    continue
                pause = next(pauses, None)
                if pause is None or not _passes(refused.problems):
                    raise
                time.sleep(pause)
            except BaseException:
                self._forget_tracking()
                raise

    def _checkpoint(
        self,
        draft: Draft,
        stop: bool,
        message: str,
        begun: float,
        commit: bool,
        settle: Callable[[], None],
        reached: Callable[[State, float], None],
        notes: dict[str, Any],
    ) -> dict[str, Any]:
        self._maps.prepare(self.live.pids())
        self._seen = None
        stopped_at = time.monotonic()
        frozen = self._freeze()
        try:
            context = self._context(frozen)
            with self._table(context) as table:
                manifest, views = self._collect(frozen, context, table, track=True)
                if context.problems:
                    raise Refused(context.problems)
                settle()
                with beside(draft.snapshot_volume):
                    copied = self._copy_pages(views)
                    manifest = _with_guards(manifest, copied)
                self._keep_maps(views)
            if not stop:
                self._release(frozen)
            pause = time.monotonic() - stopped_at
            reached(State.CAPTURED, pause)
            written = self._precopied + self._write(manifest, copied, table)
            draft.snapshot_image()
            reached(State.WRITTEN, pause)
            summary = {
                "id": draft.id,
                "pause_ms": round(pause * 1e3, 3),
                "total_ms": round((time.monotonic() - begun) * 1e3, 3),
                "bytes_written": written,
                "processes": len(manifest.processes) + len(manifest.zombies),
                "memory_bytes": sum(n for _, pages_ in copied for _, n in pages_.saved) * PAGE_SIZE,
                **notes,
            }
            if commit:
                draft.commit(message, summary)
                self._note_seen(manifest, frozen)
            summary["total_ms"] = round((time.monotonic() - begun) * 1e3, 3)
            if stop:
                os.kill(self.live.init_pid, signal.SIGKILL)
            return summary
        finally:
            self._release(frozen)

    def _freeze(self) -> Frozen:
        """Stop the pod, with what limits its CPU time out of the way: its tasks run the scripts, and one that
        has used up its share stops and works only when it gets the next."""
        self._limit_cpus(None)
        try:
            return self._freezer.freeze()
        except BaseException:
            self._limit_cpus(self.live.spec.cpus)
            raise

    def _release(self, frozen: Frozen) -> None:
        """Let the pod go on."""
        frozen.release()
        self._limit_cpus(self.live.spec.cpus)

    def _limit_cpus(self, cpus: float | None) -> None:
        if self.live.spec.cpus is not None:
            self.live.cgroup.limit_cpus(cpus)

    def untouched(self) -> bool:
        """Whether no process has come, gone or written private memory since the last checkpoint; False if in doubt.

        What the kernel writes into a thread's rseq(2) area when it is resumed doesn't count. A program can hardly
        do anything without writing to its stack.
        """
        if self._seen is None or self._seen.keys() != set(self.live.pids()):
            return False
        try:
            return not any(
                set(range(first, first + count)) - pages_
                for living, pages_ in self._seen.values()
                for first, count in memory.written(living)
            )
        except OSError:
            return False

    def _note_seen(self, manifest: Manifest, frozen: Frozen) -> None:
        """Remember what `untouched` compares with, where every process is tracked."""
        if all(tracker.uffd >= 0 and tracker.complete for tracker in self._trackers.values()):
            by_pid = {p.pid: p for p in frozen.processes}
            by_space: dict[str, set[int]] = {}
            for p in manifest.processes:
                by_space.setdefault(p.memory.pages, set()).update(_rseq_pages(p))
            self._seen = {
                by_pid[p.place.pid].host_pid: (by_pid[p.place.pid].living, by_space[p.memory.pages])
                for p in manifest.processes
            }

    def recover(self) -> None:
        """Put right what a supervisor that was killed may have left in the pod's tasks and objects.

        Stopping the pod sends tasks home that were left inside a script (they would get there by
        themselves, later); a userfaultfd that was just being made is closed.
        """
        live = self.live
        try:
            pager.await_orphan(live.dirs.run)
        except RestoreFailed:
            os.kill(live.init_pid, signal.SIGKILL)
            raise
        try:
            sockets.recover(live.pids())
            inotify.recover(live.img_dir)
        finally:
            live.cgroup.let_go()
        descriptors.recover(live.img_dir, live.root_fd, live.pids(), _consoles(live).values())
        frozen = self._freeze()
        try:
            collect.close_leftovers(frozen)
        finally:
            self._release(frozen)

    def settle_memory(self) -> None:
        """Wait until all memory of a restored pod is there, and cut it loose from what brought it in.

        Before that no checkpoint can be taken. Raises Refused if the pod can't be stopped just now: it goes on, and
        this is to be tried again. Raises RestoreFailed when its memory can't come: the pod is ended then.
        """
        filling = self.live.filling
        if filling is None:
            return
        try:
            filling.wait()
        except RestoreFailed:
            self._end_filling(filling)
            raise
        frozen = self._freeze()
        try:
            collect.close_leftovers(frozen)
        except BaseException:
            self._end_filling(filling)
            raise
        finally:
            self._release(frozen)
        self.live.filling = None
        filling.settled()

    def _end_filling(self, filling: Filling) -> None:
        """End the pod: there is memory that it can't get."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.live.init_pid, signal.SIGKILL)
        self.live.filling = None
        filling.abandon()

    def tend(self) -> bool:
        """To be called from time to time after the others, as long as it is true: some task is still to be let go."""
        return self._freezer.tend()

    def close(self) -> None:
        """Stop tracking; the pod goes on, or has ended."""
        if self.live.filling is not None:
            self.live.filling.abandon()
            self.live.filling = None
        self._forget_tracking()

    # --- collecting

    def _context(self, frozen: Frozen, *, dry_run: bool = False) -> CollectContext:
        live = self.live
        return CollectContext(
            root_fd=live.root_fd,
            log_path=live.log_path,
            image_dir=live.img_dir,
            processes=frozen.processes,
            consoles=_consoles(live),
            stdio_fds=tuple(-1 if fd is None else fd for ends in live.stdio.values() for fd in ends.pipes),
            clock_offset_ns=live.clock.monotonic_ns,
            dry_run=dry_run,
            external=self._external,
            shown=tuple(os.fsencode(volume.target) for volume in live.spec.volumes),
            on_hold=live.cgroup.hold,
            on_let_go=live.cgroup.let_go,
        )

    @contextlib.contextmanager
    def _table(self, context: CollectContext) -> Iterator[FileTable]:
        """Scope of the supervisor's duplicates: gone before the pod runs on, or a pipe would never see its end."""
        table = FileTable(context, Contents(self.live.img_dir, self._arena))
        try:
            yield table
        finally:
            table.drop_ghosts()
            table.release()

    def _collect(
        self, frozen: Frozen, context: CollectContext, table: FileTable, *, track: bool
    ) -> tuple[Manifest, list[ProcessView]]:
        views = collect.look(frozen, context, self._maps, track=track)
        self._adopt_trackers(views)
        collected = collect.collect_processes(frozen, views, context, table)
        table.hush()
        mounts = collect.collect_tmpfs_mounts(procfs.living_thread(self.live.init_pid), context, table.contents)
        ipc = sysvipc.collect(context, table.contents)
        manifest = Manifest(
            machine=platform.machine(),
            kernel=platform.release(),
            vdso=vdso.digest(),
            xstate_size=max((len(t.xstate) for p in collected.processes for t in p.threads), default=0),
            hostname=self.live.spec.hostname,
            domainname="",
            clock=self._clock(),
            spec=self.live.spec.to_json(),
            processes=tuple(collected.processes),
            zombies=tuple(collected.zombies),
            last_pid=collected.last_pid,
            stdio=tuple(self._stdio_sets(frozen)),
            files=tuple(table.finish()),
            ipc=ipc,
            tmpfs=mounts,
            queues=table.queues.named(),
            nesting=collected.nesting,
        )
        _refuse_what_cannot_grow(manifest, context)
        collect.refuse_what_nesting_forbids(manifest, context)
        return manifest, views

    def _stdio_sets(self, frozen: Frozen) -> Iterator[StdioSet]:
        """How the processes that were started from outside are connected to the supervisor."""
        inner = {p.host_pid: p.pid for p in frozen.processes}
        for name, ends in self.live.stdio.items():
            session = self.live.sessions.get(name)
            pid = 1 if name == INIT else inner.get(session.pid, 0) if session else 0
            yield StdioSet(name, pid, ends.mode, ends.index)

    def _clock(self) -> Clock:
        offsets = self.live.clock
        return Clock(
            time.clock_gettime_ns(time.CLOCK_MONOTONIC) + offsets.monotonic_ns,
            time.clock_gettime_ns(time.CLOCK_BOOTTIME) + offsets.boottime_ns,
            time.time_ns(),
        )

    # --- write tracking

    def _adopt_trackers(self, views: list[ProcessView]) -> None:
        """Keep the userfaultfds of new address spaces; drop those of processes that are gone."""
        self._borrowers = {view.process.pid for view in views if view.borrowed}
        for view in views:
            pid = view.process.pid
            if view.uffd >= 0:
                if pid in self._trackers:
                    self._trackers.pop(pid).close()
                self._trackers[pid] = Tracker(view.uffd)
                view.uffd = -1
        for pid in self._trackers.keys() - {v.process.pid for v in views if not v.borrowed}:
            self._trackers.pop(pid).close()

    def _forget_tracking(self) -> None:
        """After a failure the page files may lack what was written: start over with full comparisons."""
        for tracker in self._trackers.values():
            tracker.close()
        self._trackers.clear()

    def _arm(self, view: ProcessView) -> Tracker:
        """Have all private mappings of an address space tracked."""
        tracker = self._trackers.get(view.process.pid)
        if tracker is None:
            return Tracker(-1)
        for entry in view.entries:
            if memory.is_trackable(entry) and "uw" not in entry.flags:
                try:
                    mm.uffd_register(tracker.uffd, entry.start, entry.end)
                except OSError as error:
                    if error.errno not in (errno.ESRCH, errno.EINVAL, errno.EBUSY, errno.ENOMEM):
                        raise
                    tracker.close()
                    self._trackers.pop(view.process.pid)
                    return Tracker(-1)
                view.rearranged = True
                # what moved here with mremap(2) may bring old marks along (kernels before 6.13)
                tracker.doubtful.append((entry.start // PAGE_SIZE, entry.length // PAGE_SIZE))
        return tracker

    # --- pages

    def _precopy(self) -> None:
        """Save big address spaces that aren't tracked yet while the pod runs; the stop then finds little left.

        Direct I/O marks the pages that it reads into when it begins, and fills them when the device answers: what is
        copied in between is stale, and nothing marks it again. So tracking begins while the pod is stopped, when no
        call is under way, and whatever is marked while it runs is copied at the stop, too. AIO may be under way even
        then: who has that has to wait.
        """
        if self._untracked_bytes() < PRECOPY_BYTES:
            return
        frozen = self._freeze()
        try:
            context = self._context(frozen, dry_run=True)
            views = collect.look(frozen, context, self._maps)
            self._adopt_trackers(views)
            armed = [(v, self._arm(v)) for v in views if not v.borrowed and not any(map(aio.is_ring, v.entries))]
            armed = [(v, t) for v, t in armed if t.uffd >= 0 and not t.complete]
            wanted = [_wanted(memory.scan(v.process.living, v.entries, tracked=True), t) for v, t in armed]
        finally:
            self._release(frozen)
        for (view, tracker), runs in zip(armed, wanted, strict=True):
            tracker.doubtful = []
            self._precopy_one(view, tracker, runs)
            tracker.complete = True
        for _ in range(PRECOPY_ROUNDS - 1):
            if sum(self._precopy_written(view, tracker) for view, tracker in armed) < PRECOPY_BYTES:
                break

    def _untracked_bytes(self) -> int:
        """Private memory of processes whose page files aren't complete."""
        total = 0
        for pid in self.live.pids():
            with contextlib.suppress(OSError, ValueError):
                inner = procfs.pod_id(procfs.status(pid))
                tracker = self._trackers.get(inner)
                if inner not in self._borrowers and (tracker is None or not tracker.complete):
                    text = procfs.status(procfs.living_thread(pid))
                    total += int(text.get("RssAnon", "0 kB").split()[0]) << 10
        return total

    def _precopy_written(self, view: ProcessView, tracker: Tracker) -> int:
        """Copy what was written in a running address space since the last time; bytes copied."""
        try:
            scanned = memory.scan(view.process.living, view.entries, tracked=True)
        except (FileNotFoundError, ProcessLookupError):
            return 0  # it has ended meanwhile
        tracker.doubtful += scanned.written
        return self._precopy_one(view, tracker, merge_runs(scanned.written))

    def _precopy_one(self, view: ProcessView, tracker: Tracker, wanted: list[Run]) -> int:
        """Copy pages of a running address space straight to its page file; bytes copied."""
        living = view.process.living
        mem_fd = os.open(self.live.img_dir / "mem", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        total = 0
        try:
            with PageFile(mem_fd, str(view.process.pid)) as file:
                chunk = memoryview(bytearray(COPY_CHUNK))
                for first, count in _split(wanted, COPY_CHUNK // PAGE_SIZE):
                    total += count * PAGE_SIZE
                    data = chunk[: count * PAGE_SIZE]
                    try:
                        mm.read_ranges(living, [(first * PAGE_SIZE, count * PAGE_SIZE)], data)
                    except OSError:
                        tracker.doubtful.append((first, count))
                        continue
                    file.write_changed(first, data)
                    file.ensure_sums(first, count)
                self._precopied += file.bytes_written
        finally:
            os.close(mem_fd)
        return total

    def _copy_pages(self, views: list[ProcessView]) -> list[tuple[Copied, ScannedPages]]:
        """Copy all pages that the page files don't have into one buffer."""
        todo: list[tuple[ProcessView, Tracker, ScannedPages, list[Run]]] = []
        total = 0
        for view in (view for view in views if not view.borrowed):
            tracker = self._arm(view)
            scanned = memory.scan(view.process.living, view.entries, tracked=tracker.uffd >= 0)
            wanted = _wanted(scanned, tracker)
            total += sum(count for _, count in wanted) * PAGE_SIZE
            todo.append((view, tracker, scanned, wanted))
        buffer = self._room(total)
        position = 0
        result = []
        for view, tracker, scanned, wanted in todo:
            size = sum(count for _, count in wanted) * PAGE_SIZE
            data = buffer[position : position + size]
            ranges = [(first * PAGE_SIZE, count * PAGE_SIZE) for first, count in wanted]
            if ranges:
                mm.read_ranges(view.process.living, ranges, data)
            position += size
            result.append((Copied(str(view.process.pid), tracker, scanned.saved, wanted, data), scanned))
        return result

    def _keep_maps(self, views: list[ProcessView]) -> None:
        for view in views:
            if not (view.rearranged or view.borrowed):
                self._maps.keep(view.process, view.entries)

    def _room(self, size: int) -> memoryview:
        """A buffer that is kept from checkpoint to checkpoint: first-touching memory is slow."""
        if self._buffer is None or len(self._buffer) < size:
            self._buffer = mmap.mmap(-1, max(size, 4 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return memoryview(self._buffer)

    def _shrink(self) -> None:
        """Don't sit on the memory of an unusually big checkpoint."""
        if self._buffer is not None and len(self._buffer) > KEPT_BUFFER:
            self._buffer.madvise(mmap.MADV_DONTNEED)

    # --- writing

    def _write(self, manifest: Manifest, copied: list[tuple[Copied, ScannedPages]], table: FileTable) -> int:
        """Bring the live image directory up to date; returns the bytes written."""
        image_fd = os.open(self.live.img_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        mem_fd = os.open("mem", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=image_fd)
        try:
            written = sum(_write_pages(mem_fd, one) for one, _ in copied)
            table.contents.write(image_fd)
            written += table.contents.changed_bytes
            wanted = {one.name for one, _ in copied}
            for name in os.listdir(mem_fd):
                if name.split(".")[0] not in wanted:
                    pages.remove(mem_fd, name.split(".")[0])
            return written + manifest_file.save(manifest, image_fd)
        finally:
            self._shrink()
            os.close(mem_fd)
            os.close(image_fd)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """It would come while a pod is stopped, sooner or later."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _passes(problems: list[Problem]) -> bool:
    """Whether all of them are states of an instant, gone when it is looked at again."""
    return all(problem.hint == socketcommon.RETRY for problem in problems)


def _consoles(live: LivePod) -> dict[int, int]:
    """The supervisor's pty masters by number."""
    return {ends.index: ends.console for ends in live.stdio.values() if ends.console is not None}


def _write_pages(mem_fd: int, copied: Copied) -> int:
    """Save the copied pages of one address space; returns the bytes written."""
    with PageFile(mem_fd, copied.name) as file:
        old = file.old_map()
        position = 0
        for first, count in copied.written:
            data = copied.data[position : position + count * PAGE_SIZE]
            position += count * PAGE_SIZE
            if copied.tracker.complete:
                file.write(first, data)
            else:
                file.write_changed(first, data)
                file.ensure_sums(first, count)
        file.save_map(copied.saved, old)
        copied.tracker.complete = copied.tracker.uffd >= 0
        copied.tracker.doubtful.clear()
        return file.bytes_written


def _wanted(scanned: ScannedPages, tracker: Tracker) -> list[Run]:
    """What has to be copied: what was written since the page file was last right, and what is in doubt."""
    scanned.saved = merge_runs(scanned.saved)
    if not tracker.complete:
        return scanned.saved
    certain = subtract_runs(scanned.saved, merge_runs(tracker.doubtful))
    return merge_runs([*scanned.written, *subtract_runs(scanned.saved, certain)])


def _refuse_what_cannot_grow(manifest: Manifest, context: CollectContext) -> None:
    """Any tree of processes can be made again, but for some whose processes share tables."""
    if any(clone_flags(p.shared) for p in manifest.processes):
        try:
            plan.plan_image(manifest)
        except RestoreFailed as failed:
            context.refuse(None, "processes that share tables", failed.message)


def _rseq_pages(process: Process) -> set[int]:
    """The pages that the kernel writes to by itself when it resumes a thread."""
    return {
        page
        for thread in process.threads
        for page in range(thread.rseq[0] // PAGE_SIZE, (sum(thread.rseq[:2]) - 1) // PAGE_SIZE + 1)
    }


def _with_guards(manifest: Manifest, copied: list[tuple[Copied, ScannedPages]]) -> Manifest:
    """Add what only the page walk shows: guard pages."""
    guards = {int(one.name): tuple(scanned.guards) for one, scanned in copied if scanned.guards}
    if not guards:
        return manifest
    processes = tuple(
        msgspec.structs.replace(
            p, memory=msgspec.structs.replace(p.memory, guards=guards.get(p.place.pid, ()))
        )
        for p in manifest.processes
    )
    return msgspec.structs.replace(manifest, processes=processes)


def _split(runs: list[Run], limit: int) -> list[Run]:
    """Runs cut into pieces of at most `limit` pages."""
    return [(at, min(limit, first + count - at)) for first, count in runs for at in range(first, first + count, limit)]
