"""What was measured, as a table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

FORMAT = 1


@dataclass
class Figure:
    """One row of the table: `what` was measured in a case, in `unit`, against the target if there is one."""

    case: str
    what: str
    unit: str
    target: float | None = None
    at_least: bool = False  # the target is a lower bound
    values: list[float] = field(default_factory=list)

    def median(self) -> float:
        """Half of the values are above."""
        return statistics.median(self.values)

    def p95(self) -> float:
        """One in twenty is worse."""
        ordered = sorted(self.values, reverse=self.at_least)
        return ordered[max(0, round(len(ordered) * 0.95) - 1)]

    def verdict(self) -> str:
        """reached or missed, by the median; nothing without a target."""
        if self.target is None:
            return ""
        good = self.median() >= self.target if self.at_least else self.median() <= self.target
        return "reached" if good else "missed"


class Book:
    """All figures, in the order in which they came first."""

    def __init__(self, *, targets: bool = True) -> None:
        self.targets = targets
        self.figures: dict[tuple[str, str], Figure] = {}
        self.left_out: list[str] = []  # there isn't the memory for it
        self.failed: list[str] = []

    def note(
        self, case: str, what: str, unit: str, value: float, target: float | None = None, *, at_least: bool = False
    ) -> None:
        """One more value."""
        new = Figure(case, what, unit, target if self.targets else None, at_least)
        self.figures.setdefault((case, what), new).values.append(value)

    def find(self, case: str, what: str) -> Figure | None:
        """The row, if there is one."""
        return self.figures.get((case, what))

    def by_case(self) -> list[Figure]:
        """The rows of one case side by side."""
        cases = list(dict.fromkeys(figure.case for figure in self.figures.values()))
        return sorted(self.figures.values(), key=lambda figure: cases.index(figure.case))


def table(book: Book) -> str:
    """For people; ratios to another tool after it."""
    lines = [f"{'':62}{'median':>10}{'p95':>10}  {'':6}{'target':>10}"]
    case = ""
    for one in book.by_case():
        if one.case != case:
            case = one.case
            lines.append(case)
        sign = "" if one.target is None else ">= " if one.at_least else "<= "
        target = "" if one.target is None else f"{sign}{_number(one.target)}"
        figures = f"{_number(one.median()):>10}{_number(one.p95()):>10}"
        lines.append(f"  {one.what:60}{figures}  {one.unit:6}{target:>10} {one.verdict()}")
    lines += [f"left out: {reason}" for reason in book.left_out]
    lines += [f"FAILED: {reason}" for reason in book.failed]
    return "\n".join(line.rstrip() for line in lines + _ratios(book))


def markdown(book: Book) -> str:
    """The rows that have a target, for a document."""
    lines = ["| case | what | median | p95 | target | |", "|---|---|---|---|---|---|"]
    for one in book.by_case():
        if one.target is not None:
            sign = "≥" if one.at_least else "≤"
            cells = (one.case, one.what, f"{_number(one.median())} {one.unit}", f"{_number(one.p95())} {one.unit}",
                     f"{sign} {_number(one.target)} {one.unit}", one.verdict())  # fmt: skip
            lines.append(f"| {' | '.join(cell.strip() for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _ratios(book: Book) -> list[str]:
    """Figures that another tool has as well: "WHAT by TOOL"."""
    lines = []
    for one in book.by_case():
        what, _, tool = one.what.partition(" by ")
        ours = book.find(one.case, what)
        if tool and ours is not None and ours.median():
            lines.append(f"{one.case}, {what}: {tool} takes {_number(one.median() / ours.median())} times as long")
    return lines


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def to_json(book: Book, rounds: int) -> str:
    """All values, and of which machine they are."""
    rows = [
        {
            "case": one.case, "what": one.what, "unit": one.unit, "target": one.target, "at_least": one.at_least,
            "median": one.median(), "p95": one.p95(), "verdict": one.verdict(), "values": one.values,
        }
        for one in book.by_case()
    ]  # fmt: skip
    whole = {
        "format": FORMAT,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {
            "kernel": platform.release(),
            "cpu": _field("/proc/cpuinfo", "model name"),
            "cpus": os.cpu_count(),
            "memory": _field("/proc/meminfo", "MemTotal"),
            "python": platform.python_version(),
        },
        "rounds": rounds,
        "left_out": book.left_out,
        "failed": book.failed,
        "rows": rows,
    }
    return json.dumps(whole, indent=1)


def _field(path: str, name: str) -> str:
    lines: Iterable[str] = Path(path).read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
