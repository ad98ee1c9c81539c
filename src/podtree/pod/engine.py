"""Where the supervisor calls the checkpoint and restore engine, which is imported when it is first needed."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from podtree.errors import Problem, RestoreFailed
from podtree.kernel import caps
from podtree.objects.external import Policy
from podtree.pod import privileges
from podtree.pod.cgroup import Cgroup
from podtree.pod.dirs import PodDirs
from podtree.pod.live import LivePod
from podtree.pool import pending
from podtree.pool.pending import State
from podtree.pool.pool import LOCK_SECONDS
from podtree.pool.records import PodState

if TYPE_CHECKING:
    from podtree.pod.supervisor import Supervisor
    from podtree.pool.draft import Draft
    from podtree.restore.pod import Restore
    from podtree.restore.validate import Bounds


Lost = Callable[[RestoreFailed], None]
Captured = Callable[[dict[str, Any]], None]


class _Lazy:
    """A Checkpointer that is made at the first use: most pods never need one."""

    def __init__(self, live: LivePod, lost: Lost) -> None:
        self._live = live
        self._lost = lost
        self._made: Any = None
        self._unrecovered = False
        self._released = False

    def get(self) -> Any:
        if self._made is None:
            from podtree.checkpoint import Checkpointer

            self._made = Checkpointer(self._live)
        try:
            if self._unrecovered:
                self._made.recover()
                self._unrecovered = False
            self._made.settle_memory()
        except RestoreFailed as error:
            self._lost(error)
            raise
        return self._made

    def untouched(self) -> bool:
        return self._made is not None and bool(self._made.untouched())

    def recover(self) -> None:
        """Put right what a supervisor that was killed may have left in the pod.

        What goes wrong here must not keep the pod from having a supervisor: it is tried again, and
        raised, before the next checkpoint.
        """
        self._unrecovered = True
        try:
            self.get()
        except Exception:
            traceback.print_exc()

    def settle(self) -> None:
        """All memory of a restored pod has come in, or can't: the pod ends then."""
        try:
            self.get()
        except Exception:
            traceback.print_exc()

    def tend(self) -> bool:
        """Whether some task is still to be let go, when it stops: to be called again then."""
        return self._made is not None and bool(self._made.tend())

    def release(self) -> None:
        if self._released:
            return
        self._released = True
        filling = self._live.filling
        if filling is not None and (failure := filling.failure()) is not None:
            self._lost(failure)
        if self._made is not None:
            self._made.close()
        elif self._live.filling is not None:
            self._live.filling.abandon()


def checkpointer(live: LivePod, lost: Lost) -> _Lazy:
    """The pod's checkpointer. `lost` is told why, when the pod has to be ended for memory that can't come."""
    return _Lazy(live, lost)


def release(lazy: _Lazy | None) -> None:
    """The pod has ended: let go of its userfaultfds and whatever else."""
    if lazy is not None:
        lazy.release()


def check(supervisor: Supervisor, shared: Policy | None = None) -> list[Problem]:
    """What would keep a checkpoint from working now."""
    supervisor.running()
    problems: list[Problem] = supervisor.checkpointer.get().check(shared)
    return problems


class _Progress:
    """Tells everybody how far a checkpoint is, from when it is captured until it is durable or lost.

    `captured` is told once, with what can be said of it then; None: who asked for it waits.
    """

    def __init__(
        self, supervisor: Supervisor, draft: Draft, message: str, captured: Captured | None
    ) -> None:
        self._directory = supervisor.dirs.pod
        self._draft = draft
        self._message = message
        self._captured = captured
        self._note: pending.Pending | None = None
        self.since = 0.0  # time.monotonic() when it was captured

    def reached(self, state: State, pause_s: float) -> None:
        if self._note is None:
            self.since = time.monotonic()
            told = self._captured is not None
            self._note = pending.begun(self._draft.id, self._message, time.time_ns(), told=told)
            self._tell(state)
            if self._captured is None:
                return
            self._captured({"id": self._draft.id, "state": state.value, "pause_ms": round(pause_s * 1e3, 3)})
        else:
            self._tell(state)

    def _tell(self, state: State, error: str = "") -> None:
        """A full disk keeps the checkpoint from being written, and may keep this from being told."""
        if self._note is not None:
            with contextlib.suppress(OSError):
                pending.note(self._directory, msgspec.structs.replace(self._note, state=state, error=error))

    def failed(self, error: BaseException) -> None:
        """Lost, for who doesn't wait; who does hears of the error itself."""
        if self._captured is None:
            self.done()
            return
        self._tell(State.LOST, str(error) or type(error).__name__)

    def done(self) -> None:
        if self._note is None:
            return
        with contextlib.suppress(OSError):
            pending.forget(self._directory, self._draft.id)


