"""What workload.py has noted, read from outside."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")
PATIENCE_S = 60.0
_POLL_S = 0.002


class NoAnswer(Exception):
    """The workload didn't do what it was told: a measurement that isn't one."""


class Notes:
    """The file of one workload. Times are ns of CLOCK_REALTIME: the only clock that a branch shares with others."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[list[str]]:
        """Whole lines only, as words."""
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return []
        return [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]

    def count(self, word: str) -> int:
        """How many notes of that kind there are."""
        return sum(line[0] == word for line in self.lines())

    def gaps(self) -> list[tuple[int, int]]:
        """(last reading, next reading) of the clock."""
        return [(int(line[1]), int(line[2])) for line in self.lines() if line[0] == "gap"]

    def longest_gap(self, begun: int, ended: int) -> float:
        """The longest one that touches this time, in ms; 0 when none was long enough to be noted."""
        return max((now - last for last, now in self.gaps() if now > begun and last < ended), default=0) / 1e6

    def awake(self, saved: int, called: int) -> int:
        """When a copy of the workload that was saved before `saved` and called back after `called` first ran."""

        def look() -> int | None:
            return next((now for last, now in self.gaps() if last <= saved and now >= called), None)

        try:
            return wait(look, "no first instruction is noted")
        except NoAnswer as error:
            rest = [" ".join(line) for line in self.lines()[-5:]]
            raise NoAnswer(f"{error}; {saved=}, {called=}, the last notes are {rest}") from None

    def wait_for(self, word: str, count: int) -> None:
        """Until there are so many notes of that kind."""
        wait(lambda: self.count(word) >= count or None, f"{self.path}: no {count} times {word!r}")


def wait(look: Callable[[], Found | None], problem: str) -> Found:
    """What `look` gives, as soon as it gives something. Raises NoAnswer."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = look()
        if found is not None:
            return found
        if time.monotonic() > deadline:
            raise NoAnswer(f"{problem}, after {PATIENCE_S:g} s")
        time.sleep(_POLL_S)
