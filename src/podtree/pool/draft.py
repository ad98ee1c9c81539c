"""A checkpoint in the making."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from podtree.errors import PodtreeError
from podtree.pool import faults
from podtree.pool.records import CheckpointId, CheckpointMeta, CheckpointRecord, PodId, PodRecord
from podtree.pool.store import DraftDirectory

if TYPE_CHECKING:
    from podtree.pool.pool import Pool

META_VERSION = 2


class Draft:
    """From `Pool.begin_checkpoint` to `commit` or `abort`; holds the pod's lock all along.

    Order: flush_volume (the pod runs), snapshot_volume (the pod is frozen), snapshot_image (the live
    image directory is complete), commit. As a scope it aborts what wasn't committed. Whoever dies
    before the end of `commit` leaves a directory that the next `begin_checkpoint` or `gc` removes.
    """

    def __init__(self, pool: Pool, pod: PodRecord, directory: DraftDirectory, release: Callable[[], None]) -> None:
        self.id = CheckpointId(directory.path.name)
        self.dir: Path = directory.path
        self.pod_id: PodId = pod.id
        self._pool = pool
        self._pod = pod
        self._directory = directory
        self._release = release
        self._time_ns: int | None = None
        self._open = True
        self._live = pool.store.pod_dir(pod.id)
        self._take_volume = pool.store.volumes.prepare_snapshot(
            str(self._live / "vol"), str(directory.path / "vol")
        )

    @property
    def parent(self) -> CheckpointId | None:
        """The checkpoint that this one's pod descends from: the state that its memory differs from."""
        return self._pod.head

    def flush_volume(self) -> None:
        """Write out what is dirty in the volume, and wait: the snapshot of the frozen pod is quick then."""
        self._pool.store.volumes.flush(str(self._live / "vol"), str(self.dir / "flush"))

    def snapshot_volume(self) -> None:
        """The instant of the checkpoint. One system call."""
        self._take_volume()
        self._time_ns = time.time_ns()

    def snapshot_image(self) -> None:
        """Keep the live image directory as it is now; what is dirty in it is written out first."""
        self._pool.store.volumes.snapshot(str(self._live / "img"), str(self.dir / "img"))
        faults.point("commit:image")

    def commit(self, message: str = "", summary: dict[str, Any] | None = None) -> CheckpointRecord:
        """Make the checkpoint exist, durably. On any error it is aborted, and the error goes on."""
        if not self._open:
            raise PodtreeError("this draft has been committed or aborted already")
        try:
            if self._time_ns is None or not (self.dir / "img").exists():
                raise PodtreeError("a checkpoint needs both its volume and its image before it is committed")
            meta = CheckpointMeta(
                version=META_VERSION,
                id=self.id,
                pod=self.pod_id,
                pod_name=self._pod.name,
                number=self._pool.next_number(self.pod_id),
                parent=self._pod.head,
                time_ns=self._time_ns,
                message=message,
                summary=summary or {},
                spec=self._pod.spec,
            )
            self._pool.store.install_checkpoint(self._directory, meta)
            faults.point("commit:installed")
            record = self._pool.add_checkpoint(meta)
            faults.point("commit:indexed")
        except BaseException:
            if not self._pool.has_checkpoint(self.id):  # an interrupt may come right after the transaction
                self.abort()
            else:
                self._finish()
            raise
        self._finish()
        return record

    def _finish(self) -> None:
        self._open = False
        self._directory.close()
        self._release()

    def release_pod(self) -> None:
        """Let others work on the pod. The draft is only to be looked at from here on, and then aborted."""
        self._release()
        self._release = lambda: None

    def abort(self) -> None:
        """Leave nothing behind. Does nothing after commit or abort."""
        if not self._open:
            return
        self._open = False
        try:
            self._pool.store.drop(self._directory)
        finally:
            self._release()

    def __enter__(self) -> Draft:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

