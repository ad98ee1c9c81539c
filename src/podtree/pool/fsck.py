"""Verification of a pool: every checkpoint's files and checksums, and the index against the disk.

Reports, repairs nothing. Whatever it meets, it goes on with the rest.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from podtree.errors import PodtreeError
from podtree.kernel.below import open_below, walk
from podtree.pool import verify
from podtree.pool.pool import Pool
from podtree.pool.records import CheckpointId, CheckpointMeta, CheckpointRecord, PodRecord
from podtree.pool.store import PARTS

#: Looks at an image with its pod's spec at hand, as only who knows what is in a manifest can: (file, what is wrong).
Examine = Callable[[Path, dict[str, Any]], Iterable[tuple[str, str]]]


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
    examine: Examine = lambda _image, _spec: (),
) -> FsckReport:
    """Verify the whole pool, or just the given checkpoints. `progress` is called before each one."""
    damage: list[Damage] = []
    garbage: list[str] = []
    tally = _Tally()
    pool.store.volumes.write_out()
    checkpoints = only
    if checkpoints is None:
        damage += [Damage(where="index", what=text) for text in pool.index.check()]
        checkpoints = _all(pool, damage)
        if not damage:
            damage += _check_pods(pool, tally)
            garbage += _leftovers(pool)
    for record in checkpoints:
        if progress is not None:
            progress(record)
        found = [
            Damage(where=record.id, ref=record.ref, file=file, what=what)
            for file, what in _check_checkpoint(pool, record, tally, examine)
        ]
        if found and not _was_removed(pool, record):
            damage += found
    return FsckReport(
        checkpoints=len(checkpoints),
        files=tally.files,
        bytes=tally.bytes,
        damage=tuple(damage),
        garbage=tuple(garbage),
    )


def _all(pool: Pool, damage: list[Damage]) -> list[CheckpointRecord]:
    """All checkpoints of the index; where that can't be read, those on the disk that say themselves what they are."""
    try:
        pool.pods(removed=True)
        return pool.checkpoints()
    except PodtreeError as error:
        damage.append(Damage(where="index", what=error.message))
    found = []
    for name in sorted(os.listdir(pool.store.ckpts)):
        try:
            found.append(_as_record(pool.store.meta(CheckpointId(name))))
        except (OSError, ValueError) as error:
            damage.append(Damage(where=name, file="meta.json", what=f"can't be read: {error}"))
    return found


def _as_record(meta: CheckpointMeta) -> CheckpointRecord:
    return CheckpointRecord(
        id=meta.id, pod=meta.pod, pod_name=meta.pod_name, number=meta.number, parent=meta.parent,
        time_ns=meta.time_ns, message=meta.message, summary=meta.summary,
    )  # fmt: skip


def _leftovers(pool: Pool) -> list[str]:
    found = [f"{path.parent.name}/{path.name}" for path in pool.strays()]
    found += [f"drafts/{path.name}" for path in pool.store.strays(pool.store.drafts, set())]
    return found + [f"trash/{entry.name}" for entry in os.scandir(pool.store.trash)]


def _was_removed(pool: Pool, record: CheckpointRecord) -> bool:
    """Whether another command has removed it while we looked."""
    try:
        return not pool.has_checkpoint(record.id)
    except PodtreeError:
        return False


# Pods


def _check_pods(pool: Pool, tally: _Tally) -> Iterator[Damage]:
    for pod in pool.pods():
        found = [
            Damage(where=f"pod {pod.id}", ref=pod.name, file=file, what=what)
            for file, what in _check_pod(pool, pod, tally)
        ]
        if found and any(now.id == pod.id for now in pool.pods()):
            yield from found


def _check_pod(pool: Pool, pod: PodRecord, tally: _Tally) -> Iterator[tuple[str, str]]:
    """Its processes may be at work on the files: what can be said is whether they can be read."""
    top = pool.pod_dir(pod.id)
    for part in PARTS:
        if not pool.store.volumes.exists(str(top / part)):
            yield part, "is missing"
            continue
        for name, what in _read_all(top / part, tally):
            if what != os.strerror(2):  # ENOENT: it went while we looked
                yield f"{part}/{name}", what
    try:
        if msgspec.json.decode((top / "spec.json").read_bytes()) != pod.spec:
            yield "spec.json", "tells of another spec than the index"
    except FileNotFoundError:
        yield "spec.json", "is missing"
    except (OSError, ValueError) as error:
        yield "spec.json", f"can't be read: {error}"


