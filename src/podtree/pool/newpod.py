"""A pod in the making."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from podtree.errors import Conflict, NotFound
from podtree.pool import rows
from podtree.pool.liveness import boot_id, start_time
from podtree.pool.records import CheckpointId, PodId, PodRecord, PodState
from podtree.pool.store import DraftDirectory

if TYPE_CHECKING:
    from podtree.pool.pool import Pool


class NewPod:
    """From `Pool.begin_pod` or `Pool.begin_branch` to `publish` or `abort`.

    Its directory is in its place, complete and durable, but the index doesn't know of it. Whoever dies before the end
    of `publish` leaves a directory that `gc` removes.
    """

    def __init__(
        self,
        pool: Pool,
        pod: PodId,
        spec: dict[str, Any],
        source: CheckpointId | None,
        invent: Callable[[], str],
        directory: DraftDirectory,
    ) -> None:
        self.id = pod
        self.spec = spec
        self._pool = pool
        self._source = source
        self._invent = invent
        self._directory = directory
        self._open = True

    def publish(self, name: str | None = None, *, init_pid: int = 0, monitor_pid: int = 0) -> PodRecord:
        """Let there be the pod, durably, under that name or an invented one; running, with these processes (see
        Pool.set_pod_state), if there are any. On any error it is aborted.

        Raises Conflict when the name is taken, NotFound when the checkpoint that it was made from has gone.
        """
        try:
            self._insert(name, init_pid, monitor_pid)
        except BaseException:
            if not self._pool.has_pod(self.id):  # an interrupt may come right after the transaction
                self.abort()
            raise
        self._open = False
        self._directory.close()
        return self._pool.pod(self.id)

    def _insert(self, name: str | None, init_pid: int, monitor_pid: int) -> None:
        state = PodState.RUNNING if init_pid else PodState.CREATED
        while True:
            candidate = name or self._invent()
            row = {
                "id": self.id,
                "name": candidate,
                "created_ns": time.time_ns(),
                "parent": self._source,
                "head": self._source,
                "base": self._pool.store.base_of(self.id),
                "state": state.value,
                "init_pid": init_pid or None,
                "init_start": start_time(init_pid) if init_pid else None,
                "monitor_pid": monitor_pid or None,
                "monitor_start": start_time(monitor_pid) if monitor_pid else None,
                "boot_id": boot_id() if init_pid else None,
                "spec": rows.as_json(self.spec),
            }
            try:
                with self._pool.index.transaction() as connection:
                    if connection.execute("SELECT 1 FROM tags WHERE name = ?", (candidate,)).fetchone():
                        raise Conflict(f"there is a tag {candidate} already")
                    columns, places = ", ".join(row), ", ".join("?" * len(row))
                    connection.execute(f"INSERT INTO pods ({columns}) VALUES ({places})", tuple(row.values()))
                return
            except sqlite3.IntegrityError as error:
                if "FOREIGN KEY" in str(error):
                    raise NotFound(f"checkpoint {self._source} has just been discarded") from None
                if name is not None:
                    raise Conflict(f"there is a pod {name} already", f"podtree rm {name}") from None

    def abort(self) -> None:
        """Leave nothing behind. Does nothing after `publish` or `abort`."""
        if self._open:
            self._open = False
            self._pool.store.drop(self._directory)
