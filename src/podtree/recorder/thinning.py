"""Which recorded checkpoints may go: a pure function of their times and the rules."""

from __future__ import annotations

from collections.abc import Iterable

from podtree.pool.records import CheckpointId
from podtree.recorder.settings import Keep

_MINUTE_NS = 60 * 10**9
_HOUR_NS = 60 * _MINUTE_NS
_DAY_NS = 24 * _HOUR_NS

Moment = tuple[int, CheckpointId]
"""CLOCK_REALTIME in ns, and the checkpoint of that instant."""


def surplus(moments: Iterable[Moment], keep: Keep, now_ns: int) -> list[CheckpointId]:
    """Those that no rule keeps, oldest first. Minutes, hours and days are those of UTC."""
    newest_first = sorted(moments, reverse=True)
    kept = {one for _, one in newest_first[: keep.last]}
    kept |= {one for at, one in newest_first if at > now_ns - keep.within_ns}
    for number, unit in ((keep.minutely, _MINUTE_NS), (keep.hourly, _HOUR_NS), (keep.daily, _DAY_NS)):
        kept |= _last_of_each(newest_first, unit, number)
    return [one for _, one in reversed(newest_first) if one not in kept]


def _last_of_each(newest_first: list[Moment], unit_ns: int, number: int) -> set[CheckpointId]:
    """The last one of each of the `number` latest units that have any."""
    last: dict[int, CheckpointId] = {}
    for at, one in newest_first:
        unit = at // unit_ns
        if unit not in last and len(last) == number:
            break
        last.setdefault(unit, one)
    return set(last.values())
