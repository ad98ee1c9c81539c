"""A branch on its way: a pod that nobody knows of, until it is there with all its processes."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from podtree.beside import beside
from podtree.errors import NotFound
from podtree.pod import engine
from podtree.pod.live import LivePod
from podtree.pool.records import CheckpointId, PodRecord, PodState

if TYPE_CHECKING:
    from podtree.pod.supervisor import Supervisor


class Branch:
    """What `supervisor.start.branch` asks for, made ready; `let_go` or `abandon` has to follow.

    Raises whatever keeps it from coming to life; nothing is left in the pool then.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        start = supervisor.start
        self._pod = supervisor.pool.begin_branch(CheckpointId(str(start.branch)), supervisor.pod_id)
        try:
            self._restore = engine.prepare(
                supervisor, supervisor.dirs, supervisor.new_cgroup(), waits=start.standby
            )
        except BaseException:
            self._pod.abort()
            raise

    def let_go(self, name: str | None) -> tuple[PodRecord, LivePod]:
        """Let it be, under that name or an invented one, and run."""
        records: list[PodRecord] = []

        def publish() -> None:
            pids = {"init_pid": self._restore.init_pid, "monitor_pid": os.getpid()}
            records.append(self._pod.publish(name, **pids))

        try:
            with beside(publish):
                self._restore.complete()
        except BaseException:
            self.abandon()
            raise
        return records[0], self._restore.go()

    def abandon(self) -> None:
        """Leave nothing of it."""
        self._restore.abandon()
        self._pod.abort()
        pool, pod = self._supervisor.pool, self._pod.id
        with contextlib.suppress(NotFound):  # as it is, unless the index knew of it already
            pool.set_pod_state(pod, PodState.EXITED)
            pool.remove_pod(pod)
