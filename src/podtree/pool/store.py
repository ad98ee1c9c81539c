"""The pool's directories: how pods, checkpoints, drafts and rubbish lie on disk.

    pods/<id>/      vol, img (volumes), spec.json, base, and plain files of the supervisor
    ckpts/<id>/     vol, img (snapshots), meta.json
    drafts/<id>/    one of the two above while it is being made; its maker holds a flock on it
    incoming/       parts of imports that were cut off, by their SHA-256
    trash/<id>/     what is being removed; nobody needs it any more, whoever finds it removes it
    ballast         8 MiB of nothing, given up when the pool is so full that the index can't be written

Things come into being in drafts/ and get to their place by one rename; they leave by one rename into
trash/. So whatever lies in pods/ or ckpts/ is whole, and who dies leaves garbage only where it is
known as such. (drafts/ isn't a part of ckpts/, so that looking for leftovers doesn't cost a walk
over all checkpoints.)
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from podtree.kernel.sys import NR, syscall
from podtree.pool import faults, locks
from podtree.pool.records import CheckpointId, CheckpointMeta, PodId, new_id
from podtree.volume.backend import VolumeBackend

PARTS = ("vol", "img")
BALLAST = 8 << 20  # bytes
_NOT_CARRIED = {"exit.json", "base"}  # plain files of a pod that a rewind doesn't take over
_PART_REST_S = 86400.0
_AT_FDCWD = ctypes.c_ulong(-100 & 0xFFFFFFFFFFFFFFFF).value
_RENAME_EXCHANGE = 2  # linux/fs.h


class DraftDirectory:
    """A directory in drafts/ that belongs to this process until it is closed or the process ends."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    def close(self) -> None:
        """Give up the lock; whatever still lies in drafts/ is garbage then."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Store:
    """The directories of one pool. Knows no index."""

    def __init__(self, root: Path, volumes: VolumeBackend) -> None:
        self.root = root
        self.volumes = volumes
        self.pods = root / "pods"
        self.ckpts = root / "ckpts"
        self.drafts = root / "drafts"
        self.trash = root / "trash"
        self.incoming = root / "incoming"  # made by the first import
        self.ballast = root / "ballast"

    def pod_dir(self, pod: PodId) -> Path:
        return self.pods / pod

    def checkpoint_dir(self, checkpoint: CheckpointId) -> Path:
        return self.ckpts / checkpoint

    def keep_ballast(self) -> None:
        """Set aside some space, for the day when the pool is full and somebody wants to remove things."""
        try:
            fd = os.open(self.ballast, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            return
        try:
            os.posix_fallocate(fd, 0, BALLAST)
        finally:
            os.close(fd)

    def drop_ballast(self) -> None:
        """Make the space free that `keep_ballast` set aside."""
        self.ballast.unlink(missing_ok=True)
        self.volumes.make_durable()

    def new_draft(self, name: str) -> DraftDirectory:
        """Make drafts/<name>, locked."""
        path = self.drafts / name
        while True:
            path.mkdir(mode=0o700)
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                if locks.try_lock(fd) and locks.is_same(fd, str(path)):
                    return DraftDirectory(path, fd)
                os.close(fd)
            path = self.drafts / new_id()  # a cleaner came between mkdir and lock, and took it for a leftover

    def clean_leftovers(self) -> list[str]:
        """Remove drafts whose makers are gone, and the trash. Returns the drafts' names."""
        found = []
        for path in self.strays(self.drafts, set()):
            found.append(path.name)
            self._to_trash(path)
        self.empty_trash()
        return found

    def make_pod(self, pod: PodId, spec: dict[str, object], source: Path | None, base: str) -> DraftDirectory:
        """Make the directory of a pod: empty volumes, or clones of those in `source`.

        In place and durable on return; the lock is still held, until the caller has told the index.
        """
        draft = self.new_draft(pod)
        try:
            self._fill_pod(draft.path, spec, source, base)
            self._install(draft, self.pods / pod)
        except BaseException:
            self.drop(draft)
            raise
        return draft

    def _fill_pod(self, path: Path, spec: dict[str, object], source: Path | None, base: str) -> None:
        for part in PARTS:
            if source is None:
                self.volumes.create(str(path / part))
                os.chmod(path / part, 0o700)
            else:
                self.volumes.clone(str(source / part), str(path / part))
            faults.point(f"pod:{part}")
        if source is None:
            for name in ("upper", "work"):
                (path / "vol" / name).mkdir(mode=0o700 if name == "work" else 0o755)
            (path / "vol" / "log").touch(mode=0o600)
        write_durably(path / "spec.json", msgspec.json.format(msgspec.json.encode(spec), indent=1))
        write_durably(path / "base", base.encode())

    def prepare_reset(self, pod: PodId, source: Path, base: str) -> DraftDirectory:
        """Make a directory for the pod with clones of `source`'s volumes, complete and durable; see `exchange`."""
        draft = self.new_draft(new_id())
        try:
            for part in PARTS:
                self.volumes.clone(str(source / part), str(draft.path / part))
            for entry in os.scandir(self.pods / pod):
                if entry.is_file(follow_symlinks=False) and entry.name not in _NOT_CARRIED:
                    os.link(entry.path, draft.path / entry.name)
            write_durably(draft.path / "base", base.encode())
            self.volumes.make_durable()
            faults.point("reset:ready")
        except BaseException:
            self.drop(draft)
            raise
        return draft

    def exchange(self, draft: DraftDirectory, pod: PodId) -> None:
        """Put what `prepare_reset` made in the place of the pod's, by one exchange of names; durable on return.

        The draft is what the pod had then, and is to be dropped.
        """
        _exchange(draft.path, self.pods / pod)
        faults.point("reset:exchanged")
        self.volumes.make_durable()

    def base_of(self, pod: PodId) -> str:
        """What the pod's volumes were last cloned from ('' when from nothing): see Pool.reset_pod."""
        try:
            return (self.pods / pod / "base").read_text()
        except FileNotFoundError:
            return ""

    def install_checkpoint(self, draft: DraftDirectory, meta: CheckpointMeta) -> None:
        """Move a complete draft to ckpts/; durable on return, the lock is still held."""
        write_durably(draft.path / "meta.json", msgspec.json.format(msgspec.json.encode(meta.sealed()), indent=1))
        faults.point("commit:meta")
        self._install(draft, self.ckpts / meta.id)

    def _install(self, draft: DraftDirectory, place: Path) -> None:
        os.rename(draft.path, place)
        draft.path = place
        faults.point("install:renamed")
        self.volumes.make_durable()
        faults.point("install:durable")

    def drop(self, draft: DraftDirectory) -> None:
        """Remove a draft wherever it has got to, and release it."""
        try:
            if draft.path.exists():
                self.throw_away(draft.path)
        finally:
            draft.close()

    def throw_away(self, path: Path) -> None:
        """Remove a pod's or checkpoint's directory. Missing is fine."""
        try:
            self._remove(self._to_trash(path))
        except FileNotFoundError:
            return

    def _to_trash(self, path: Path) -> Path:
        place = self.trash / f"{path.name}.{new_id()}"
        os.rename(path, place)
        faults.point("trash:renamed")
        return place

    def empty_trash(self) -> int:
        """Remove what lies in trash/; returns how many things that were."""
        entries = list(os.scandir(self.trash))
        for entry in entries:
            self._remove(Path(entry.path))
        return len(entries)

    def _remove(self, path: Path) -> None:
        try:
            for entry in list(os.scandir(path)):
                if self.volumes.exists(entry.path):
                    self.volumes.destroy(entry.path)
                    faults.point("trash:destroyed")
                elif entry.is_dir(follow_symlinks=False):
                    import shutil

                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
            os.rmdir(path)
        except FileNotFoundError:
            pass  # another process removes it too

    def stale_parts(self, now: float) -> Iterator[Path]:
        """Parts of imports that nobody has gone on with for a day. `now`: time.time()."""
        with contextlib.suppress(FileNotFoundError):
            for entry in list(os.scandir(self.incoming)):
                if now - entry.stat(follow_symlinks=False).st_mtime > _PART_REST_S:
                    yield Path(entry.path)

    def strays(self, kind: Path, known: set[str]) -> Iterator[Path]:
        """Directories in pods/, ckpts/ or drafts/ that aren't `known` and that nobody is making."""
        for entry in list(os.scandir(kind)):
            if entry.name not in known:
                with _lock_if_free(entry.path) as free:
                    if free:
                        yield Path(entry.path)

    def meta(self, checkpoint: CheckpointId) -> CheckpointMeta:
        """A checkpoint's meta.json. Raises OSError, or ValueError when it isn't what was written."""
        raw = (self.ckpts / checkpoint / "meta.json").read_bytes()
        meta = msgspec.json.decode(raw, type=CheckpointMeta)
        if not meta.is_whole():
            raise ValueError("checksum is wrong")
        return meta


class _lock_if_free:
    """Scope in which a directory is locked; entered with False if it is somebody's, or gone."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1

    def __enter__(self) -> bool:
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        return locks.try_lock(self._fd) and locks.is_same(self._fd, self._path)

    def __exit__(self, *_exc: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def _exchange(one: Path, other: Path) -> None:
    syscall(
        NR.renameat2,
        _AT_FDCWD,
        os.fsencode(one) + b"\0",
        _AT_FDCWD,
        os.fsencode(other) + b"\0",
        _RENAME_EXCHANGE,
    )


def write_durably(path: Path, content: bytes) -> None:
    """Write a small new file, mode 0600, and wait for it to be on disk."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)
