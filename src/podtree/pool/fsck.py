"""Verification of a pool: every checkpoint's files and checksums, and the index against the disk.

Reports, repairs nothing. Whatever it meets, it goes on with the rest.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from podtree.errors import PodtreeError
from podtree.pool import verify
from podtree.pool.pool import Pool
from podtree.pool.records import CheckpointRecord
from podtree.pool.store import PARTS


class Damage(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong: whose (a checkpoint's id, 'pod ID', 'index'...), which file, what."""

    where: str
    ref: str = ""  # pod@number
    file: str = ""
    what: str

    def __str__(self) -> str:
        ref = f" ({self.ref})" if self.ref else ""
        return f"{self.where}{ref}: " + (f"{self.file}: " if self.file else "") + self.what


class FsckReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was looked at and what is wrong."""

    checkpoints: int
    files: int
    bytes: int
    damage: tuple[Damage, ...]
    garbage: tuple[str, ...] = ()  # harmless leftovers that `gc` removes


class _Tally:
    files = 0
    bytes = 0


def fsck(
    pool: Pool,
    only: list[CheckpointRecord] | None = None,
    progress: Callable[[CheckpointRecord], None] | None = None,
) -> FsckReport:
    """Verify the whole pool, or just the given checkpoints. `progress` is called before each one."""
    damage: list[Damage] = []
    garbage: list[str] = []
    tally = _Tally()
    if only is None:
        damage += [Damage(where="index", what=text) for text in pool.index.check()]
    try:
        checkpoints = pool.checkpoints() if only is None else only
        if only is None:
            damage += _check_pods(pool)
            garbage += [f"{path.parent.name}/{path.name}" for path in pool.strays()]
            garbage += [f"drafts/{path.name}" for path in pool.store.strays(pool.store.drafts, set())]
            garbage += [f"trash/{entry.name}" for entry in os.scandir(pool.store.trash)]
    except (PodtreeError, OSError, ValueError) as error:
        damage.append(Damage(where="index", what=str(error)))
        checkpoints = []
    for record in checkpoints:
        if progress is not None:
            progress(record)
        for file, what in _check_checkpoint(pool, record, tally):
            damage.append(Damage(where=record.id, ref=record.ref, file=file, what=what))
    return FsckReport(
        checkpoints=len(checkpoints),
        files=tally.files,
        bytes=tally.bytes,
        damage=tuple(damage),
        garbage=tuple(garbage),
    )


def _check_pods(pool: Pool) -> Iterator[Damage]:
    for pod in pool.pods():
        for part in PARTS:
            path = pool.pod_dir(pod.id) / part
            if not pool.store.volumes.exists(str(path)):
                yield Damage(where=f"pod {pod.id}", ref=pod.name, file=part, what="is missing")


def _check_checkpoint(pool: Pool, record: CheckpointRecord, tally: _Tally) -> Iterator[tuple[str, str]]:
    top = pool.checkpoint_dir(record.id)
    if not top.is_dir():
        yield "", "its directory is missing (podtree discard takes it out of the log)"
        return
    yield from _check_meta(pool, record)
    for part in PARTS:
        path = str(top / part)
        try:
            if not pool.store.volumes.exists(path):
                yield part, "is missing, or is no volume"
                continue
            if not pool.store.volumes.is_snapshot(path):
                yield part, "can be written to, it may have been changed"
        except OSError as error:
            yield part, os.strerror(error.errno or 0)
            continue
        yield from (_check_image if part == "img" else _check_volume)(top, tally)


def _check_meta(pool: Pool, record: CheckpointRecord) -> Iterator[tuple[str, str]]:
    try:
        meta = pool.store.meta(record.id)
    except OSError as error:
        yield "meta.json", os.strerror(error.errno or 0)
    except (msgspec.MsgspecError, ValueError) as error:
        yield "meta.json", f"can't be read: {error}"
    else:
        if (meta.id, meta.time_ns) != (record.id, record.time_ns):
            yield "meta.json", "tells of another checkpoint than the index"


def _files(top: Path, tally: _Tally) -> Iterator[tuple[str, str | None]]:
    """(path relative to `top`, what is wrong) of every regular file; an unreadable directory comes as itself."""
    failed: list[OSError] = []
    for directory, names, files in os.walk(top, onerror=failed.append):
        names.sort()
        for name in sorted(files):
            path = os.path.join(directory, name)
            try:
                info = os.lstat(path)
            except OSError as error:
                yield os.path.relpath(path, top), os.strerror(error.errno or 0)
                continue
            if stat.S_ISREG(info.st_mode):
                tally.files += 1
                tally.bytes += info.st_blocks * 512
                yield os.path.relpath(path, top), None
    for unread in failed:
        yield os.path.relpath(str(unread.filename), top), os.strerror(unread.errno or 0)


def _check_volume(top: Path, tally: _Tally) -> Iterator[tuple[str, str]]:
    for name, wrong in _files(top / "vol", tally):
        for what in [wrong] if wrong else verify.read_through(top / "vol" / name):
            yield f"vol/{name}", what


def _check_image(top: Path, tally: _Tally) -> Iterator[tuple[str, str]]:
    image = top / "img"
    if not (image / "manifest").is_file():
        yield "img/manifest", "is missing"
    for name, wrong in _files(image, tally):
        for what in [wrong] if wrong else _check_image_file(image, name):
            yield f"img/{name}", what


def _check_image_file(image: Path, name: str) -> list[str]:
    if name == "manifest":
        return verify.verify_manifest(image / name)
    stem, dot, kind = name.rpartition(".")
    if dot and kind in ("map", "sum") and name.startswith(("mem/", "shm/")):
        return [] if (image / stem).is_file() else [f"the file {stem} that it tells of is missing"]
    if name.startswith(("mem/", "shm/")):
        return verify.verify_pages(image / name)
    return verify.read_through(image / name)
