"""The recorder in a pod's supervisor: what it needs of it, and the request that sets it up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from podtree.errors import Conflict
from podtree.objects.external import Policy, policy
from podtree.pod import engine
from podtree.pod.loop import Timer
from podtree.pod.marks import MarkSources
from podtree.pool.records import CheckpointId, Moment
from podtree.recorder.recorder import Recorder
from podtree.recorder.settings import Settings

if TYPE_CHECKING:
    from podtree.pod.supervisor import Supervisor


class Recording:
    """A pod's supervisor as its recorder sees it (podtree.recorder.recorder.Recorded)."""

    def __init__(self, supervisor: Supervisor, external: Policy | None) -> None:
        self._supervisor = supervisor
        self._sources: MarkSources | None = None
        self._external = external

    def later(self, seconds: float, call: Callable[[], object]) -> Timer:
        return self._supervisor.loop.later(seconds, call)

    def pids(self) -> list[int]:
        live = self._supervisor.live
        return [] if live is None else live.pids()

    def untouched(self) -> bool:
        checkpointer = self._supervisor.checkpointer
        return checkpointer is not None and checkpointer.untouched()

    def watch(self, mark: Callable[[str], None]) -> list[str]:
        self.unwatch()
        supervisor = self._supervisor
        if supervisor.live is None:
            return []
        self._sources = MarkSources(supervisor.loop, supervisor.live, mark)
        return self._sources.start()

    def unwatch(self) -> None:
        if self._sources is not None:
            self._sources.stop()
            self._sources = None

    def record(self, message: str, notes: dict[str, Any]) -> dict[str, Any] | None:
        """None while a branch's memory is still coming in: the checkpoint would have to wait for it."""
        supervisor = self._supervisor
        if supervisor.live is None:
            return None
        if supervisor.live.filling is not None:
            supervisor.live.filling.hurry()
            return None
        try:
            return engine.checkpoint(
                supervisor, recorded=True, message=message, notes=notes, shared=self._external
            )
        finally:
            supervisor.tend()

    def moments(self) -> list[Moment]:
        return self._supervisor.pool.recorded(self._supervisor.pod_id)

    def thin(self, gone: list[CheckpointId]) -> None:
        self._supervisor.pool.thin(gone)


def begin(supervisor: Supervisor, settings: dict[str, Any]) -> Recorder:
    """A recorder with these settings, started."""
    orders = msgspec.convert(settings, Settings)
    recorder = Recorder(Recording(supervisor, policy(orders.external)), orders)
    recorder.start()
    return recorder


def describe(recorder: Recorder | None) -> dict[str, Any]:
    """What it does and has done, as data. Raises Conflict when there is none."""
    if recorder is None:
        raise Conflict("the pod isn't recorded", "podtree record POD --every 1s")
    settings = recorder.settings
    return {
        "every_ms": settings.every_ns / 1e6,
        "budget": settings.budget,
        "keep": msgspec.to_builtins(settings.keep),
        **msgspec.to_builtins(recorder.status),
    }
