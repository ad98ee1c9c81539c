"""The recorder of one pod: takes a checkpoint at each tick, unless nothing has happened, and thins the old ones.

It lives in the pod's supervisor and is told the time by its loop. Whatever goes wrong with one checkpoint
(something can't be saved, the disk is full, another command has the pod): the pod goes on, the recorder
remembers why, and tries again at the next tick.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from podtree.errors import Conflict, PodtreeError
from podtree.pool.records import CheckpointId, Moment
from podtree.recorder.settings import Settings
from podtree.recorder.thinning import surplus

_MARK_EVERY_S = 1.0
_MARK_RETRY_S = 0.05
_MARKS_AT_ONCE = 8  # texts that are told of one moment
_SETTLE_S = 0.01  # from the pod's going on until its tasks wait again for what they waited for
_THIN_EVERY = 10  # checkpoints


class Cancelable(Protocol):
    """A call that was asked for, and that can be called off."""

    @property
    def pending(self) -> bool:
        """Whether it is still to come."""

    def cancel(self) -> None: ...


class Recorded(Protocol):
    """What the recorder needs of the pod's supervisor."""

    def later(self, seconds: float, call: Callable[[], object]) -> Cancelable:
        """Call once, so much later."""

    def pids(self) -> list[int]:
        """Host pids of the pod's processes."""

    def untouched(self) -> bool:
        """Whether no task has done anything since the last checkpoint but go on waiting."""

    def watch(self, mark: Callable[[str], None]) -> list[str]:
        """Call `mark` with a text when a moment is worth keeping, until `unwatch`; what can't be noticed here."""

    def unwatch(self) -> None:
        """The reverse. Does nothing when nothing is watched."""

    def record(self, message: str, notes: dict[str, Any]) -> dict[str, Any] | None:
        """Take a checkpoint now: its summary, or None if it can't be now and is no failure."""

    def moments(self) -> list[Moment]:
        """The recorded checkpoints that may be thinned."""

    def thin(self, gone: list[CheckpointId]) -> None:
        """Remove recorded checkpoints."""


class Status(msgspec.Struct):
    """What a recorder has done since it was set up."""

    taken: int = 0
    skipped: int = 0  # since nothing had happened
    failed: int = 0
    thinned: int = 0
    marked: int = 0
    unnoticed: tuple[str, ...] = ()  # what would be worth a mark, and can't be seen here
    pause_ms: float = 0.0  # in all
    lag_ms: float = 0.0  # of the last one: from when the pod went on until it was durable
    longest_lag_ms: float = 0.0
    last: str | None = None  # id
    error: str | None = None  # why the last attempt failed; None after one that didn't


class Recorder:
    """From `start` to `stop`."""

    def __init__(self, pod: Recorded, settings: Settings) -> None:
        self.settings = settings
        self.status = Status()
        self._pod = pod
        self._timers: list[Cancelable] = []
        self._resting: dict[int, str] | None = None  # CPU time of all tasks when nothing had happened yet
        self._marks: list[str] = []  # to be taken
        self._marked_at = -math.inf
        self._stopped = False

    def start(self) -> None:
        """The first checkpoint comes after one interval."""
        self.watch()
        self._in(self.settings.every_ns / 1e9, self._tick)

    def stop(self) -> None:
        """No more checkpoints."""
        self._stopped = True
        self._pod.unwatch()
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def _in(self, seconds: float, call: Callable[[], object]) -> None:
        self._timers.append(self._pod.later(seconds, call))

    def watch(self) -> None:
        """Be told of moments worth keeping: of this pod, as it runs now."""
        self.status.unnoticed = tuple(self._pod.watch(self._mark))

    def _mark(self, text: str) -> None:
        """At once, but not more often than once a second: a pod must not fill the pool with marks."""
        if not self._marks:
            self._in(max(0.0, self._marked_at + _MARK_EVERY_S - time.monotonic()), self._take_marks)
        self._marks = [*self._marks, text][-_MARKS_AT_ONCE:]

    def _take_marks(self) -> None:
        if self._stopped or not self._marks:
            return
        text = "; ".join(self._marks)
        before = {"marked_before": self.status.last} if self.status.last else {}
        self._marked_at = time.monotonic()
        taken, failed = self.status.taken, self.status.failed
        self._attempt(text, {"mark": text, **before})
        if self.status.taken > taken or self.status.failed > failed:
            self._marks.clear()
            self.status.marked += self.status.taken - taken
        else:  # another command has the pod just now
            self._in(_MARK_RETRY_S, self._take_marks)

    def _tick(self) -> None:
        """One attempt, and the order for the next."""
        if self._stopped:
            return
        self._timers = [timer for timer in self._timers if timer.pending]
        begun = time.monotonic()
        pause_s = 0.0
        if self._resting is not None and self._resting == cpu_times(self._pod.pids()):
            self.status.skipped += 1
        else:
            self._resting = None
            pause_s = self._attempt()
        took_s = time.monotonic() - begun
        # late is better than again at once: the supervisor has others to serve, and the pod its share of the time
        self._in(max(self.settings.every_ns / 1e9 - took_s, pause_s / self.settings.budget, took_s), self._tick)

    def _attempt(self, message: str = "", notes: dict[str, Any] | None = None) -> float:
        """Take a checkpoint; for how long the pod was stopped, in seconds."""
        status = self.status
        try:
            summary = self._pod.record(message, notes or {})
            if summary is None:
                return 0.0
            status.taken += 1
            status.last, status.error = summary["id"], None
            status.pause_ms += summary["pause_ms"]
            status.lag_ms = summary["lag_ms"]
            status.longest_lag_ms = max(status.longest_lag_ms, status.lag_ms)
            self._in(_SETTLE_S, self._settle)
            if status.taken % _THIN_EVERY == 0:
                self._thin()
            return float(summary["pause_ms"]) / 1e3
        except Conflict:  # another command has the pod just now
            return 0.0
        except (PodtreeError, OSError) as error:
            status.failed += 1
            status.error = str(error)
        except Exception as error:
            traceback.print_exc()
            status.failed += 1
            status.error = f"{type(error).__name__}: {error}"
        return 0.0

    def _settle(self) -> None:
        """Note how much the tasks had worked when all of them were back at waiting."""
        times = cpu_times(self._pod.pids())
        if self._pod.untouched():
            self._resting = times

    def _thin(self) -> None:
        gone = surplus(self._pod.moments(), self.settings.keep, time.time_ns())
        if gone:
            self._pod.thin(gone)
            self.status.thinned += len(gone)


def cpu_times(pids: list[int]) -> dict[int, str] | None:
    """What each task of these processes has used of the CPU, and how often: proc(5), /proc/PID/task/TID/schedstat.

    None where the kernel doesn't tell.
    """
    times: dict[int, str] = {}
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for tid in os.listdir(f"/proc/{pid}/task"):
                try:
                    with open(f"/proc/{pid}/task/{tid}/schedstat", encoding="ascii") as file:
                        times[int(tid)] = file.read()
                except FileNotFoundError:
                    if os.path.exists(f"/proc/{pid}/task/{tid}"):
                        return None
    return times
