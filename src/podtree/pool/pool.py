"""The pool: pods, checkpoints and tags, and everything that makes, finds or removes them.

Processes are no concern of this module: whoever calls it has ended or frozen them where that is asked for.
Disk layout: podtree/pool/store.py; place and mount: home.py; index: index.py; what may go: retention.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from podtree.errors import Conflict, Damaged, NotFound, PodtreeError
from podtree.pool import faults, home, lookup, names, pending, refs, retention, rows
from podtree.pool.draft import Draft
from podtree.pool.index import Index
from podtree.pool.liveness import boot_id, start_time
from podtree.pool.locks import acquire
from podtree.pool.newpod import NewPod
from podtree.pool.pending import Pending
from podtree.pool.records import (
    CheckpointId,
    CheckpointMeta,
    CheckpointRecord,
    Moment,
    PodId,
    PodRecord,
    PodState,
    new_id,
)
from podtree.pool.reset import Reset, base_token
from podtree.pool.retention import Removed
from podtree.pool.store import Store
from podtree.volume.backend import VolumeBackend
from podtree.volume.btrfs import BtrfsVolumes

LOCK_SECONDS = 60.0  # how long to wait for another command that works on the same pod
_LEAST_FREE = 256 * home.MIB
_ROOT_REST_S = 3600.0  # how long an unpacked root may be there before a pod has it, or be unpacked
_SPARE = 64 * home.MIB
_INDEX_ROOM = 2 * home.MIB


class GcReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a collection removed (or would remove), and the bytes that got free by it."""

    checkpoints: tuple[CheckpointId, ...] = ()
    leftovers: tuple[str, ...] = ()  # directories that killed commands left
    bytes_freed: int = 0
    finished: bool = True  # False: the file system is still freeing


class PoolInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Where a pool is and how much room it has, in bytes."""

    home: str
    backend: str
    size: int
    used: int
    free: int
    file: str | None  # None where PODTREE_HOME lies on btrfs
    file_allocated: int | None
    growable: int | None
    pods: int
    checkpoints: int


class Pool:
    """One pool, opened. Cheap to open; may be used after fork (each process gets its own connection)."""

    def __init__(self, home_dir: Path, volumes: VolumeBackend) -> None:
        self.home = home_dir
        self.root = home_dir / "pool"
        self.store = Store(self.root, volumes)
        self.index = Index(str(self.root / "index.sqlite"), self._room_for_index)
        self._locks: dict[PodId, tuple[int, int, int]] = {}  # pod: (owner's pid, descriptor, depth)

    @classmethod
    def open(cls, home_dir: Path | None = None, *, initial_size: int | None = None) -> Pool:
        """Open the pool in `home_dir` (PODTREE_HOME by default), making and mounting it where that is needed.

        `initial_size` is that of a new pool's file, in bytes; by default half of what the disk has free,
        64 GiB at most. Raises Unsupported without root or mkfs.btrfs, PodtreeError on a full disk.
        """
        where = (home_dir or home.default_home()).absolute()
        root = home.prepare(where, initial_size)
        return cls(where, BtrfsVolumes(str(root)))

    def close(self) -> None:
        """Let go of the index. The pool stays mounted."""
        self.index.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @staticmethod
    def close_home(home_dir: Path) -> bool:
        """Unmount the pool in `home_dir` and free its loop device; False if it wasn't mounted.

        Raises Conflict while something uses it. Open Pools of it must be closed before.
        """
        return home.unmount(home_dir.absolute())

    # Places

    def pod_dir(self, pod: PodId) -> Path:
        """pods/<id>: vol, img and plain files."""
        return self.store.pod_dir(pod)

    def vol_dir(self, pod: PodId) -> Path:
        """The pod's volume: upper, work, log."""
        return self.store.pod_dir(pod) / "vol"

    def img_dir(self, pod: PodId) -> Path:
        """The pod's live image directory."""
        return self.store.pod_dir(pod) / "img"

    def checkpoint_dir(self, checkpoint: CheckpointId) -> Path:
        """ckpts/<id>: vol, img (read-only), meta.json."""
        return self.store.checkpoint_dir(checkpoint)

    def run_dir(self, pod: PodId) -> Path:
        """$HOME/run/<id>, made if missing: sockets and such; nobody but the pod's supervisor uses it."""
        path = self.home / "run" / pod
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    # Locks and room

    @contextmanager
    def lock_pod(self, pod: PodId, timeout: float | None = LOCK_SECONDS) -> Iterator[None]:
        """Scope in which no other process checkpoints, rewinds or removes the pod.

        May be entered again by the process that holds it. Only the process that does the work may
        take it: not a command that asks the supervisor to. Raises Conflict after `timeout` seconds.
        """
        self._take_lock(pod, timeout)
        try:
            yield
        finally:
            self._drop_lock(pod)

    def inherit_lock(self, pod: PodId, fd: int) -> None:
        """The pod's lock was taken by the process that forked this one, which has it as `fd`; see `release_lock`."""
        self._locks[pod] = (os.getpid(), fd, 1)

    def release_lock(self, pod: PodId) -> None:
        """Let go of a lock got by `inherit_lock`."""
        self._drop_lock(pod)

    def _take_lock(self, pod: PodId, timeout: float | None) -> None:
        owner, fd, depth = self._locks.get(pod, (0, -1, 0))
        if owner != os.getpid():
            fd, depth = acquire(str(self.home / "locks" / pod), timeout=timeout, what=f"pod {pod}"), 0
        self._locks[pod] = (os.getpid(), fd, depth + 1)

    def _drop_lock(self, pod: PodId) -> None:
        owner, fd, depth = self._locks.pop(pod)
        if depth > 1:
            self._locks[pod] = (owner, fd, depth - 1)
        else:
            os.close(fd)

    def make_room(self, needed: int = 0) -> None:
        """See that the pool can take `needed` more bytes, growing its file while the disk allows.

        Raises PodtreeError when it can't. It also refuses while the disk under the file is nearly
        full: btrfs survives having no room, but not a write that fails.
        """
        space = self.store.volumes.space()
        if space.free < max(_LEAST_FREE, 2 * needed, space.size // 4):
            home.grow(self.home, max(space.size, 4 * needed, home.GIB))
            space = self.store.volumes.space()
        below = home.disk_free(self.home)
        if space.free > 2 * _SPARE:
            self.store.keep_ballast()
        if min(space.free, below) < needed + _SPARE:
            raise PodtreeError(
                f"no room: {needed // home.MIB} MiB are needed, the pool has {space.free // home.MIB} MiB free, "
                f"the disk under {self.home} {below // home.MIB} MiB",
                "podtree discard what isn't needed, then podtree gc; or free space on the disk",
            )

    def _room_for_index(self) -> None:
        """Removing things must work in a full pool too: grow it, or give up the ballast."""
        if self.store.volumes.space().free < _INDEX_ROOM:
            home.grow(self.home, home.GIB)
            if self.store.volumes.space().free < _INDEX_ROOM:
                self.store.drop_ballast()

    def info(self) -> PoolInfo:
        """Place, room and contents."""
        space = self.store.volumes.space()
        file = home.pool_file(self.home)
        count = self.index.rows(
            "SELECT (SELECT count(*) FROM pods WHERE NOT removed), (SELECT count(*) FROM checkpoints)"
        )[0]
        return PoolInfo(
            home=str(self.home),
            backend=self.store.volumes.name,
            size=space.size,
            used=space.used,
            free=space.free,
            file=file.path if file else None,
            file_allocated=file.allocated if file else None,
            growable=file.growable if file else None,
            pods=count[0],
            checkpoints=count[1],
        )

    # Pods

    def create_pod(self, name: str | None, spec: dict[str, Any]) -> PodRecord:
        """A new pod with an empty volume and image. Raises Conflict when the name is taken, UsageError if bad."""
        if name is not None:
            self.check_free(refs.check_name(name, "pod"))
        invented = names.candidates()
        return self._begin_pod(PodId(new_id()), spec, None, lambda: next(invented)).publish(name)

    def free_name(self) -> str:
        """A name that no pod or tag has now."""
        for name in names.candidates():
            with contextlib.suppress(Conflict):
                self.check_free(name)
                return name
        raise AssertionError("candidates() never ends")

    def clone_pod(self, ck: CheckpointId, name: str | None) -> PodRecord:
        """A new pod that starts as the checkpoint, as `begin_branch` makes it; it doesn't run."""
        if name is not None:
            self.check_free(refs.check_name(name, "pod"))
        return self.begin_branch(ck, PodId(new_id())).publish(name)

    def begin_branch(self, ck: CheckpointId, pod: PodId) -> NewPod:
        """Make pod `pod`, which starts as the checkpoint: writable copies of its volume and image, its pod's spec.

        If it isn't given a name it is called after the checkpoint's pod: web-1, web-2... Raises NotFound, Damaged.
        """
        record = self.checkpoint(ck)
        count = iter(range(1, 1 << 30))
        stem = record.pod_name[:50]
        return self._begin_pod(pod, self.spec_of(ck), ck, lambda: f"{stem}-{next(count)}")

    def spec_of(self, ck: CheckpointId) -> dict[str, Any]:
        """The spec of the pod that the checkpoint is of. Raises Damaged."""
        try:
            return self.store.meta(ck).spec
        except (OSError, ValueError) as error:
            raise Damaged(f"checkpoint {ck}: meta.json can't be read: {error}", "podtree fsck") from None

    def _begin_pod(
        self, pod: PodId, spec: dict[str, Any], source: CheckpointId | None, invent: Callable[[], str]
    ) -> NewPod:
        self.make_room()
        directory = None if source is None else self.store.checkpoint_dir(source)
        try:
            draft = self.store.make_pod(pod, spec, directory, base_token(source))
        except FileNotFoundError as error:
            raise Damaged(f"checkpoint {source} is incomplete: {error.filename}", "podtree fsck") from None
        return NewPod(self, pod, spec, source, invent, draft)

    def has_pod(self, pod: PodId) -> bool:
        """Whether the index knows it, removed or not."""
        return self.index.row("SELECT 1 FROM pods WHERE id = ?", pod) is not None

    def check_free(self, name: str) -> None:
        """Raise Conflict when a pod or a tag of that name exists."""
        if self.index.row("SELECT 1 FROM pods WHERE name = ? AND NOT removed", name):
            raise Conflict(f"there is a pod {name} already", f"podtree rm {name}, or take another name")
        if self.index.row("SELECT 1 FROM tags WHERE name = ?", name):
            raise Conflict(f"there is a tag {name} already", "take another name")

    def pod(self, ref: str) -> PodRecord:
        """The pod of that name, id or unique beginning of an id. Raises NotFound."""
        return rows.pod(lookup.pod_row(self.index, ref))

    def pod_or_removed(self, ref: str) -> PodRecord:
        """As `pod`, also for a removed pod of which there still are checkpoints."""
        return rows.pod(lookup.pod_row(self.index, ref, removed=True))

    def _pod_by_id(self, pod: PodId) -> PodRecord:
        row = self.index.row("SELECT * FROM pods WHERE id = ?", pod)
        if row is None:
            raise NotFound(f"there is no pod {pod}")
        return rows.pod(row)

    def pods(self, *, removed: bool = False) -> list[PodRecord]:
        """All pods, oldest first; with `removed` also those of which only checkpoints are left."""
        query = "SELECT * FROM pods WHERE removed <= ? ORDER BY created_ns, id"
        return [rows.pod(row) for row in self.index.rows(query, int(removed))]

    def set_pod_state(
        self,
        pod: PodId,
        state: PodState,
        *,
        init_pid: int | None = None,
        monitor_pid: int | None = None,
        exit_code: int | None = None,
    ) -> PodRecord:
        """Note where the pod is in its life; durable on return.

        With RUNNING go `init_pid`, the host's number of the pod's first process, and `monitor_pid`, of
        the process that will note its end: a running pod of which both are gone shows as lost.
        """
        running = state is PodState.RUNNING
        ended = time.time_ns() if state in (PodState.EXITED, PodState.STOPPED) else None
        values = (
            state.value, init_pid, init_pid and start_time(init_pid), monitor_pid,
            monitor_pid and start_time(monitor_pid), boot_id() if running else None, exit_code, ended, pod,
        )  # fmt: skip
        with self.index.transaction() as connection:
            connection.execute(
                "UPDATE pods SET state = ?, init_pid = ?, init_start = ?, monitor_pid = ?, monitor_start = ?, "
                "boot_id = ?, exit_code = ?, ended_ns = ? WHERE id = ?",
                values,
            )
        return self._pod_by_id(pod)

    def rename_pod(self, pod: PodId, name: str) -> PodRecord:
        """Give the pod another name. Raises Conflict when it is taken."""
        self.check_free(refs.check_name(name, "pod"))
        with self.index.transaction() as connection:
            try:
                connection.execute("UPDATE pods SET name = ? WHERE id = ?", (name, pod))
            except sqlite3.IntegrityError:
                raise Conflict(f"there is a pod {name} already") from None
        return self._pod_by_id(pod)

    def begin_reset(self, pod: PodId, ck: CheckpointId) -> Reset:
        """Start a rewind of the pod to a checkpoint of its past; see Reset.

        Raises NotFound, UsageError for another pod's checkpoint, Damaged.
        """
        self.checkpoint(ck)
        return Reset(self, pod, ck)

    def reset_pod(self, pod: PodId, ck: CheckpointId) -> None:
        """A rewind in one go. The pod's processes must be gone."""
        with self.lock_pod(pod), self.begin_reset(pod, ck) as reset:
            reset.commit()

    def _settle_reset(self, pod: PodId) -> None:
        """Tell the index of a rewind whose process died between the exchange and its own telling."""
        base = self.store.base_of(pod)
        row = self.index.row("SELECT base FROM pods WHERE id = ?", pod)
        if row is None or row["base"] == base:
            return
        source = base.partition(" ")[0] or None
        with self.index.transaction() as connection:
            known = connection.execute("SELECT id FROM checkpoints WHERE id = ?", (source,)).fetchone()
            connection.execute(
                "UPDATE pods SET head = ?, base = ? WHERE id = ?", (known and known[0], base, pod)
            )

    def remove_pod(self, pod: PodId) -> Removed:
        """Remove an ended pod, its volume, and its checkpoints but those that others need (see retention).

        Raises Conflict while it runs.
        """
        with self.lock_pod(pod):
            record = self._pod_by_id(pod)
            if record.is_running:
                raise Conflict(f"pod {record.name} is running", f"podtree stop {record.name}, or rm --force")
            with self.index.transaction() as connection:
                removed = retention.remove_pod(connection, pod)
            faults.point("remove:indexed")
            self._remove_directories(removed)
            self.forget_runtime(pod)
        return removed

    def commit_pod(self, winner: PodId, origin: PodId, *, force: bool = False) -> PodRecord:
        """`winner` takes the name and the history of `origin`, which is removed.

        origin@N keeps meaning what it meant; the winner's own checkpoints are numbered on after them.
        Raises Conflict if `origin` runs, or if `winner` wasn't branched from it (unless `force`).
        """
        if winner == origin:
            raise Conflict("a pod can't take its own place")
        first, second = sorted((winner, origin))  # everybody takes them in the same order
        with self.lock_pod(first), self.lock_pod(second):
            taken, taker = self._pod_by_id(origin), self._pod_by_id(winner)
            if taken.is_running:
                raise Conflict(f"pod {taken.name} is running", f"podtree stop {taken.name}")
            with self.index.transaction() as connection:
                if not force and not retention.descends(connection, winner, origin):
                    raise Conflict(f"pod {taker.name} was not branched from {taken.name}")
                retention.replace_pod(connection, winner, origin)
            self.store.throw_away(self.store.pod_dir(origin))
            self.forget_runtime(origin)
        return self._pod_by_id(winner)

    def forget_runtime(self, pod: PodId) -> None:
        """Remove what lies outside of the pool for a pod that there is no more. Its lock must be held."""
        import shutil

        shutil.rmtree(self.home / "run" / pod, ignore_errors=True)
        (self.home / "locks" / pod).unlink(missing_ok=True)

    # Checkpoints

    def begin_checkpoint(self, pod: PodId, patience_s: float = LOCK_SECONDS) -> Draft:
        """Start a checkpoint of the pod; see Draft. Takes the pod's lock until it is committed or aborted.

        Raises Conflict while another checkpoint of the pod is being made, PodtreeError without room.
        """
        if self._locks.get(pod, (0,))[0] == os.getpid():
            raise Conflict(f"pod {pod} is being checkpointed or rewound by this process")
        self._take_lock(pod, patience_s)
        try:
            self.make_room()
            self.store.clean_leftovers()
            self._settle_reset(pod)
            directory = self.store.new_draft(new_id())
            try:
                return Draft(self, self._pod_by_id(pod), directory, lambda: self._drop_lock(pod))
            except BaseException:
                self.store.drop(directory)
                raise
        except BaseException:
            self._drop_lock(pod)
            raise

    def next_number(self, pod: PodId) -> int:
        """The number that the pod's next checkpoint gets; its lock must be held."""
        row = self.index.row("SELECT next_number FROM pods WHERE id = ?", pod)
        if row is None:
            raise NotFound(f"pod {pod} was removed meanwhile")
        return int(row[0])

    def add_checkpoint(self, meta: CheckpointMeta) -> CheckpointRecord:
        """Put a checkpoint whose directory is in place and durable into the index (for Draft)."""
        with self.index.transaction() as connection:
            parent = meta.parent  # read when the draft was begun: it may have been discarded since
            if parent and not connection.execute("SELECT 1 FROM checkpoints WHERE id = ?", (parent,)).fetchone():
                parent = connection.execute("SELECT head FROM pods WHERE id = ?", (meta.pod,)).fetchone()[0]
            connection.execute(
                "INSERT INTO checkpoints (id, pod, number, parent, time_ns, message, summary) VALUES (?,?,?,?,?,?,?)",
                (meta.id, meta.pod, meta.number, parent, meta.time_ns, meta.message, rows.as_json(meta.summary)),
            )
            connection.execute(
                "UPDATE pods SET head = ?, next_number = ? WHERE id = ?", (meta.id, meta.number + 1, meta.pod)
            )
            faults.point("commit:transaction")
        return self.checkpoint(meta.id)

    def has_checkpoint(self, checkpoint: CheckpointId) -> bool:
        """Whether the index knows it."""
        return self.index.row("SELECT 1 FROM checkpoints WHERE id = ?", checkpoint) is not None

    def checkpoint(self, checkpoint: CheckpointId) -> CheckpointRecord:
        """The record of an id. Raises NotFound."""
        row = self.index.row(rows.CHECKPOINTS + "WHERE c.id = ?", checkpoint)
        if row is None:
            raise NotFound(f"there is no checkpoint {checkpoint}", "podtree log")
        return rows.checkpoint(row)

    def checkpoints(self, pod: PodId | None = None) -> list[CheckpointRecord]:
        """All checkpoints, or those a pod took itself, oldest first."""
        where = "" if pod is None else "WHERE c.pod = ?"
        args = () if pod is None else (pod,)
        found = self.index.rows(f"{rows.CHECKPOINTS} {where} ORDER BY c.time_ns, c.number", *args)
        return [rows.checkpoint(row) for row in found]

    def resolve(self, ref: str) -> CheckpointRecord:
        """The checkpoint that a reference means (grammar: podtree/pool/refs.py). Raises NotFound, UsageError."""
        return self.checkpoint(lookup.checkpoint_id(self.index, ref))

    def tag(self, name: str, ck: CheckpointId, *, force: bool = False) -> None:
        """Name a checkpoint, which keeps it. Raises Conflict if the name is taken; `force` moves a tag."""
        refs.check_name(name, "tag")
        with self.index.transaction() as connection:
            if connection.execute("SELECT 1 FROM pods WHERE name = ? AND NOT removed", (name,)).fetchone():
                raise Conflict(f"there is a pod {name} already", "take another name for the tag")
            verb = "INSERT OR REPLACE" if force else "INSERT"
            try:
                connection.execute(f"{verb} INTO tags VALUES (?, ?, ?)", (name, ck, time.time_ns()))
            except sqlite3.IntegrityError as error:
                if "FOREIGN KEY" in str(error):
                    raise NotFound(f"there is no checkpoint {ck}") from None
                raise Conflict(f"there is a tag {name} already", "--force moves it") from None

    def tags(self) -> dict[str, CheckpointId]:
        """All tags, by name."""
        return {row[0]: CheckpointId(row[1]) for row in self.index.rows("SELECT name, checkpoint FROM tags ORDER BY 1")}

    def untag(self, name: str) -> None:
        """Take a tag away; the checkpoint stays until a gc, rm or discard finds that nothing needs it."""
        row = self.index.row("SELECT name FROM tags WHERE name = ?", name)
        with self.index.transaction() as connection:
            if row is None or connection.execute("DELETE FROM tags WHERE name = ?", (name,)).rowcount == 0:
                raise NotFound(f"there is no tag {name}", "podtree tag lists them")

    def children(self, ck: CheckpointId) -> tuple[list[CheckpointRecord], list[PodRecord]]:
        """What was made from the checkpoint: the checkpoints after it, the pods branched from it."""
        found = self.index.rows(f"{rows.CHECKPOINTS} WHERE c.parent = ? ORDER BY c.time_ns", ck)
        pods = self.index.rows("SELECT * FROM pods WHERE parent = ? AND NOT removed ORDER BY created_ns", ck)
        return [rows.checkpoint(row) for row in found], [rows.pod(row) for row in pods]

    def all_pending(self, pod: PodId | None = None) -> list[Pending]:
        """Checkpoints of which somebody was told, and that aren't durable: of all pods that are there, or of one."""
        pods = [record.id for record in self.pods()] if pod is None else [pod]
        notes = [note for one in pods for note in pending.read(self.store.pod_dir(one))]
        return [note for note in notes if note.told and not self.has_checkpoint(note.id)]

    def pending(self, ref: str) -> Pending | None:
        """The one of them whose id begins so."""
        found = [note for note in self.all_pending() if len(ref) >= 3 and note.id.startswith(ref)]
        return found[0] if len(found) == 1 else None

    # Removal

    def discard(self, what: CheckpointRecord | PodRecord) -> Removed:
        """Remove a checkpoint, or an ended pod with what only it used.

        What descends from a discarded checkpoint descends from its parent then. Raises Conflict for
        a tagged checkpoint and a running pod.
        """
        if isinstance(what, PodRecord):
            return self.remove_pod(what.id)
        with self.index.transaction() as connection:
            removed = retention.remove_checkpoint(connection, what.id)
        faults.point("remove:indexed")
        self._remove_directories(removed)
        return removed

    def recorded(self, pod: PodId) -> list[Moment]:
        """The pod's recorded checkpoints that nobody has tagged or branched from."""
        found = self.index.rows(
            "SELECT time_ns, id, CAST(json_extract(summary, '$.bytes_written') AS INTEGER), "
            "json_extract(summary, '$.marked_before'), json_extract(summary, '$.mark') IS NOT NULL "
            "FROM checkpoints c WHERE pod = ? AND json_extract(summary, '$.recorded') "
            "AND id NOT IN (SELECT checkpoint FROM tags) "
            "AND id NOT IN (SELECT parent FROM pods WHERE NOT removed AND parent IS NOT NULL)",
            pod,
        )
        return [
            Moment(row[0], CheckpointId(row[1]), row[2] or 0, row[3] and CheckpointId(row[3]), bool(row[4]))
            for row in found
        ]

    def thin(self, checkpoints: Iterable[CheckpointId]) -> Removed:
        """Remove those of the checkpoints that nobody has tagged meanwhile; their descendants stay."""
        with self.index.transaction() as connection:
            tagged = {row[0] for row in connection.execute("SELECT checkpoint FROM tags")}
            gone = [one for one in checkpoints if one not in tagged]
            for one in gone:
                retention.remove_checkpoint(connection, one)
        removed = Removed(checkpoints=tuple(gone))
        self._remove_directories(removed)
        return removed

    def _remove_directories(self, removed: Removed) -> None:
        for pod in removed.pods:
            self.store.throw_away(self.store.pod_dir(pod))
        for checkpoint in removed.checkpoints:
            self.store.throw_away(self.store.checkpoint_dir(checkpoint))

    def gc(self, *, dry_run: bool = False, timeout: float = 60.0) -> GcReport:
        """Remove what nothing needs: leftovers of killed commands, checkpoints of removed pods that no
        tag, pod or branch descends from. Waits up to `timeout` seconds for the space to be free.
        """
        before = self.store.volumes.space().used
        if dry_run:
            with self.index.snapshot() as connection:
                gone = retention.unneeded(connection)
            return GcReport(checkpoints=gone, leftovers=tuple(self._leftovers()))
        with self.index.transaction() as connection:
            gone = retention.remove_unneeded(connection)
        self._remove_directories(Removed(checkpoints=gone))
        leftovers = self.store.clean_leftovers()
        for path in itertools.chain(self.strays(), self._unused_roots()):  # locked while they are at hand
            leftovers.append(path.name)
            self.store.throw_away(path)
        for path in self.store.stale_parts(time.time()):
            leftovers.append(path.name)
            path.unlink(missing_ok=True)
        for pod in self.pods():
            with contextlib.suppress(Conflict, OSError), self.lock_pod(pod.id, 0):
                pending.forget_lost(self.pod_dir(pod.id))
        self._forget_old_runtimes()
        finished = self.store.volumes.wait_destroyed(timeout)
        home.give_back(self.home)
        freed = max(0, before - self.store.volumes.space().used)
        with contextlib.suppress(PodtreeError):
            self.make_room()
        return GcReport(checkpoints=gone, leftovers=tuple(leftovers), bytes_freed=freed, finished=finished)

    def _leftovers(self) -> Iterator[str]:
        parts = self.store.stale_parts(time.time())
        for paths in (self.strays(), self._unused_roots(), self.store.strays(self.store.drafts, set()), parts):
            yield from (path.name for path in paths)

    def _unused_roots(self) -> Iterator[Path]:
        """What tar files were unpacked to (podtree.pod.rootfs) that no pod names: also none with checkpoints left.

        Nobody takes one of them again while it is yielded. What is being unpacked may have any time from the archive.
        """
        with contextlib.suppress(FileNotFoundError), _locked(self.root / "rootfs"):
            specs = [json.loads(row[0]) for row in self.index.rows("SELECT spec FROM pods")]
            named = {os.path.basename(spec.get("rootfs") or "") for spec in specs}
            for entry in list(os.scandir(self.root / "rootfs")):
                stat = entry.stat(follow_symlinks=False)
                since = stat.st_ctime if entry.name.startswith(".") else stat.st_mtime
                if entry.name not in named and time.time() - since > _ROOT_REST_S:
                    yield Path(entry.path)

    def strays(self) -> Iterator[Path]:
        """Directories in pods/ and ckpts/ that the index doesn't know and nobody is making; locked while yielded."""
        for kind, table in ((self.store.pods, "pods"), (self.store.ckpts, "checkpoints")):
            known = {row[0] for row in self.index.rows(f"SELECT id FROM {table}")}
            for path in self.store.strays(kind, known):
                # Asked again under the lock: it may have got its row since.
                if self.index.row(f"SELECT 1 FROM {table} WHERE id = ?", path.name) is None:
                    yield path

    def _forget_old_runtimes(self) -> None:
        known = {row[0] for row in self.index.rows("SELECT id FROM pods WHERE NOT removed")}
        for entry in os.scandir(self.home / "run"):
            if len(entry.name) == 12 and entry.name not in known:
                with contextlib.suppress(Conflict), self.lock_pod(PodId(entry.name), 0):  # else it is being made
                    self.forget_runtime(PodId(entry.name))


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Scope of an exclusive flock(2) on a directory; raises FileNotFoundError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
