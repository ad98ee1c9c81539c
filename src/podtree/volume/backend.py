"""What the pool asks of a volume backend. One implementation per kind of file system.

A *volume* is a writable directory tree at a path; a *snapshot* is one that nobody can change. The
pool knows nothing else of the file system below: every other thing it does there is ordinary files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec


class Space(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of the file system that holds the volumes."""

    size: int
    used: int
    free: int


class VolumeBackend(Protocol):
    """Contract, tested by tests/test_volume.py against every backend.

    `snapshot` and `create` need a destination that doesn't exist in a directory that does; the
    destination's parent must be on the same file system as the pool's root. All raise OSError.
    """

    name: str

    def create(self, path: str) -> None:
        """Make an empty volume at `path`."""

    def snapshot(self, source: str, path: str) -> None:
        """Make `path` an immutable copy of the volume or snapshot `source` as it is at one instant.

        On return its contents are durable.
        """

    def clone(self, source: str, path: str) -> None:
        """Make `path` a new volume that starts as a copy of the volume or snapshot `source`."""

    def prepare_snapshot(self, source: str, path: str) -> Callable[[], None]:
        """Everything that can be done before the instant of `snapshot(source, path)`.

        The function that comes back does the rest, once, as quickly as possible; the pod is frozen meanwhile.
        """

    def flush(self, source: str, scratch: str) -> None:
        """Write out what is dirty in the volume now, so that a `snapshot` soon after is quick.

        `source` may be in use and isn't changed. `scratch` is a free name that may be used meanwhile;
        who dies here may leave a snapshot of that name behind.
        """

    def destroy(self, path: str) -> None:
        """Remove a volume or snapshot. The name is gone on return, its space perhaps later."""

    def exists(self, path: str) -> bool:
        """Whether `path` is a volume or a snapshot of this backend."""

    def is_snapshot(self, path: str) -> bool:
        """Whether `path` is immutable."""

    def was_changed(self, path: str) -> bool:
        """Whether a snapshot isn't any more what it was when it was made: somebody got around its immutability.

        What was written since the last `write_out` may be overlooked.
        """

    def write_out(self) -> None:
        """On return everything that was written before, in all volumes, is on stable storage."""

    def make_durable(self) -> None:
        """On return all creations, removals and renames done before are on stable storage."""

    def wait_destroyed(self, timeout: float) -> bool:
        """Wait until the space of destroyed volumes is free; False if `timeout` seconds pass first."""

    def space(self) -> Space:
        """Bytes in all, used and free."""
