"""What a recorder is told: how often, how much of the pod's time it may take, and what to keep."""

from __future__ import annotations

import re

import msgspec

from podtree.errors import UsageError
from podtree.pool import refs

LEAST_NS = 100_000_000  # ten checkpoints a second
DEFAULT_BUDGET = 0.1


class Keep(msgspec.Struct, frozen=True, kw_only=True):
    """Which recorded checkpoints stay; what no rule keeps goes. Of a minute, an hour, a day it is the last one.

    `last`: so many of the newest. `within_ns`: all that are younger. The others: of so many of the latest minutes,
    hours and days that have any. `marks`: so many of the latest marked ones, each with the one before. `max_bytes`:
    what all that stay have written, in bytes; above that the oldest go, whatever keeps them. 0: no limit.
    """

    last: int = 0
    within_ns: int = 0
    minutely: int = 0
    hourly: int = 0
    daily: int = 0
    marks: int = 100
    max_bytes: int = 0


KEEP_DEFAULT = Keep(last=1, within_ns=600 * 10**9, minutely=60, hourly=24, daily=30)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """A recorder's orders. `budget`: the largest share of its time for which the pod may be stopped.

    `external`: what becomes of what the pod shares with the outside (objects.external); None: as its spec says.
    """

    every_ns: int
    budget: float = DEFAULT_BUDGET
    keep: Keep = KEEP_DEFAULT
    external: str | None = None


def make(
    every: str,
    budget: str | None = None,
    *,
    last: int | None = None,
    within: str | None = None,
    minutely: int | None = None,
    hourly: int | None = None,
    daily: int | None = None,
    marks: int | None = None,
    max_size: str | None = None,
    external: str | None = None,
) -> Settings:
    """Settings from words: "1s", "2%". With any rule of what to keep given, only those given hold.

    Raises UsageError for what makes no sense.
    """
    every_ns = refs.parse_duration(every)
    if every_ns < LEAST_NS:
        raise UsageError(f"--every {every}: more often than ten times a second", "100ms is the least")
    rules = {"last": last, "minutely": minutely, "hourly": hourly, "daily": daily}
    wanted = {name: number for name, number in rules.items() if number is not None}
    for name, number in wanted.items():
        if number < 0:
            raise UsageError(f"--keep-{name} {number}: a negative number")
    if within is not None:
        wanted["within_ns"] = refs.parse_duration(within)
    keep = Keep(**{"last": 1, **wanted}) if wanted else KEEP_DEFAULT
    if marks is not None:
        if marks < 0:
            raise UsageError(f"--keep-marks {marks}: a negative number")
        keep = msgspec.structs.replace(keep, marks=marks)
    if max_size is not None:
        keep = msgspec.structs.replace(keep, max_bytes=_parse_size(max_size))
    share = DEFAULT_BUDGET if budget is None else _parse_share(budget)
    return Settings(every_ns=every_ns, budget=share, keep=keep, external=external)


def _parse_size(text: str) -> int:
    """"2g" as bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    size = int(float(match[1]) * (1 << (10 * " kmgt".index(match[2] or " ")))) if match else 0
    if size <= 0:
        raise UsageError(f"--max-size {text}: not a size", "for example 512m or 2g")
    return size


def _parse_share(text: str) -> float:
    """"2%" as 0.02."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    share = float(match[1]) / 100 if match else 0.0
    if not 0 < share <= 1:
        raise UsageError(f"--budget {text}: not a share", "as in 2%, of the pod's time")
    return share
