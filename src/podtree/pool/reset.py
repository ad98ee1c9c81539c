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
    """Writable copies of a checkpoint's volume and image, to be put in the place of its pod's; holds the pod's lock.

    Made while the pod still runs: whatever keeps the checkpoint from being brought back can be found before the
    pod's processes are ended. As a scope it throws the copies away unless `commit` was called.
    """

    def __init__(self, pool: Pool, pod: PodId, checkpoint: CheckpointId) -> None:
        self._pool = pool
        self._pod = pod
        self._checkpoint = checkpoint
        self._base = base_token(checkpoint)
        self._scope = pool.lock_pod(pod)
        self._scope.__enter__()
        try:
            self._check_past()
            with pool.index.snapshot() as connection:  # it may be discarded meanwhile
                self._line = retention.line_of(connection, checkpoint)
            pool.make_room()
            self._directory = pool.store.prepare_reset(pod, pool.checkpoint_dir(checkpoint), self._base)
        except FileNotFoundError as error:
            self._unlock()
            raise Damaged(f"checkpoint {checkpoint} is incomplete: {error.filename}", "podtree fsck") from None
        except BaseException:
            self._unlock()
            raise

    @property
    def image(self) -> Path:
        """The image directory that the pod is going to have."""
        return self._directory.path / "img"

    def commit(self) -> None:
        """Exchange them with the pod's own, whose processes must be gone. Durable on return.

        Both change by one rename: after a crash the pod has the old ones or the new ones. Paths stay, open
        descriptors of the old ones go stale.
        """
        self._pool.store.exchange(self._directory, self._pod)
        faults.point("reset:durable")
        with self._pool.index.transaction() as connection:
            head = retention.first_known(connection, self._line)
            connection.execute("UPDATE pods SET head = ?, base = ? WHERE id = ?", (head, self._base, self._pod))

    def _check_past(self) -> None:
        with self._pool.index.snapshot() as connection:
            if retention.is_past(connection, self._pod, self._checkpoint):
                return
        wanted, pod = self._pool.checkpoint(self._checkpoint), self._pool.pod(self._pod)
        raise UsageError(
            f"{wanted.ref} is no checkpoint of pod {pod.name}, nor of what it was branched from",
            f"podtree branch {wanted.ref} makes a new pod",
        )

    def _unlock(self) -> None:
        self._scope.__exit__(None, None, None)

    def __enter__(self) -> Reset:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._pool.store.drop(self._directory)
        finally:
            self._unlock()