def checkpoint(
    supervisor: Supervisor,
    *,
    stop: bool = False,
    message: str = "",
    recorded: bool = False,
    captured: Captured | None = None,
    notes: dict[str, Any] | None = None,
    shared: Policy | None = None,
) -> dict[str, Any]:
    """Save the pod. On any error nothing is left of the attempt and the pod goes on.

    `recorded`: it is the recorder's, who doesn't wait for other commands, and may be thinned. `captured` is called when
    the pod runs on; what fails from then on is noted as lost. `notes` go into its summary. `shared`: what becomes of
    what is shared with the outside; None: as the pod's spec says.
    """
    supervisor.running()
    draft = supervisor.pool.begin_checkpoint(supervisor.pod_id, 0 if recorded else LOCK_SECONDS)
    progress = _Progress(supervisor, draft, message, captured)
    try:
        with supervisor.pool.lock_pod(supervisor.pod_id), supervisor.tally.counted():
            try:
                summary: dict[str, Any] = supervisor.checkpointer.get().checkpoint(
                    draft, stop=stop, message=message, settle=supervisor.drain_output, reached=progress.reached,
                    notes={**({"recorded": True} if recorded else {}), **(notes or {})},
                    shared=shared,
                )  # fmt: skip
            except BaseException as error:
                progress.failed(error)
                raise
            progress.done()
    finally:
        draft.abort()  # nothing, once it was committed
    if stop:
        supervisor.final_state = PodState.STOPPED
    record = supervisor.pool.checkpoint(draft.id)
    summary["lag_ms"] = round((time.monotonic() - progress.since) * 1e3, 3)
    supervisor.tally.durable(summary)
    return {**summary, "id": record.id, "pod": record.pod_name, "number": record.number, "state": State.DURABLE.value}


def restore(supervisor: Supervisor, group: Cgroup, *, verified: bool = False) -> LivePod:
    """Bring the pod's image to life; the supervisor becomes the parent of its first process."""
    from podtree.restore.pod import restore_pod

    return restore_pod(
        supervisor.pod_id, supervisor.spec, supervisor.dirs, group, bounds(supervisor), verified=verified
    )


def prepare(supervisor: Supervisor, dirs: PodDirs, group: Cgroup, *, waits: bool) -> Restore:
    """As `restore`, of what lies in `dirs`, up to what is of the moment."""
    from podtree.restore.pod import Restore

    return Restore(supervisor.pod_id, supervisor.spec, dirs, group, bounds(supervisor), waits=waits)


def bounds(supervisor: Supervisor) -> Bounds:
    """What no process of the pod may exceed."""
    from podtree.restore.validate import Bounds

    return Bounds(caps.mask(privileges.DEFAULT_CAPS), supervisor.filter, supervisor.spec.nested)


def look(supervisor: Supervisor) -> Draft:
    """The pod as it is now, as a checkpoint that is not kept: it goes with `abort`."""
    supervisor.running()
    draft = supervisor.pool.begin_checkpoint(supervisor.pod_id)
    try:
        supervisor.checkpointer.get().checkpoint(draft, commit=False)
    except BaseException:
        draft.abort()
        raise
    draft.release_pod()
    return draft
