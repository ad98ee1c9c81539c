"""References to checkpoints: the grammar, with no pool in sight.

    web            the pod's latest checkpoint; or a tag; or an id or a unique beginning of one
    web@3          the third checkpoint of pod web
    web@latest
    web@10s        as it was ten seconds ago (s, m, h, d, w; 1h30m)
    web@"2026-11-23 02:10"    as it was then, local time unless a zone is given; @"02:10" is today
"""

from __future__ import annotations

import re
import time
from datetime import datetime

import msgspec

from podtree.errors import UsageError
from podtree.pool.records import ID_DIGITS

LAST_NS = (1 << 63) - 1  # in the year 2262; the largest number that the index can hold
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[smhdw]))+")
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhdw])")
_UNIT_NS = {
    "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9, "d": 86400 * 10**9, "w": 7 * 86400 * 10**9,
}  # fmt: skip


class ByName(msgspec.Struct, frozen=True, tag=True):
    """A bare word: tag, pod, id or beginning of an id."""

    word: str


class ByNumber(msgspec.Struct, frozen=True, tag=True):
    """pod@N."""

    pod: str
    number: int


class Latest(msgspec.Struct, frozen=True, tag=True):
    """pod@latest."""

    pod: str


class AtTime(msgspec.Struct, frozen=True, tag=True):
    """pod@10s, pod@"time": the newest checkpoint taken then or before (CLOCK_REALTIME ns)."""

    pod: str
    time_ns: int


Reference = ByName | ByNumber | Latest | AtTime


def parse(text: str, now_ns: int | None = None) -> Reference:
    """Read a reference. Raises UsageError."""
    pod, at, rest = text.strip().partition("@")
    if not at:
        if not pod:
            raise UsageError("an empty reference", "say a pod, pod@N, pod@latest, pod@10s, a tag or an id")
        return ByName(pod)
    rest = rest.strip().strip("\"'")
    if not pod or not rest:
        raise UsageError(f"not a reference: {text!r}", "as in web@3, web@latest, web@10s, web@'2026-11-23 02:10'")
    if rest == "latest":
        return Latest(pod)
    if rest.isascii() and rest.isdigit():
        return ByNumber(pod, int(rest) if len(rest) < 19 else LAST_NS)
    if _DURATION.fullmatch(rest):
        return AtTime(pod, max(0, (time.time_ns() if now_ns is None else now_ns) - parse_duration(rest)))
    return AtTime(pod, parse_time(rest, now_ns))


def parse_duration(text: str) -> int:
    """'10s', '1h30m' as nanoseconds. Raises UsageError."""
    if not _DURATION.fullmatch(text):
        raise UsageError(f"not a duration: {text!r}", "as in 500ms, 10s, 5m, 2h, 1d, 1h30m")
    parts = _DURATION_PART.findall(text)
    return sum(round(min(float(value), LAST_NS) * _UNIT_NS[unit]) for value, unit in parts)


def parse_time(text: str, now_ns: int | None = None) -> int:
    """ISO 8601 date and time (or a time of today), as CLOCK_REALTIME nanoseconds. Raises UsageError."""
    full = text
    if re.match(r"\d{1,2}:", text):
        today = datetime.fromtimestamp((time.time_ns() if now_ns is None else now_ns) / 1e9)
        full = f"{today:%Y-%m-%d} {'0' if text[1] == ':' else ''}{text}"
    try:
        moment = datetime.fromisoformat(full)
        return min(max(0, round(moment.timestamp() * 1e9)), LAST_NS)
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            f"neither a number, nor a duration, nor a time: {text!r}", "as in @3, @latest, @10s, @'2026-11-23 02:10'"
        ) from None


def check_name(name: str, what: str) -> str:
    """A name that can stand in a reference, and can't be taken for an id. Raises UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} can't be the name of a {what}",
            "up to 63 letters, digits, '_', '.', '-', the first of them a letter or a digit",
        )
    if re.fullmatch(f"[0-9a-f]{{{ID_DIGITS}}}", name):
        raise UsageError(f"{name!r} can't be the name of a {what}: it looks like an id")
    return name
