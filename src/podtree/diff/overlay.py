"""A tree of files as a pod sees it: the merge of an overlay's layers, made by looking at them one by one.

Source: Documentation/filesystems/overlayfs.rst (Linux 6.18): whiteouts, opaque directories, redirects. The lowest
layer is the host's root or a rootfs; as for the overlay, what is mounted on it doesn't show. No symbolic link is
followed: all of them belong to the pod's own world.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from podtree.kernel.below import open_below
from podtree.kernel.mount import clone_tree

_OPAQUE = "trusted.overlay.opaque"
_REDIRECT = "trusted.overlay.redirect"
_PRIVATE = "trusted.overlay."

Parts = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """A file in one layer. Names are as os.listdir gives them."""

    layer: int
    parts: Parts


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the merged tree. A directory has one place for each layer that contributes to it, topmost first."""

    info: os.stat_result
    places: tuple[Place, ...]

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.info.st_mode)


class Tree:
    """The merge of `layers`, topmost first. `own` of them are the pod's; the others are what lies below it."""

    def __init__(self, layers: Sequence[Path | str], own: int = 1) -> None:
        self.layers = [str(layer) for layer in layers]
        self.own = own
        self._tops: list[int] = []

    def __enter__(self) -> Tree:
        for index, layer in enumerate(self.layers):
            try:
                if index == len(self.layers) - 1:
                    self._tops.append(clone_tree(layer))  # without the mounts on it
                else:
                    self._tops.append(os.open(layer, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            except FileNotFoundError:
                self._tops.append(-1)
        return self

    def __exit__(self, *_exc: object) -> None:
        for fd in self._tops:
            if fd >= 0:
                os.close(fd)
        self._tops.clear()

    def top(self) -> Entry | None:
        """The tree's own directory; None when none of the layers is there."""
        places = tuple(Place(index, ()) for index, fd in enumerate(self._tops) if fd >= 0)
        return Entry(os.fstat(self._tops[places[0].layer]), places) if places else None

    def below(self, entry: Entry) -> tuple[tuple[str, Parts], ...]:
        """Which directories that aren't the pod's contribute: two trees with the same ones share what is in them."""
        return tuple((self.layers[p.layer], p.parts) for p in entry.places if p.layer >= self.own)

    @contextlib.contextmanager
    def opened(self, entry: Entry | None) -> Iterator[Listing]:
        """A directory (or none) to look into."""
        listing = Listing(self)
        try:
            for place in entry.places if entry is not None and entry.is_directory else ():
                fd = self.open(place, os.O_RDONLY | os.O_DIRECTORY)
                if fd is not None:
                    listing.directories.append((place, fd))
            yield listing
        finally:
            listing.close()

    def open(self, place: Place, flags: int) -> int | None:
        """Open a file of one layer, however deep; None when it isn't there."""
        fd = self._tops[place.layer]
        if fd < 0:
            return None
        try:
            return open_below(fd, place.parts, flags)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise

    def look(self, parts: Parts, layer: int) -> os.stat_result | None:
        """What lies at `parts` in one layer."""
        fd = self.open(Place(layer, parts), os.O_PATH | os.O_NOFOLLOW)
        if fd is None:
            return None
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def xattrs(self, entry: Entry) -> dict[str, bytes]:
        """The extended attributes that the pod can see."""
        return {name: value for name, value in self._raw_xattrs(entry.places[0]).items() if not _is_private(name)}

    def _raw_xattrs(self, place: Place) -> dict[str, bytes]:
        fd = self.open(place, os.O_PATH | os.O_NOFOLLOW)
        if fd is None:
            return {}
        try:
            path = f"/proc/self/fd/{fd}"  # of an O_PATH descriptor: the file itself, also a symbolic link
            return {name: os.getxattr(path, name) for name in os.listxattr(path)}
        except OSError as error:
            if error.errno in (errno.ENOTSUP, errno.ENODATA, errno.EPERM):
                return {}
            raise
        finally:
            os.close(fd)

    def link_target(self, entry: Entry) -> str:
        """Of a symbolic link."""
        fd = self.open(entry.places[0], os.O_PATH | os.O_NOFOLLOW)
        if fd is None:
            return ""
        try:
            return os.readlink("", dir_fd=fd)
        finally:
            os.close(fd)

    def resolve(self, first: list[Place]) -> Entry | None:
        """What the layers make of a name; `first`: where it would be in each layer that has its directory."""
        waiting = list(first)
        found: os.stat_result | None = None
        places: list[Place] = []
        while waiting:
            place = waiting.pop(0)
            info = self.look(place.parts, place.layer)
            if info is None:
                continue
            if _is_whiteout(info) or (places and not stat.S_ISDIR(info.st_mode)):
                break
            found = found or info
            places.append(place)
            if not stat.S_ISDIR(info.st_mode):
                break
            if place.layer >= len(self.layers) - 1:
                break
            marks = self._raw_xattrs(place)
            if marks.get(_OPAQUE) == b"y":
                break
            if _REDIRECT in marks:
                waiting = self._redirect(place, os.fsdecode(marks[_REDIRECT]), waiting)
        return None if found is None else Entry(found, tuple(places))

    def _redirect(self, place: Place, target: str, waiting: list[Place]) -> list[Place]:
        """A directory that was renamed: in the layers below it has another name, or lies somewhere else."""
        if target.startswith("/"):
            parts = tuple(part for part in target.split("/") if part)
            return [Place(layer, parts) for layer in range(place.layer + 1, len(self.layers))]
        return [Place(below.layer, (*below.parts[:-1], target)) for below in waiting]


class Listing:
    """A merged directory, opened."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.directories: list[tuple[Place, int]] = []

    def close(self) -> None:
        for _, fd in self.directories:
            os.close(fd)
        self.directories.clear()

    def names(self, *, own: bool = False) -> set[str]:
        """Names that may be in it, whiteouts included; with `own` only those in the pod's layers."""
        chosen = [fd for place, fd in self.directories if not own or place.layer < self.tree.own]
        return {name for fd in chosen for name in os.listdir(fd)}

    def entry(self, name: str) -> Entry | None:
        """What the pod sees there."""
        return self.tree.resolve([Place(place.layer, (*place.parts, name)) for place, _ in self.directories])


def _is_whiteout(info: os.stat_result) -> bool:
    """A 0:0 character device: the name is gone, whatever the layers below have."""
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0


def _is_private(name: str) -> bool:
    return name.startswith(_PRIVATE)
