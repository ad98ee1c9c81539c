"""An export into a pool. What comes is hostile until it is verified; nothing is seen of it before that.

The blobs are verified as they come in (SHA-256). The trees are built in a draft, read again, and have to have the
digest that the export says; the image has to pass what `fsck` looks at. Then it takes its place by one rename.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from podtree.errors import Conflict, Damaged, NotFound, PodtreeError, UsageError
from podtree.image import manifest as manifest_file
from podtree.image.verify import problems
from podtree.pod import rootfs as rootfs_module
from podtree.pod import spec as specs
from podtree.pod.spec import PodSpec, Volume
from podtree.pool import locks, refs
from podtree.pool.adopt import Newcomer, adopt
from podtree.pool.fsck import check_image
from podtree.pool.pool import LOCK_SECONDS, Pool
from podtree.pool.records import CheckpointId, PodId, new_id
from podtree.pool.store import PARTS, DraftDirectory
from podtree.restore.pod import check_machine
from podtree.transfer import below
from podtree.transfer.build import Builder
from podtree.transfer.chunks import ChunkTable, Finder, Spool
from podtree.transfer.export import checkpoint_digest, held
from podtree.transfer.schema import (
    ARTIFACT,
    CHUNKS_TYPE,
    CONFIG_TYPE,
    MAX_CHUNKS,
    MAX_JSON,
    MAX_PACK,
    MAX_TREES,
    PACK_TYPE,
    TREES_TYPE,
    UNITS,
    Config,
    Descriptor,
    Entry,
    OciIndex,
    OciManifest,
    TreeDigest,
    Trees,
    check_config,
    content_digest,
    decode,
    decode_trees,
    decompress,
    pieces,
)
from podtree.transfer.staging import Staging
from podtree.transfer.tree import Skip, digest_of, nothing, own_only


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """What came in. `known`: it was there already. `notes`: what its user should know, such as tags that are taken."""

    id: CheckpointId
    ref: str
    known: bool
    tags: tuple[str, ...]
    parts_kept: int  # that an earlier try had brought
    notes: tuple[str, ...] = ()


def load(
    pool: Pool,
    source: BinaryIO | Path,
    *,
    volumes: tuple[Volume, ...] = (),
    rootfs: str | None = None,
    tag: str | None = None,
) -> Imported:
    """Take in an export: a stream, or an OCI layout in a directory.

    `volumes`: what -v's targets are here; each one that the pod had must be named, since an export must not choose
    which of the host's directories are shown. `rootfs`: the same for what lies below. `tag`: a name for it.

    Raises Damaged, Cut, NotFound (without the checkpoint that it is the difference to), Conflict, UsageError,
    Unsupported (other files below). Nothing of it is in the pool then.
    """
    if tag is not None:
        pool.check_free(refs.check_name(tag, "tag"))
    with locks.held(str(pool.home / "locks" / "import"), timeout=LOCK_SECONDS, what="the import"):
        staging = Staging(pool.store.incoming, pool.make_room)
        index = staging.receive(source)
        blobs: tuple[Descriptor, ...] = ()
        try:
            manifest = _manifest(staging, index)
            blobs = (*decode(index, OciIndex, "index").manifests, manifest.config, *manifest.layers)
            result = _Import(pool, staging, manifest, volumes, rootfs, tag).run()
        except Damaged:
            staging.forget(blobs)
            raise
        staging.forget(blobs)
    return result


def _manifest(staging: Staging, index: bytes) -> OciManifest:
    found = decode(index, OciIndex, "index").manifests
    if len(found) != 1:
        raise Damaged(f"the export's index has {len(found)} manifests, not one")
    manifest = decode(staging.read(found[0], MAX_JSON), OciManifest, "manifest")
    if manifest.artifact_type != ARTIFACT or manifest.config.media_type != CONFIG_TYPE:
        raise Damaged(f"this is no export of podtree, or one of another version: {manifest.artifact_type!r}")
    return manifest


class _Import:
    """One export on its way into the pool."""

    def __init__(
        self, pool: Pool, staging: Staging, manifest: OciManifest, volumes: tuple[Volume, ...], rootfs: str | None,
        tag: str | None,
    ) -> None:  # fmt: skip
        self.pool = pool
        self.staging = staging
        self.manifest = manifest
        self.volumes = volumes
        self.rootfs = rootfs
        self.tag = tag
        self.notes: list[str] = []
        self.config = check_config(decode(staging.read(manifest.config, MAX_JSON), Config, "configuration"))
        self.id = CheckpointId(self.config.id)

    def run(self) -> Imported:
        spec = self._spec()
        if self.pool.has_checkpoint(self.id):
            return self._known()
        table = ChunkTable(self._layer(CHUNKS_TYPE, MAX_CHUNKS), self.config.own, self.config.foreign)
        trees = decode_trees(decompress(self._layer(TREES_TYPE, MAX_TREES), MAX_TREES, "table of files"))
        self._check_table(table, trees)
        with contextlib.ExitStack() as scope:
            draft = self.pool.store.new_draft(new_id())
            scope.callback(self._drop, draft)
            since = self._since(scope, table)
            self._build(draft, trees, table, since)
            spec = self._with_root(draft.path, spec, trees, table, since)
            self._verify(draft.path, spec)
            return self._publish(draft, spec)

    # What is said of it

    def _layer(self, media_type: str, limit: int) -> bytes:
        found = [layer for layer in self.manifest.layers if layer.media_type == media_type]
        if len(found) != 1:
            raise Damaged(f"the export has {len(found)} parts of type {media_type}, not one")
        return self.staging.read(found[0], limit)

    def _spec(self) -> PodSpec:
        """The pod's spec with this machine's directories in it."""
        try:
            spec = specs.check(PodSpec.from_dict(self.config.spec))
            refs.check_name(self.config.pod_name, "pod")
        except (msgspec.ValidationError, ValueError, UsageError) as error:
            raise Damaged(f"the export makes no sense: its pod's spec: {error}") from None
        given = {volume.target: volume for volume in self.volumes}
        wanted = {volume.target: volume for volume in spec.volumes}
        missing = [volume for target, volume in wanted.items() if target not in given]
        if missing:
            names = " ".join(f"-v {v.source}:{v.target}{':ro' if v.read_only else ''}" for v in missing)
            raise UsageError("the pod had directories of its host: say which ones it is to see here", f"as in {names}")
        strange = sorted(given.keys() - wanted.keys())
        if strange:
            raise UsageError(f"the pod had nothing of its host at {', '.join(strange)}")
        weaker = [v.target for v in given.values() if wanted[v.target].read_only and not v.read_only]
        if weaker:
            raise UsageError(f"the pod had {', '.join(weaker)} read-only", "add :ro")
        return msgspec.structs.replace(spec, volumes=tuple(given[target] for target in wanted))

    def _stored(self, spec: PodSpec) -> dict[str, Any]:
        """The spec as it came but for this machine's directories: what another podtree didn't write stays unwritten."""
        here = spec.to_dict()
        return {**self.config.spec, "volumes": here["volumes"], "rootfs": here["rootfs"]}

    def _known(self) -> Imported:
        """It is there already, if it is the same."""
        record = self.pool.checkpoint(self.id)
        with held(self.pool, record) as place:
            if checkpoint_digest(place, Finder(())) != self.config.digest:
                raise Conflict(f"there is another checkpoint {self.id} here, with other contents")
        if self.tag is not None:
            self.pool.tag(self.tag, self.id)
        return Imported(
            id=self.id, ref=record.ref, known=True, tags=self.pool.checkpoint(self.id).tags,
            parts_kept=self.staging.taken,
        )  # fmt: skip

    def _check_table(self, table: ChunkTable, trees: Trees) -> None:
        """The table of files is what the digest says, before a byte of it is written."""
        found = {name: _table_digest(name, getattr(trees, name), table) for name in UNITS}
        if content_digest(found["vol"], found["img"]) != self.config.digest:
            raise Damaged("the export is damaged: its table of files doesn't have the digest that it should")
        if bool(trees.base) != bool(self.config.below.carried) or (
            trees.base and found["base"] != self.config.below.carried
        ):
            raise Damaged("the export is damaged: its base doesn't have the digest that it should")

    # Making it

    def _since(self, scope: contextlib.ExitStack, table: ChunkTable) -> _Foreign | None:
        """Where the chunks are that the export leaves to another checkpoint."""
        since = self.config.since
        if since is None:
            return None
        if not self.pool.has_checkpoint(CheckpointId(since.id)):
            raise NotFound(
                f"the export has only what differs from checkpoint {since.id}, which isn't here",
                "import that first, or export again without --since",
            )
        place = scope.enter_context(held(self.pool, self.pool.checkpoint(CheckpointId(since.id))))
        finder = Finder(table.digest(-1 - number) for number in range(table.foreign))
        if checkpoint_digest(place, finder) != since.digest:
            raise Conflict(f"checkpoint {since.id} isn't here what it was where the export was made", "podtree fsck")
        return _Foreign(scope, place, finder, table)

    def _build(self, draft: DraftDirectory, trees: Trees, table: ChunkTable, since: _Foreign | None) -> None:
        self.spool = Spool(os.open(draft.path, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600), table)
        packs = [layer for layer in self.manifest.layers if layer.media_type == PACK_TYPE]
        if len(packs) != len(self.config.packs):
            raise Damaged("the export lacks some of its packs")
        for layer, count in zip(packs, self.config.packs, strict=True):
            self.pool.make_room(MAX_PACK)
            self.spool.add(self.staging.read(layer, MAX_PACK), count, MAX_PACK)
        for part in PARTS:
            made = draft.path / f"new-{part}"
            self.pool.store.volumes.create(str(made))
            self._build_tree(part, made, getattr(trees, part), since)
            # A snapshot of it, since fsck asks whether one was changed after it was made.
            self.pool.store.volumes.snapshot(str(made), str(draft.path / part))
            self.pool.store.volumes.destroy(str(made))
        vol, img = (
            self._digest(part, draft.path / part, skip) for part, skip in (("vol", own_only), ("img", nothing))
        )
        if content_digest(vol, img) != self.config.digest:
            raise Damaged("what was written isn't what the export says", "podtree doctor; is the disk failing?")

    def _build_tree(self, name: str, top: Path, entries: tuple[Entry, ...], since: _Foreign | None) -> None:
        def place(number: int) -> tuple[int, int]:
            if number >= 0:
                return self.spool.fd, self.spool.places[number]
            if since is None:
                raise Damaged("the export makes no sense: chunks of nowhere")
            return since.place(number)

        fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            Builder(name, fd, place, self.pool.make_room).build(entries)
        finally:
            os.close(fd)

    def _digest(self, name: str, top: Path, skip: Skip = nothing) -> str:
        fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return digest_of(name, fd, skip)
        finally:
            os.close(fd)

    def _with_root(
        self, draft: Path, spec: PodSpec, trees: Trees, table: ChunkTable, since: _Foreign | None
    ) -> PodSpec:
        """The spec with what lies below the pod here, which is found to be the same. Raises Unsupported."""
        if self.rootfs is not None:
            root: str | None = rootfs_module.prepare(self.pool.root, self.rootfs)
        elif trees.base:
            root = rootfs_module.keep(
                self.pool.root, self.config.below.carried, lambda top: self._build_base(top, trees, since)
            )
        else:
            root = self._root_of(spec)
        own = root is not None and Path(root).is_relative_to(self.pool.home)
        if own and Path(root or "").parent != self.pool.root / "rootfs":
            raise UsageError(f"--rootfs {root}: what is below {self.pool.home} isn't shown to pods")
        below.check(self.config.below, draft / "vol", Path(root or "/"), self.pool.home, rooted=root is not None)
        return msgspec.structs.replace(spec, rootfs=root)

    def _build_base(self, top: Path, trees: Trees, since: _Foreign | None) -> None:
        self._build_tree("base", top, trees.base, since)
        if self._digest("base", top) != self.config.below.carried:
            raise Damaged("what was written isn't what the export says", "podtree doctor; is the disk failing?")

    def _root_of(self, spec: PodSpec) -> str | None:
        """What an archive was unpacked to is called after its digest, in every pool; a directory has to be named."""
        if spec.rootfs is None:
            return None
        if self.config.since is not None:  # that one has been given its root here already
            return self.pool.store.meta(CheckpointId(self.config.since.id)).spec.get("rootfs")
        place, name = os.path.split(spec.rootfs)
        known = rootfs_module.find(self.pool.root, name) if os.path.basename(place) == "rootfs" else None
        if known is not None:
            return known
        raise UsageError(
            f"the pod's root was {spec.rootfs}: say what it is here", "--rootfs DIR|TAR|OCI-LAYOUT, with the same files"
        )

    def _verify(self, draft: Path, spec: PodSpec) -> None:
        for file, what in check_image(draft / "img", self._stored(spec), problems):
            raise Damaged(f"the checkpoint in the export is damaged: img/{file}: {what}")
        fd = os.open(draft / "img", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            check_machine(manifest_file.load(fd))
        except PodtreeError as error:
            if isinstance(error, Damaged):
                raise
            self.notes.append(f"it can't be brought back here: {error.message}")
        finally:
            os.close(fd)

    def _publish(self, draft: DraftDirectory, spec: PodSpec) -> Imported:
        config = self.config
        wanted = list(dict.fromkeys([*([self.tag] if self.tag else []), *config.tags]))
        record, tags = adopt(
            self.pool,
            draft,
            Newcomer(
                id=self.id, pod=PodId(config.pod), pod_name=config.pod_name, number=config.number,
                line=tuple(CheckpointId(one) for one in config.line), time_ns=config.time_ns, message=config.message,
                summary=config.summary, spec=self._stored(spec), tags=tuple(wanted),
            ),
        )  # fmt: skip
        taken = [name for name in wanted if name not in tags]
        if taken:
            self.notes.append(f"tags that are taken here, or can't be: {', '.join(taken)}")
        return Imported(
            id=record.id, ref=record.ref, known=False, tags=tags, parts_kept=self.staging.taken,
            notes=tuple(self.notes),
        )  # fmt: skip

    def _drop(self, draft: DraftDirectory) -> None:
        """Unless it has become a checkpoint."""
        if hasattr(self, "spool"):
            os.close(self.spool.fd)
        if self.pool.has_checkpoint(self.id) and draft.path == self.pool.checkpoint_dir(self.id):
            draft.close()
        else:
            self.pool.store.drop(draft)


class _Foreign:
    """The chunks of the checkpoint that an export is the difference to, in its files."""

    def __init__(self, scope: contextlib.ExitStack, place: Path, finder: Finder, table: ChunkTable) -> None:
        self._place = place
        self._finder = finder
        self._table = table
        self._open: dict[tuple[str, ...], int] = {}
        scope.callback(self._close)

    def place(self, number: int) -> tuple[int, int]:
        """(descriptor, offset). Raises Damaged."""
        from podtree.kernel.below import open_below

        found = self._finder.places.get(self._table.digest(number))
        if found is None:
            raise Damaged("the export makes no sense: it leaves a chunk to a checkpoint that hasn't got it")
        tree, parts, at = found
        if (tree, *parts) not in self._open:
            self._close()  # one at a time: they may be many, and mostly follow each other
            top = os.open(self._place / tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._open[tree, *parts] = open_below(top, parts, os.O_RDONLY | os.O_NOFOLLOW)
            finally:
                os.close(top)
        return self._open[tree, *parts], at

    def _close(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()


def _table_digest(name: str, entries: tuple[Entry, ...], table: ChunkTable) -> str:
    digest = TreeDigest()
    for entry in entries:
        digest.entry(msgspec.structs.replace(entry, runs=()))
        for at, length, number in pieces(entry, UNITS[name]):
            if number >= 0 and (number >= table.own or table.lengths[number] != length):
                raise Damaged(f"the export makes no sense: {name}/{entry.path} has chunk {number} at {at}")
            digest.chunk(at, table.digest(number))
    return digest.hex()
