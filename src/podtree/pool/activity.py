"""How pods are being checkpointed: told from the index, so that nobody is disturbed by being looked at."""

from __future__ import annotations

import time

import msgspec

from podtree.pool import pending
from podtree.pool.pending import State
from podtree.pool.pool import Pool
from podtree.pool.records import PodRecord

WINDOW_S = 60.0


class Activity(msgspec.Struct, frozen=True, kw_only=True):
    """One pod. What is per second, and the pause, is of its checkpoints of the last WINDOW_S seconds."""

    id: str
    name: str
    state: str
    checkpoints: int  # that there are
    per_second: float
    pause_ms: float | None  # on average; None without one
    bytes_per_second: float
    bytes_written: int  # by all that there are
    last_durable_s: float | None  # ago
    pending: int  # captured or written, not durable yet
    lost: int


_QUERY = """
SELECT count(*), total(json_extract(summary, '$.bytes_written')), max(time_ns),
       count(*) FILTER (WHERE time_ns > ?2),
       avg(json_extract(summary, '$.pause_ms')) FILTER (WHERE time_ns > ?2),
       total(json_extract(summary, '$.bytes_written')) FILTER (WHERE time_ns > ?2)
FROM checkpoints WHERE pod = ?1
"""


def activity(pool: Pool, *, running: bool = True) -> list[Activity]:
    """Of all pods, or of those that run; oldest first."""
    now = time.time_ns()
    return [_of(pool, pod, now) for pod in pool.pods() if pod.is_running or not running]


def _of(pool: Pool, pod: PodRecord, now: int) -> Activity:
    window = min(WINDOW_S, max(1.0, (now - pod.created_ns) / 1e9))
    number, written, last, recent, pause, flow = pool.index.rows(_QUERY, pod.id, int(now - window * 1e9))[0]
    notes = pending.read(pool.pod_dir(pod.id))
    lost = sum(note.state is State.LOST for note in notes)
    return Activity(
        id=pod.id, name=pod.name, state=pod.state.value, checkpoints=number, per_second=round(recent / window, 3),
        pause_ms=None if pause is None else round(pause, 3), bytes_per_second=round(flow / window, 1),
        bytes_written=int(written), last_durable_s=None if last is None else round(max(0, now - last) / 1e9, 3),
        pending=len(notes) - lost, lost=lost,
    )  # fmt: skip
