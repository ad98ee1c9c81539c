"""What recording costs real programs: each is timed unrecorded, at 1 Hz and at 10 Hz, again and again in turn.

Each run is in a pod of its own: what tracking and history leave behind in one doesn't slow the next.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import podtree
from bench.figures import Book
from bench.notes import NoAnswer, wait

if TYPE_CHECKING:
    from bench.place import Place

PROGRAMS = Path(__file__).resolve().parent / "programs.py"
PORT = "7399"


@dataclass(frozen=True)
class Program:
    """The pod's first process, a command that tells when it can be asked, and what is timed, given an amount."""

    server: tuple[str, ...]
    is_up: tuple[str, ...]
    timed: Callable[[int], tuple[str, ...]]


def _redis_benchmark(requests: int) -> tuple[str, ...]:
    return ("redis-benchmark", "-p", PORT, "-q", "-t", "set,get", "-r", "100000", "-n", str(requests))


def _own(name: str) -> Callable[[int], tuple[str, ...]]:
    return lambda amount: (sys.executable, str(PROGRAMS), name, str(amount))


REDIS = Program(("redis-server", "--port", PORT, "--save", ""), ("redis-cli", "-p", PORT, "ping"), _redis_benchmark)
COMPILE = Program(("sleep", "1000000"), ("gcc", "--version"), _own("compile"))
NUMPY = Program(("sleep", "1000000"), (sys.executable, "-c", "import numpy"), _own("numpy"))

RATES: dict[str, tuple[str, float]] = {"1 Hz": ("1s", 2), "10 Hz": ("100ms", 10)}  # and how many % slower it may be


@dataclass(frozen=True)
class Recorded:
    """One program at all rates; `amount` of what it does takes some seconds."""

    name: str
    about: str
    program: Program
    amount: int
    group: str = "recorded"

    def megabytes(self) -> int:
        return 1000

    def start(self, place: Place) -> _Recorded:
        return _Recorded(self, place.pool)


class _Recorded:
    def __init__(self, case: Recorded, pool: podtree.Pool) -> None:
        self.case = case
        self.pool = pool
        self.turn = 0

    def round(self, book: Book) -> None:
        """One run of each kind; who comes first changes from round to round."""
        rates: list[str | None] = [None, *RATES]
        self.turn += 1
        first = self.turn % len(rates)
        runs = {rate: self._run(rate) for rate in rates[first:] + rates[:first]}
        unrecorded, _, _ = runs[None]
        book.note(self.case.name, "unrecorded", "s", unrecorded)
        for rate, (_, target) in RATES.items():
            took, taken, failed = runs[rate]
            book.note(self.case.name, f"slower at {rate}", "%", (took / unrecorded - 1) * 100, target)
            book.note(self.case.name, f"(checkpoints a second at {rate})", "1/s", taken / took)
            if failed:
                book.note(self.case.name, f"(checkpoints that failed at {rate})", "", failed)

    def _run(self, rate: str | None) -> tuple[float, int, int]:
        """Seconds, and how many checkpoints were taken and failed."""
        program = self.case.program
        pod = self.pool.run(*program.server)
        try:
            wait(lambda: pod.exec(*program.is_up).returncode == 0 or None, f"{program.server[0]} doesn't come up")
            if rate is not None:
                pod.start_recording(RATES[rate][0])
            begun = time.monotonic()
            done = pod.exec(*program.timed(self.case.amount))
            took = time.monotonic() - begun
            if done.returncode:
                raise NoAnswer(f"{self.case.name}: {done.stderr.decode(errors='replace')}")
            if rate is None:
                return took, 0, 0
            how = pod.recording
            if how is None or not how["taken"]:
                raise NoAnswer(f"{self.case.name} was not recorded: {how and how['error']}")
            return took, how["taken"], how["failed"]
        finally:
            pod.remove(force=True)

    def close(self) -> None:
        """Each run has cleaned up."""
