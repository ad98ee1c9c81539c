"""Rewinds: a pod's processes, volume and image are put back to a checkpoint, in place.

All that isn't of the moment is made while the pod still runs, in control groups and a directory of its own. So what
can't be brought back is found before anything is ended; and it can be made ahead. Who rewinds a pod often does it
again, to the same checkpoint: after each rewind the next one is made ready (`Ahead`).
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from podtree.errors import PodtreeError, RestoreFailed
from podtree.pod import engine, nursery
from podtree.pod.dirs import PodDirs
from podtree.pool.records import CheckpointId

if TYPE_CHECKING:
    from podtree.pod.loop import Connection, Timer
    from podtree.pod.supervisor import Supervisor

_PAUSE_S = 0.2  # the pod has the processors, and its supervisor, for itself at first


class Rewind:
    """A rewind of a running pod to checkpoint `target`, made ready; to be dropped whether it was let go or not.

    `waits`: time may pass until it is. Raises what keeps the checkpoint from being brought back.
    """

    def __init__(self, supervisor: Supervisor, target: str, *, waits: bool = False) -> None:
        self._supervisor = supervisor
        self._reset = supervisor.pool.begin_reset(supervisor.pod_id, CheckpointId(target))
        try:
            dirs = PodDirs(supervisor.dirs.home, self._reset.directory, supervisor.dirs.run)
            self._group = supervisor.next_cgroup()
            try:
                self._restore = engine.prepare(supervisor, dirs, self._group, waits=waits)
            except BaseException:
                self._group.remove()
                raise
        except BaseException:
            self._reset.drop()
            raise

    def let_go(self, clients: list[Connection]) -> None:
        """End the pod's processes, and let these be the pod. Those attached to the former are added to `clients`."""
        supervisor = self._supervisor
        supervisor.kill_processes()
        self._restore.complete()  # while they die
        supervisor.await_end()
        clients += supervisor.take_clients()
        self._reset.commit()
        supervisor.install(self._restore.go(supervisor.dirs))

    def drop(self) -> None:
        """Leave nothing but what was let go."""
        if not self._restore.is_gone:
            self._restore.abandon()
            self._group.remove()
        self._reset.drop()


def rewind(supervisor: Supervisor, target: str) -> dict[str, Any]:
    """Put a running pod back to a checkpoint. Attached clients stay attached.

    A checkpoint that can't be brought back is refused while the pod still runs, and it runs on.
    """
    begun = time.monotonic()
    supervisor.running()
    supervisor.pool.checkpoint(CheckpointId(target))
    with supervisor.pool.lock_pod(supervisor.pod_id):
        if supervisor.spec.volumes:  # what it opens of the host's counts: the old pod has to be gone
            _rewind_after_the_end(supervisor, target)
        else:
            prepared = supervisor.ahead.take(target) or Rewind(supervisor, target)
            try:
                with _clients_kept(supervisor) as clients:
                    prepared.let_go(clients)
            finally:
                prepared.drop()
    ready_ms = round((time.monotonic() - begun) * 1e3, 3)
    supervisor.ahead.plan(target)
    pid = supervisor.running().init_pid
    name = supervisor.pool.pod(supervisor.pod_id).name  # a commit may have changed it
    return {"pod": name, "id": supervisor.pod_id, "pid": pid, "ready_ms": ready_ms}


def reset(supervisor: Supervisor, target: str) -> None:
    """Put the volume and the image of a pod that has ended back to a checkpoint."""
    from podtree.restore.verify import verify_image

    with supervisor.pool.begin_reset(supervisor.pod_id, CheckpointId(target)) as prepared:
        verify_image(prepared.directory / "img", engine.bounds(supervisor))
        prepared.commit()


def _rewind_after_the_end(supervisor: Supervisor, target: str) -> None:
    from podtree.restore.verify import verify_image

    with supervisor.pool.begin_reset(supervisor.pod_id, CheckpointId(target)) as prepared:
        verify_image(prepared.directory / "img", engine.bounds(supervisor))
        with _clients_kept(supervisor) as clients:
            supervisor.kill_processes()
            supervisor.await_end()
            clients += supervisor.take_clients()
            prepared.commit()
            supervisor.install(engine.restore(supervisor, supervisor.new_cgroup(), verified=True))


@contextlib.contextmanager
def _clients_kept(supervisor: Supervisor) -> Iterator[list[Connection]]:
    """Scope in which the pod is exchanged: who was attached, to be filled. What goes wrong in it ends the pod."""
    clients: list[Connection] = []
    try:
        yield clients
    except Exception as error:
        for client in clients:
            client.send({"exit": 255})
        supervisor.give_up()
        if isinstance(error, OSError):
            raise RestoreFailed(str(error)) from error
        raise
    supervisor.give_clients(clients)


class Ahead:
    """The next rewind of one pod, made ready. None of a pod that sees directories of the host: what it opens or locks
    there counts from the moment on that it does.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._made: tuple[str, Rewind] | None = None
        self._timer: Timer | None = None

    def plan(self, target: str) -> None:
        """Make one ready for `target` in a moment, in place of another."""
        self.drop()
        if nursery.STANDBY_S > 0 and not self._supervisor.spec.volumes:
            self._timer = self._supervisor.loop.later(_PAUSE_S, lambda: self._make(target))

    def _make(self, target: str) -> None:
        if self._supervisor.live is None:
            return
        if self._supervisor.live.filling is not None:  # memory comes in just now
            self._timer = self._supervisor.loop.later(_PAUSE_S, lambda: self._make(target))
            return
        try:
            self._made = target, Rewind(self._supervisor, target, waits=True)
        except PodtreeError:  # it can't wait, or has been discarded; the next rewind will say so, if so
            return
        except Exception:
            traceback.print_exc()
            return
        self._timer = self._supervisor.loop.later(nursery.STANDBY_S, self.drop)

    def take(self, target: str) -> Rewind | None:
        """The one that is ready, if it is that; it is the caller's."""
        made, self._made = self._made, None
        if made is not None and made[0] != target:
            made[1].drop()
            made = None
        self.drop()
        return made[1] if made else None

    def drop(self) -> None:
        """There is none from here on."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._made is not None:
            self._made[1].drop()
            self._made = None
