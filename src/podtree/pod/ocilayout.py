"""OCI image layouts: which layer files make up the root file system of an image.

OCI image-spec 1.1: image-layout.md, image-index.md, manifest.md. Nothing in a layout is trusted: every blob is
found by its digest and compared with it, and no file outside of the layout is looked at.
"""

from __future__ import annotations

import hashlib
import platform
import re
from pathlib import Path
from typing import TypeVar

import msgspec

from podtree.errors import UsageError

_T = TypeVar("_T")
_NAME = "org.opencontainers.image.ref.name"
_INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
_LARGEST_JSON = 4 << 20
_DEEPEST = 4  # indexes in indexes


class _Platform(msgspec.Struct, frozen=True):
    architecture: str = ""
    os: str = ""


class _Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    digest: str
    media_type: str = ""
    annotations: dict[str, str] = {}
    platform: _Platform | None = None


class _Index(msgspec.Struct, frozen=True):
    manifests: list[_Descriptor]


class _Manifest(msgspec.Struct, frozen=True):
    layers: list[_Descriptor]


class Image(msgspec.Struct, frozen=True):
    """An image's manifest digest (hex of SHA-256) and its layers, lowest first: tar files, perhaps compressed."""

    digest: str
    layers: tuple[Path, ...]


def find(source: str) -> tuple[Path, str | None] | None:
    """The layout that `source` means, as DIR or DIR:NAME, with the name; None if it isn't one."""
    if _is_layout(Path(source)):
        return Path(source), None
    directory, colon, name = source.rpartition(":")
    if colon and name and _is_layout(Path(directory)):
        return Path(directory), name
    return None


def _is_layout(path: Path) -> bool:
    return (path / "oci-layout").is_file() and (path / "index.json").is_file()


def read(layout: Path, name: str | None) -> Image:
    """The image of that name in a layout, or its only one for this machine. Raises UsageError."""
    index = _decode(_Index, (layout / "index.json").read_bytes(), "index.json")
    manifest = _choose(layout, index, name, _DEEPEST)
    layers = _decode(_Manifest, _blob(layout, manifest).read_bytes(), manifest.digest).layers
    for layer in layers:
        if layer.media_type.endswith("zstd"):
            raise UsageError(
                f"the image's layer {layer.digest} is compressed by zstd",
                "skopeo copy --dest-compress-format gzip makes one that can be read",
            )
        if "tar" not in layer.media_type:
            raise UsageError(f"the image's layer {layer.digest} is a {layer.media_type}, not a tar file")
    return Image(manifest.digest.partition(":")[2], tuple(_blob(layout, layer, whole=True) for layer in layers))


def _choose(layout: Path, index: _Index, name: str | None, deepest: int) -> _Descriptor:
    """The manifest of the image that is meant."""
    found = [one for one in index.manifests if name is None or one.annotations.get(_NAME) == name]
    if len(found) > 1:
        mine = _MACHINES.get(platform.machine(), platform.machine())
        found = [one for one in found if one.platform == _Platform(mine, "linux")] or found
    if len(found) != 1:
        names = sorted(one.annotations[_NAME] for one in index.manifests if _NAME in one.annotations)
        what = f"no image {name}" if name is not None and not found else f"{len(found)} images"
        raise UsageError(
            f"--rootfs {layout}: {what} for this machine",
            f"--rootfs {layout}:NAME, of {', '.join(names)}" if names else "",
        )
    chosen = found[0]
    if chosen.media_type in _INDEX_TYPES and deepest:
        below = _decode(_Index, _blob(layout, chosen).read_bytes(), chosen.digest)
        return _choose(layout, below, None, deepest - 1)
    if chosen.media_type not in _MANIFEST_TYPES:
        raise UsageError(f"--rootfs {layout}: {chosen.digest} is a {chosen.media_type or 'thing without a type'}")
    return chosen


def _blob(layout: Path, descriptor: _Descriptor, *, whole: bool = False) -> Path:
    """A blob's file, which has what its digest says. Anything but a layer (`whole`) is small."""
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", descriptor.digest):
        raise UsageError(f"--rootfs {layout}: {descriptor.digest[:80]!r} isn't a SHA-256 digest")
    wanted = descriptor.digest.partition(":")[2]
    path = layout / "blobs" / "sha256" / wanted
    if not path.is_file() or path.is_symlink():
        raise UsageError(f"--rootfs {layout}: blob {descriptor.digest} is missing")
    if not whole and path.stat().st_size > _LARGEST_JSON:
        raise UsageError(f"--rootfs {layout}: blob {descriptor.digest} is too large for what it should be")
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
            raise UsageError(f"--rootfs {layout}: blob {descriptor.digest} is damaged")
    return path


def _decode(kind: type[_T], data: bytes, what: str) -> _T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise UsageError(f"the image layout's {what} can't be read: {error}") from None
