"""A rewind in the making."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from podtree.errors import Damaged, UsageError
from podtree.pool import faults, retention
from podtree.pool.records import CheckpointId, PodId, new_id

if TYPE_CHECKING:
    from podtree.pool.pool import Pool


def base_token(source: CheckpointId | None) -> str:
    """What `base` in a pod's directory says: whence, and a word that makes each rewind a different one."""
    return "" if source is None else f"{source} {new_id()}"


class Reset:
    """Writable copies of a checkpoint's volume and image, to be put in the place of its pod's.

    Made while the pod still runs: whatever keeps the checkpoint from being brought back can be found before the
    pod's processes are ended. As a scope it throws the copies away unless `commit` was called.
    """

    def __init__(self, pool: Pool, pod: PodId, checkpoint: CheckpointId) -> None:
        self._pool = pool
        self._pod = pod
        self._checkpoint = checkpoint
        self._base = base_token(checkpoint)
        self._check_past()
        with pool.index.snapshot() as connection:  # it may be discarded meanwhile
            self._line = retention.line_of(connection, checkpoint)
        pool.make_room()
        try:
            self._directory = pool.store.prepare_reset(pod, pool.checkpoint_dir(checkpoint), self._base)
        except FileNotFoundError as error:
            raise Damaged(f"checkpoint {checkpoint} is incomplete: {error.filename}", "podtree fsck") from None

    @property
    def directory(self) -> Path:
        """Where the copies lie: vol and img."""
        return self._directory.path

    def commit(self) -> None:
        """Exchange them with the pod's own, whose processes must be gone, and nobody else at work on it. Durable on
        return.

        Both change by one rename: after a crash the pod has the old ones or the new ones. Paths stay, open
        descriptors of the old ones go stale.
        """
        with self._pool.lock_pod(self._pod):
            self._pool.store.exchange(self._directory, self._pod)
            faults.point("reset:durable")
            with self._pool.index.transaction() as connection:
                head = retention.first_known(connection, self._line)
                connection.execute(
                    "UPDATE pods SET head = ?, base = ? WHERE id = ?", (head, self._base, self._pod)
                )

    def drop(self) -> None:
        """Throw the copies away, or after `commit` what was in their place."""
        self._pool.store.drop(self._directory)

    def _check_past(self) -> None:
        with self._pool.index.snapshot() as connection:
            if retention.is_past(connection, self._pod, self._checkpoint):
                return
        wanted, pod = self._pool.checkpoint(self._checkpoint), self._pool.pod(self._pod)
        raise UsageError(
            f"{wanted.ref} is no checkpoint of pod {pod.name}, nor of what it was branched from",
            f"podtree branch {wanted.ref} makes a new pod",
        )

    def __enter__(self) -> Reset:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.drop()
