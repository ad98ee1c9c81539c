"""Files in the pods' memory file systems (/dev/shm and such), which are saved in the images and not in the volumes."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from podtree.diff import pagesums
from podtree.diff.files import FileChange, Traits, difference
from podtree.image.manifest import Manifest
from podtree.objects.contents import DIRECTORY, check_key
from podtree.objects.held import path_bytes
from podtree.objects.tmpfs import TmpfsEntry

Entries = dict[str, TmpfsEntry]


def entries(manifest: Manifest | None) -> Entries:
    """All files in memory file systems, by their paths in the pod."""
    found: Entries = {}
    for mount in manifest.tmpfs if manifest is not None else ():
        by_path = {entry.path: entry for entry in mount.entries}
        for entry in mount.entries:
            point = "/".join((mount.point.rstrip("/"), _name(entry.path))) if entry.path != "." else mount.point
            found[point] = by_path.get(entry.same_as, entry)
    return found


def _name(path: str) -> str:
    return path_bytes(path).decode(errors="surrogateescape")


def pages_of(image: Path | None, key: str) -> Path | None:
    """The file of pages in an image with what memory file `key` holds."""
    return image / DIRECTORY / check_key(key) if image is not None and key else None


def changes(
    old_img: Path | None, old: Manifest | None, new_img: Path | None, new: Manifest | None
) -> Iterator[FileChange]:
    """All that differs, where both sides are of a pod that runs: one that has ended has no memory file systems."""
    if old is None or new is None:
        return
    before, after = entries(old), entries(new)
    for path in sorted(before.keys() | after.keys()):
        a, b = before.get(path), after.get(path)
        content = False
        if a is not None and b is not None and a.kind == b.kind == stat.S_IFREG:
            content = a.size != b.size or _differs(pages_of(old_img, a.key), pages_of(new_img, b.key))
        change = difference(path, _traits(a), _traits(b), content=content)
        if change is not None:
            yield change


def _differs(old: Path | None, new: Path | None) -> bool:
    return pagesums.count(old, new).all > 0


def _traits(entry: TmpfsEntry | None) -> Traits | None:
    if entry is None:
        return None
    return Traits(
        kind=entry.kind,
        mode=entry.mode,
        owner=(entry.uid, entry.gid),
        size=entry.size if entry.kind == stat.S_IFREG else 0,
        device=entry.device,
        target=_name(entry.target) if entry.kind == stat.S_IFLNK else "",
        xattrs=entry.xattrs,
    )
