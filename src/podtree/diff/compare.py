"""The two sides of a comparison, and its result."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from podtree.diff import files, memoryfiles, processes
from podtree.diff.files import FileChange
from podtree.diff.processes import ProcessChange
from podtree.errors import Damaged
from podtree.image import manifest as manifest_file
from podtree.image.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One side: the directories `img` and `vol` of a checkpoint, and what lies below its volume.

    Without `img`: a pod that has ended, of which only the files are left.
    """

    img: Path | None
    vol: Path
    lower: Path  # the read-only root file system

    def manifest(self) -> Manifest | None:
        """The checkpoint's manifest; raises Damaged."""
        if self.img is None:
            return None
        fd = os.open(self.img, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return manifest_file.load(fd)
        finally:
            os.close(fd)


class Difference(msgspec.Struct, frozen=True):
    """All that differs from the first to the second."""

    processes: tuple[ProcessChange, ...]
    files: tuple[FileChange, ...]


def diff(before: Snapshot, after: Snapshot) -> Difference:
    """Compare two checkpoints. Raises Damaged if one can't be read."""
    try:
        old, new = before.manifest(), after.manifest()
        changes = [
            *files.changes(files.trees(before.vol, before.lower), files.trees(after.vol, after.lower)),
            *memoryfiles.changes(before.img, old, after.img, new),
        ]
        return Difference(
            tuple(processes.changes(before.img, old, after.img, new)),
            tuple(sorted(changes, key=lambda change: change.path)),
        )
    except OSError as error:
        where = f": {os.fsdecode(error.filename)}" if error.filename else ""
        raise Damaged(f"can't be compared, {os.strerror(error.errno or 0)}{where}", "podtree fsck") from error
