"""The format of an export: an OCI image layout (image-spec 1.1, image-layout.md, manifest.md) with our media types.

OCI names blobs by SHA-256, which every registry and object store checks; BLAKE3 names contents, uncompressed: each
chunk, and each tree of files as a whole. Both are verified. See docs/format.md, "Exports".

Everything read here is hostile until it has been verified.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
import zstandard
from blake3 import blake3

from podtree.errors import Damaged, PodtreeError
from podtree.objects import files
from podtree.objects.held import path_bytes, path_text
from podtree.pool.records import ID_DIGITS

VERSION = 1
ARTIFACT = "application/vnd.podtree.checkpoint.v1"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
CONFIG_TYPE = "application/vnd.podtree.checkpoint.config.v1+json"
PACK_TYPE = "application/vnd.podtree.pack.v1+zstd"
CHUNKS_TYPE = "application/vnd.podtree.chunks.v1+zstd"
TREES_TYPE = "application/vnd.podtree.trees.v1+msgpack+zstd"
LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'

PAGE = 4096
UNITS = {"img": PAGE, "vol": 1 << 16, "base": 1 << 16}  # bytes of a chunk, by tree
PACK_BYTES = 8 << 20  # of chunks in a pack, before compression; the last one may go beyond by a chunk
DIGEST = 32

MAX_JSON = 16 << 20  # of a manifest, a configuration or an index
MAX_PACK = 2 * PACK_BYTES
MAX_CHUNKS = 1 << 30
MAX_TREES = 1 << 28
_MAX_WINDOW = 1 << 27
_LAST_NS = (1 << 63) - 1
_NO_ID = (1 << 32) - 1

HIDDEN = os.fsdecode(files.HIDDEN)
TOP = "."  # the path of a tree's own directory
KINDS = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK}
XATTRS = ("user.", "security.", "system.posix_acl_", "trusted.overlay.")  # all that are carried

Shape = TypeVar("Shape")
Parts = tuple[str, ...]


class Run(msgspec.Struct, frozen=True, array_like=True):
    """`count` chunks from `first` on, at offset `at` of a file; `first` < 0: foreign chunks, from -1 - `first` on."""

    at: int
    first: int
    count: int


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One name. `path` is relative, "." the tree's own directory; parents come before children. Times in ns.

    `same_as`: another name of that earlier entry (a hard link); nothing else but `kind` is set then. What no run
    covers is zeros.
    """

    path: str
    kind: int  # S_IFMT
    mode: int = 0  # permission bits
    uid: int = 0
    gid: int = 0
    atime: int = 0
    mtime: int = 0
    size: int = 0
    device: tuple[int, int] = (0, 0)
    target: str = ""
    xattrs: dict[str, bytes] = {}
    same_as: str = ""
    runs: tuple[Run, ...] = ()

    @property
    def parts(self) -> Parts:
        """The path as names."""
        return () if self.path == TOP else tuple(os.fsdecode(path_bytes(self.path)).split("/"))


class Trees(msgspec.Struct, frozen=True, kw_only=True):
    """All files: `vol` and `img` of the checkpoint, and `base` if what lies below the pod is carried."""

    vol: tuple[Entry, ...]
    img: tuple[Entry, ...]
    base: tuple[Entry, ...] = ()


class UsedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file below the pod that its processes have open or mapped. `point`: of which of the host's file systems."""

    point: str  # "" the root
    path: str  # relative to that
    size: int
    mtime: int  # ns
    digest: bytes  # blake3


class Below(msgspec.Struct, frozen=True, kw_only=True):
    """What lies below the pod. `points`: the host's further file systems that it has an overlay over."""

    rootfs: str  # as in the pod's spec; "" for the host's own root
    points: tuple[str, ...] = ()
    used: tuple[UsedFile, ...] = ()
    carried: str = ""  # digest of the tree `base`, in hex digits, if it is in the export


class Since(msgspec.Struct, frozen=True, kw_only=True):
    """The checkpoint that has the foreign chunks."""

    id: str
    digest: str


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What is exported: meta.json's fields, whence it comes, and the digest of its files."""

    version: int
    id: str
    pod: str
    pod_name: str
    number: int
    line: tuple[str, ...]  # its parent, that one's parent...
    time_ns: int
    message: str
    summary: dict[str, Any]
    spec: dict[str, Any]
    tags: tuple[str, ...]
    machine: str
    kernel: str
    digest: str  # blake3 of the two trees' digests
    packs: tuple[int, ...]  # how many chunks are in each
    own: int  # chunks in packs
    foreign: int  # chunks of `since`
    below: Below
    since: Since | None = None


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """image-spec, descriptor.md."""

    media_type: str
    digest: str
    size: int
    artifact_type: str = ""
    annotations: dict[str, str] = {}


class OciManifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """image-spec, manifest.md."""

    schema_version: int
    media_type: str
    artifact_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: dict[str, str] = {}


class OciIndex(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """image-spec, image-index.md."""

    schema_version: int
    media_type: str = INDEX_TYPE
    manifests: tuple[Descriptor, ...]


def decode(raw: bytes, kind: type[Shape], what: str) -> Shape:
    """JSON as `kind`. Raises Damaged."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Damaged(f"the export's {what} makes no sense: {error}") from None


def decode_trees(raw: bytes) -> Trees:
    """The table of files, every entry a possible one. Raises Damaged."""
    try:
        trees = msgspec.msgpack.decode(raw, type=Trees)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Damaged(f"the export's table of files makes no sense: {error}") from None
    for name in ("vol", "img", "base"):
        _check_tree(name, getattr(trees, name))
    return trees


def check_config(config: Config) -> Config:
    """Raise Damaged for what can't be."""
    if config.version != VERSION:
        raise Damaged(f"the export has version {config.version}, this podtree knows {VERSION}", "use a newer podtree")
    since = [config.since.id] if config.since is not None else []
    for text in (config.id, config.pod, *config.line, *since):
        _expect(re.fullmatch(f"[0-9a-f]{{{ID_DIGITS}}}", text), f"{text!r} is no id")
    _expect(0 < config.number < 1 << 31 and 0 <= config.time_ns <= _LAST_NS, "its number or its time can't be")
    digests = [config.digest, *([config.since.digest] if config.since else []), config.below.carried or "0" * 64]
    _expect(all(re.fullmatch("[0-9a-f]{64}", text) for text in digests), "a digest that is none")
    _expect(all(count > 0 for count in config.packs) and sum(config.packs) == config.own, "its packs don't add up")
    _expect(config.foreign >= 0 and (config.since is not None or not config.foreign), "chunks of nowhere")
    _expect(all(isinstance(value, str | int | float | None) for value in config.summary.values()), "its summary")
    for file in config.below.used:
        _expect(file.point in ("", *config.below.points), "a file below of nowhere")
        _expect(len(file.digest) == DIGEST and file.size >= 0, "a file below the pod that can't be")
        _checked_parts(file.path)
    _expect(all(point.startswith("/") and _checked_parts(point[1:]) for point in config.below.points), "a mount point")
    return config


def _expect(holds: object, what: str) -> None:
    if not holds:
        raise Damaged(f"the export makes no sense: {what}")


def _checked_parts(path: str) -> Parts:
    """The names of a relative path, none of which leads anywhere else. Raises Damaged."""
    parts = tuple(os.fsdecode(path_bytes(path)).split("/"))
    _expect(all(part not in ("", ".", "..") and len(os.fsencode(part)) < 256 for part in parts), f"path {path!r}")
    return parts


def _check_tree(name: str, entries: tuple[Entry, ...]) -> None:
    if not entries and name == "base":
        return
    _expect(entries and entries[0].path == TOP and entries[0].kind == stat.S_IFDIR, f"{name} doesn't begin at its top")
    kinds: dict[str, int] = {}
    for entry in entries:
        if entry.path != TOP or kinds:
            parts = _checked_parts(entry.path)
            parent = path_text(os.fsencode("/".join(parts[:-1]))) if len(parts) > 1 else TOP
            _expect(kinds.get(parent) == stat.S_IFDIR, f"{name}/{entry.path} lies in no directory")
        _expect(entry.path not in kinds, f"{name}/{entry.path} is there twice")
        if entry.same_as:
            _expect(kinds.get(entry.same_as, 0) == entry.kind != stat.S_IFDIR, f"{name}/{entry.path} is a link to none")
        kinds[entry.path] = entry.kind
        _check_entry(name, entry)
        _expect(_belongs(name, entry), f"{name}/{entry.path} has no place there")


def _belongs(tree: str, entry: Entry) -> bool:
    """Whether a volume or an image has such a thing in such a place. What the pod's programs see is theirs alone; the
    rest is opened by us, on the host, so there must be no link or device in it.
    """
    parts = entry.parts
    if tree == "base" or not parts:
        return True
    if tree == "img":
        return entry.kind in (stat.S_IFREG, stat.S_IFDIR) and not entry.same_as
    if parts == ("log",):
        return entry.kind == stat.S_IFREG and not entry.same_as
    place = parts[2:] if parts[0] == "mounts" else parts
    if len(place) <= 1:
        return entry.kind == stat.S_IFDIR and place in ((), ("upper",))
    if place[:2] != ("upper", HIDDEN):
        return place[0] == "upper"
    return entry.kind == (stat.S_IFDIR if len(place) == 2 else stat.S_IFREG) and len(place) <= 3


def _check_entry(name: str, entry: Entry) -> None:
    what = f"{name}/{entry.path}"
    _expect(entry.kind in KINDS and 0 <= entry.mode <= 0o7777, f"{what}: type or mode")
    _expect(0 <= entry.uid < _NO_ID and 0 <= entry.gid < _NO_ID, f"{what}: owner")
    _expect(all(-_LAST_NS <= time <= _LAST_NS for time in (entry.atime, entry.mtime)), f"{what}: times")
    _expect(all(0 <= number < 1 << 20 for number in entry.device), f"{what}: device")
    _expect(0 <= entry.size <= _LAST_NS and (entry.kind == stat.S_IFREG or not entry.runs), f"{what}: size")
    _expect((entry.kind == stat.S_IFLNK and not entry.same_as) == bool(entry.target), f"{what}: target")
    _expect(all(key.startswith(XATTRS) and "\0" not in key for key in entry.xattrs), f"{what}: attributes")
    end, unit = 0, UNITS[name]
    for run in entry.runs:
        _expect(run.at >= end and run.at % unit == 0 and run.count > 0, f"{what}: runs")
        end = run.at + run.count * unit
    _expect(end < entry.size + unit, f"{what}: runs beyond the end")


def numbers(run: Run) -> Iterator[int]:
    """The chunks of a run, foreign ones as -1 - number."""
    step = 1 if run.first >= 0 else -1
    return iter(range(run.first, run.first + step * run.count, step))


def pieces(entry: Entry, unit: int) -> Iterator[tuple[int, int, int]]:
    """(offset, length, chunk) of all that is saved of a file."""
    for run in entry.runs:
        for index, number in enumerate(numbers(run)):
            at = run.at + index * unit
            yield at, min(unit, entry.size - at), number


class TreeDigest:
    """BLAKE3 over all of a tree that a program could see, whatever the packs: all of Entry but `atime` and `runs`,
    and offset and digest of each chunk that isn't all zeros."""

    def __init__(self) -> None:
        self._hash = blake3(b"podtree tree 1\0")
        self._encoder = msgspec.msgpack.Encoder(order="sorted")

    def entry(self, entry: Entry) -> None:
        """Before its chunks."""
        fields = (entry.path, entry.kind, entry.mode, entry.uid, entry.gid, entry.mtime, entry.size, entry.device,
                  entry.target, entry.xattrs, entry.same_as)  # fmt: skip
        raw = self._encoder.encode(fields)
        self._hash.update(struct.pack("<QQ", _LAST_NS + 1, len(raw)) + raw)

    def chunk(self, at: int, digest: bytes) -> None:
        self._hash.update(at.to_bytes(8, "little") + digest)

    def hex(self) -> str:
        return str(self._hash.hexdigest())


def content_digest(vol: str, img: str) -> str:
    """Of a checkpoint, from those of its two trees."""
    return str(blake3(bytes.fromhex(vol) + bytes.fromhex(img)).hexdigest())


def compress(raw: bytes, level: int = 3) -> bytes:
    """One zstd frame that tells its size."""
    return bytes(zstandard.ZstdCompressor(level=level).compress(raw))


def decompress(raw: bytes, limit: int, what: str) -> bytes:
    """One frame, whole, of at most `limit` bytes. Raises Damaged; never makes more than it was told."""
    try:
        size = zstandard.frame_content_size(raw)
        if not 0 <= size <= limit:
            raise Damaged(f"the export's {what} would be {size} bytes")
        if size == 0:
            return b""
        return bytes(zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompress(raw, allow_extra_data=False))
    except zstandard.ZstdError as error:
        raise Damaged(f"the export's {what} can't be decompressed: {error}") from None


def not_carried(path: str, names: list[str]) -> PodtreeError:
    """What an export can't hold."""
    return PodtreeError(f"cannot export: {path} has attributes that can't be carried: {', '.join(names)}")
