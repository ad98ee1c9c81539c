"""A checkpoint as one stream. See schema for the format."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from podtree.errors import Conflict, Damaged, PodtreeError
from podtree.image import manifest as manifest_file
from podtree.image.verify import problems
from podtree.kernel.mount import clone_tree
from podtree.pool import retention
from podtree.pool.fsck import check_image
from podtree.pool.pool import Pool
from podtree.pool.records import CheckpointId, CheckpointMeta, CheckpointRecord, new_id
from podtree.pool.store import PARTS
from podtree.transfer import below
from podtree.transfer.chunks import Finder, Packer
from podtree.transfer.ocitar import Writer
from podtree.transfer.schema import (
    ARTIFACT,
    CONFIG_TYPE,
    MANIFEST_TYPE,
    TREES_TYPE,
    VERSION,
    Below,
    Config,
    Descriptor,
    Entry,
    OciIndex,
    OciManifest,
    Parts,
    Since,
    Trees,
    UsedFile,
    compress,
    content_digest,
)
from podtree.transfer.tree import Skip, TreeReader, digest_of, nothing, own_only

_VENDOR = "org.podtree"


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """What was written. Sizes in bytes."""

    id: CheckpointId
    ref: str
    digest: str  # BLAKE3 of the files, the same in every pool
    bytes: int  # of the stream
    bytes_read: int  # of contents
    chunks: int
    since: CheckpointId | None
    with_base: bool


@contextlib.contextmanager
def held(pool: Pool, record: CheckpointRecord) -> Iterator[Path]:
    """A directory with the checkpoint's vol and img that stay while it may be discarded."""
    draft = pool.store.new_draft(new_id())
    try:
        for part in PARTS:
            pool.store.volumes.snapshot(str(pool.checkpoint_dir(record.id) / part), str(draft.path / part))
        yield draft.path
    except FileNotFoundError as error:
        if pool.has_checkpoint(record.id):
            raise Damaged(f"checkpoint {record.ref} is incomplete: {error.filename}", "podtree fsck") from None
        raise Conflict(f"checkpoint {record.ref} has just been discarded") from None
    finally:
        pool.store.drop(draft)


def export(
    pool: Pool,
    record: CheckpointRecord,
    out: BinaryIO,
    *,
    since: CheckpointRecord | None = None,
    with_base: bool = False,
) -> Exported:
    """Write the checkpoint to `out`; with `since` without what that checkpoint has, too.

    Raises Damaged if it isn't whole, PodtreeError or Conflict for what can't be carried: what was written is no export.
    """
    if since is not None and since.id == record.id:
        raise Conflict("nothing is different between a checkpoint and itself")
    meta = _meta(pool, record)
    with contextlib.ExitStack() as scope:
        place = scope.enter_context(held(pool, record))
        _verify(place, meta, record)
        lower = Path(meta.spec.get("rootfs") or "/")
        used = below.used_files(place / "vol", lower, _manifest(place / "img"))
        if with_base:
            _refuse_points(place / "vol", used)
        known, told = _known(scope.enter_context(held(pool, since)), since) if since is not None else (Finder(()), None)
        writer = Writer(out)
        packer = Packer(writer, known.digests)
        vol, vol_digest = _read("vol", place / "vol", packer, own_only)
        img, img_digest = _read("img", place / "img", packer)
        base, base_digest = _read_base(pool, lower, packer) if with_base else ((), "")
        chunks = packer.finish()
        trees = writer.blob(TREES_TYPE, compress(msgspec.msgpack.encode(Trees(vol=vol, img=img, base=base))))
        config = Config(
            version=VERSION, id=record.id, pod=record.pod, pod_name=record.pod_name, number=record.number,
            line=_line(pool, record), time_ns=record.time_ns, message=record.message, summary=record.summary,
            spec=meta.spec, tags=record.tags, machine=platform.machine(), kernel=platform.release(),
            digest=content_digest(vol_digest, img_digest), packs=tuple(packer.packs), own=packer.own,
            foreign=len(packer.foreign), since=told,
            below=Below(
                rootfs=meta.spec.get("rootfs") or "", points=below.points_of(place / "vol"), used=tuple(used),
                carried=base_digest,
            ),
        )  # fmt: skip
    _finish(writer, config, (*packer.layers, chunks, trees), record)
    return Exported(
        id=record.id, ref=record.ref, digest=config.digest, bytes=writer.bytes_written, bytes_read=packer.bytes_read,
        chunks=packer.own, since=since.id if since is not None else None, with_base=with_base,
    )  # fmt: skip


