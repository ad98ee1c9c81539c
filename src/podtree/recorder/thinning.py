"""Which recorded checkpoints may go: a pure function of their times and the rules."""

from __future__ import annotations

from collections.abc import Iterable

from podtree.pool.records import CheckpointId, Moment
from podtree.recorder.settings import Keep

_MINUTE_NS = 60 * 10**9
_HOUR_NS = 60 * _MINUTE_NS
_DAY_NS = 24 * _HOUR_NS


def surplus(moments: Iterable[Moment], keep: Keep, now_ns: int) -> list[CheckpointId]:
    """Those that no rule keeps, oldest first. Minutes, hours and days are those of UTC."""
    newest_first = sorted(moments, key=lambda one: (one.time_ns, one.id), reverse=True)
    kept = {one.id for one in newest_first[: keep.last]}
    kept |= {one.id for one in newest_first if one.time_ns > now_ns - keep.within_ns}
    for one in [one for one in newest_first if one.marked][: keep.marks]:
        kept |= {one.id} if one.before is None else {one.id, one.before}
    for number, unit in ((keep.minutely, _MINUTE_NS), (keep.hourly, _HOUR_NS), (keep.daily, _DAY_NS)):
        kept |= _last_of_each(newest_first, unit, number)
    if keep.max_bytes:
        kept = _fitting([one for one in newest_first if one.id in kept], keep.max_bytes)
    return [one.id for one in reversed(newest_first) if one.id not in kept]


def _fitting(newest_first: list[Moment], limit: int) -> set[CheckpointId]:
    """The newest ones that have written so many bytes together, at least the very newest."""
    kept: set[CheckpointId] = set()
    total = 0
    for one in newest_first:
        total += one.size
        if kept and total > limit:
            break
        kept.add(one.id)
    return kept


def _last_of_each(newest_first: list[Moment], unit_ns: int, number: int) -> set[CheckpointId]:
    """The last one of each of the `number` latest units that have any."""
    last: dict[int, CheckpointId] = {}
    for one in newest_first:
        unit = one.time_ns // unit_ns
        if unit not in last and len(last) == number:
            break
        last.setdefault(unit, one.id)
    return set(last.values())