# Checkpoints


def _check_checkpoint(
    pool: Pool, record: CheckpointRecord, tally: _Tally, examine: Examine
) -> Iterator[tuple[str, str]]:
    top = pool.checkpoint_dir(record.id)
    if not top.is_dir():
        yield "", "its directory is missing (podtree discard takes it out of the log)"
        return
    meta = yield from _check_meta(pool, record)
    for part in PARTS:
        try:
            if not pool.store.volumes.exists(str(top / part)):
                yield part, "is missing, or is no volume"
                continue
            state = _tampering(pool, top / part)
        except OSError as error:
            yield part, os.strerror(error.errno or 0)
            continue
        if part == "vol":
            found = list(_read_all(top / part, tally))
        else:
            found = list(_check_image(top / part, meta.spec if meta else None, tally, examine))
        yield from ((f"{part}/{name}", what) for name, what in found)
        if state and not found:
            yield part, state


def _tampering(pool: Pool, part: Path) -> str:
    """What can be said of a snapshot as a whole, where no single file tells more."""
    if not pool.store.volumes.is_snapshot(str(part)):
        return "can be written to, it may have been changed"
    return "has been changed since it was made" if pool.store.volumes.was_changed(str(part)) else ""


def _check_meta(pool: Pool, record: CheckpointRecord) -> Generator[tuple[str, str], None, CheckpointMeta | None]:
    """What is wrong with meta.json; returns it when nothing is."""
    try:
        meta = pool.store.meta(record.id)
    except OSError as error:
        yield "meta.json", os.strerror(error.errno or 0)
        return None
    except ValueError as error:
        yield "meta.json", f"can't be read: {error}"
        return None
    told, indexed = ((it.id, it.time_ns, it.message, it.summary) for it in (meta, record))
    if told != indexed:
        yield "meta.json", "tells of another checkpoint than the index"
        return None
    return meta


def check_image(image: Path, spec: dict[str, Any], examine: Examine) -> list[tuple[str, str]]:
    """(file, what is wrong) of an image directory that isn't a checkpoint's yet; `spec`: its pod's."""
    return list(_check_image(image, spec, _Tally(), examine))


def _check_image(
    image: Path, spec: dict[str, Any] | None, tally: _Tally, examine: Examine
) -> Iterator[tuple[str, str]]:
    wrong = False
    if not (image / "manifest").is_file():
        wrong = True
        yield "manifest", "is missing"
    for parts, info in _regular_files(image, tally):
        name = "/".join(parts)
        for what in [info] if isinstance(info, str) else _check_image_file(image, name):
            wrong = True
            yield name, what
    if not wrong and spec is not None:  # or the same would be said twice
        yield from examine(image, spec)


def _check_image_file(image: Path, name: str) -> list[str]:
    if name == "manifest":
        return verify.verify_manifest(image / name)
    stem, dot, kind = name.rpartition(".")
    if dot and kind in ("map", "sum") and name.startswith(("mem/", "shm/")):
        return [] if (image / stem).is_file() else [f"the file {stem} that it tells of is missing"]
    if name.startswith(("mem/", "shm/")):
        return verify.verify_pages(image / name)
    return verify.read_through(image / name)


# Files


def _regular_files(top: Path, tally: _Tally) -> Iterator[tuple[tuple[str, ...], os.stat_result | str]]:
    """(parts of its path below `top`, what it is) of every regular file, or what is wrong, also with directories."""
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for parts, info in walk(fd):
            if isinstance(info, OSError):
                yield parts, os.strerror(info.errno or 0)
            elif stat.S_ISREG(info.st_mode):
                tally.files += 1
                tally.bytes += info.st_blocks * 512
                yield parts, info
    finally:
        os.close(fd)


def _read_all(top: Path, tally: _Tally) -> Iterator[tuple[str, str]]:
    """Read every byte below a directory, so that the file system verifies its own checksums."""
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for parts, info in _regular_files(top, tally):
            for what in [info] if isinstance(info, str) else _read_one(fd, parts):
                yield "/".join(parts).encode(errors="surrogateescape").decode(errors="backslashreplace"), what
    finally:
        os.close(fd)


def _read_one(top: int, parts: tuple[str, ...]) -> list[str]:
    try:
        fd = open_below(top, parts, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        return [os.strerror(error.errno or 0)]
    try:
        return verify.read_descriptor(fd)
    finally:
        os.close(fd)