def _finish(writer: Writer, config: Config, layers: tuple[Descriptor, ...], record: CheckpointRecord) -> None:
    """What ties the blobs together. The index comes last: without it the stream is none."""
    notes = {f"{_VENDOR}.id": record.id, f"{_VENDOR}.digest": f"blake3:{config.digest}"}
    if config.since is not None:
        notes[f"{_VENDOR}.since"] = config.since.id
    manifest = OciManifest(
        schema_version=2,
        media_type=MANIFEST_TYPE,
        artifact_type=ARTIFACT,
        config=writer.blob(CONFIG_TYPE, msgspec.json.encode(config)),
        layers=layers,
        annotations=notes,
    )
    top = writer.blob(MANIFEST_TYPE, msgspec.json.encode(manifest), **{"org.opencontainers.image.ref.name": record.id})
    top = msgspec.structs.replace(top, artifact_type=ARTIFACT)
    writer.finish(msgspec.json.encode(OciIndex(schema_version=2, manifests=(top,))))


def _meta(pool: Pool, record: CheckpointRecord) -> CheckpointMeta:
    try:
        return pool.store.meta(record.id)
    except (OSError, ValueError) as error:
        raise Damaged(f"checkpoint {record.id}: meta.json can't be read: {error}", "podtree fsck") from None


def _verify(place: Path, meta: CheckpointMeta, record: CheckpointRecord) -> None:
    """What is damaged would be carried faithfully, and named far away from here."""
    for file, what in check_image(place / "img", meta.spec, problems):
        raise Damaged(f"checkpoint {record.ref} is damaged: img/{file}: {what}", "podtree fsck")


def _manifest(image: Path) -> manifest_file.Manifest:
    fd = os.open(image, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return manifest_file.load(fd)
    finally:
        os.close(fd)


def _line(pool: Pool, record: CheckpointRecord) -> tuple[str, ...]:
    with pool.index.snapshot() as connection:
        return tuple(retention.line_of(connection, record.id)[1:])


def _read(name: str, top: Path, packer: Packer, skip: Skip = nothing) -> tuple[tuple[Entry, ...], str]:
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        reader = TreeReader(name, fd, packer, skip)
        return tuple(reader.entries()), reader.digest.hex()
    finally:
        os.close(fd)


def _known(place: Path, since: CheckpointRecord) -> tuple[Finder, Since]:
    """All chunks of a checkpoint, and what it is known by."""
    finder = Finder(None)
    return finder, Since(id=since.id, digest=checkpoint_digest(place, finder))


def checkpoint_digest(place: Path, finder: Finder) -> str:
    """The digest of the files of a checkpoint, of which `finder` is shown every chunk."""
    found = []
    for name, skip in (("vol", own_only), ("img", nothing)):
        finder.tree = name
        fd = os.open(place / name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found.append(digest_of(name, fd, skip, finder))
        finally:
            os.close(fd)
    return content_digest(*found)


def _refuse_points(vol: Path, used: list[UsedFile]) -> None:
    """A carried base is one tree, over which the pod's writes to further file systems could not lie."""
    points = sorted({*below.written_points(vol), *(file.point for file in used if file.point)})
    if points:
        raise PodtreeError(
            f"cannot export with the base: the pod has used {', '.join(points)}, file systems of their own",
            "export without --with-base, for a machine that has the same ones",
        )


def _read_base(pool: Pool, lower: Path, packer: Packer) -> tuple[tuple[Entry, ...], str]:
    """All that lies below the pod, but for the pool; without what is mounted there."""
    fd = clone_tree(str(lower))
    try:
        reader = TreeReader("base", fd, packer, _without(pool.home, lower), living=True)
        return tuple(reader.entries()), reader.digest.hex()
    finally:
        os.close(fd)


def _without(home: Path, lower: Path) -> Skip:
    hidden: Parts = home.relative_to(lower).parts if home.is_relative_to(lower) else ("/",)
    return lambda parts: parts == hidden


def to_file(path: str, write: Callable[[BinaryIO], Exported]) -> Exported:
    """Call `write` with a new file, which is at `path`, whole and durable, on return, or not at all."""
    draft = f"{path}.partial-{new_id()}"
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as out:
            result = write(out)
            out.flush()
            os.fsync(out.fileno())
        os.rename(draft, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)
        raise
    return result
