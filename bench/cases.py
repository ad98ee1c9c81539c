"""The table of cases, and how each kind of them is measured.

A case is data until it is started; what `start` gives is asked for one round after another and closed at the end.
Cases of one group live at the same time and are measured in turn.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from typing import Protocol

import podtree
from bench import memory, recorded, subject
from bench.criu import CriuSubject
from bench.figures import Book
from bench.place import Place
from bench.recorded import Recorded
from bench.subject import Size, Subject

__all__ = ["CASES", "Case", "Recorded", "quick"]


class Running(Protocol):
    """A case that is being measured."""

    def round(self, book: Book) -> None:
        """Measure everything once."""

    def close(self) -> None:
        """Leave nothing behind."""


class Case(Protocol):
    """A line of the table below."""

    name: str
    about: str
    group: str

    def megabytes(self) -> int:
        """How much memory it takes, branches included."""

    def start(self, place: Place) -> Running:
        """Make ready to measure."""


@dataclass(frozen=True)
class Tree:
    """Pause, durable, space, branch and rewind of one process tree; targets in ms."""

    name: str
    about: str
    size: Size
    pause: float
    ready: float | None = None
    rewind: float | None = None
    group: str = "trees"

    def megabytes(self) -> int:
        return 3 * self.size.megabytes  # itself, a branch or rewind, one made ready ahead

    def start(self, place: Place) -> Running:
        return _Tree(self, place)


class _Tree:
    def __init__(self, case: Tree, place: Place) -> None:
        self.case = case
        self.subject = Subject(place.pool, case.size)
        self.other = CriuSubject(place, case.size) if place.against else None

    def round(self, book: Book) -> None:
        case = self.case
        saving = self.subject.save()
        book.note(case.name, "pause, seen inside", "ms", saving.pause_inside, case.pause)
        book.note(case.name, "pause, as told", "ms", saving.pause_told, case.pause)
        book.note(case.name, "(longest gap without a checkpoint)", "ms", saving.noise)
        book.note(case.name, "durable", "ms", saving.durable)
        book.note(case.name, "branch ready, first of a checkpoint", "ms", self.subject.branch(), case.ready)
        self._let_it_make_ready()
        book.note(case.name, "branch ready, next of it", "ms", self.subject.branch(), case.ready)
        self._let_it_make_ready()
        book.note(case.name, "rewind ready, first to a checkpoint", "ms", self.subject.rewind(), case.rewind)
        self._let_it_make_ready()
        book.note(case.name, "rewind ready, next to it", "ms", self.subject.rewind(), case.rewind)
        self._let_it_make_ready()
        self.subject.save()  # what it costs to begin anew is no increment's
        book.note(case.name, "space", "KiB", self.subject.space() / 1024, case.size.most_space() / 1024)
        if self.other is not None:
            saving = self.other.save()
            book.note(case.name, "pause, seen inside by criu", "ms", saving.pause_inside)
            book.note(case.name, "durable by criu", "ms", saving.durable)
            book.note(case.name, "branch ready, first of a checkpoint by criu", "ms", self.other.branch())

    def _let_it_make_ready(self) -> None:
        """One more branch or rewind is made ready ahead after each, and all memory of it comes in."""
        time.sleep(2 * subject.REST_S + self.case.size.megabytes / 1000)

    def close(self) -> None:
        self.subject.pod.remove(force=True)
        if self.other is not None:
            self.other.close()


@dataclass(frozen=True)
class Commands:
    """Whole commands, their own start included."""

    name: str
    about: str
    size: Size
    group: str = "trees"

    def megabytes(self) -> int:
        return 3 * self.size.megabytes

    def start(self, place: Place) -> Running:
        return _Commands(self, place)


class _Commands:
    def __init__(self, case: Commands, place: Place) -> None:
        self.name = case.name
        self.subject = Subject(place.pool, case.size)

    def round(self, book: Book) -> None:
        one = self.subject
        one.save()
        book.note(self.name, "branch, to its first instruction", "ms", one.branch_command())
        book.note(self.name, "rewind, to its first instruction", "ms", one.rewind(by_command=True))
        one.save()  # what it costs to begin anew is no increment's
        one.go()
        one.rest()
        for words, target in (
            (("checkpoint", one.pod.id), None),
            (("exec", one.pod.id, "--", "true"), None),
            (("ps",), 100.0),
            (("log",), None),
        ):
            book.note(self.name, f"podtree {words[0]}", "ms", _command_ms(one.pool, *words), target)

    def close(self) -> None:
        self.subject.pod.remove(force=True)


def _command_ms(pool: podtree.Pool, *words: str) -> float:
    begun = time.monotonic()
    subject.command(pool, *words)
    return (time.monotonic() - begun) * 1e3


@dataclass(frozen=True)
class Storm:
    """Many branches of one checkpoint at the same time."""

    name: str
    about: str
    size: Size
    count: int
    group: str = "storm"

    def megabytes(self) -> int:
        return 6 * self.size.megabytes  # the least that tells anything

    def start(self, place: Place) -> Running:
        return _Storm(self, place)


class _Storm:
    STEP = 8
    RESERVE = 2 << 30  # bytes left to the machine

    def __init__(self, case: Storm, place: Place) -> None:
        self.case = case
        self.subject = Subject(place.pool, case.size)
        self.subject.save()
        self.one = memory.taken_by([self.subject.pod])
        self.count = self._most()

    def _most(self) -> int:
        """How many there can be on this machine."""
        pods: list[podtree.Pod] = []
        each = self.case.size.megabytes << 20
        while len(pods) < self.case.count and memory.settled() > self.RESERVE + self.STEP * each:
            pods += self.subject.last.branch(min(self.STEP, self.case.count - len(pods)))
        memory.remove(pods)
        return len(pods)

    def round(self, book: Book) -> None:
        name, count = self.case.name, self.count
        before = memory.settled()
        called = time.time_ns()
        pods = self.subject.last.branch(count)
        answered = max(self.subject.awake(pod, called) for pod in pods)
        book.note(name, "branches a second", "1/s", count / ((answered - called) / 1e9), 60, at_least=True)
        book.note(name, "alive at the same time, as memory allows", "", count, self.case.count, at_least=True)
        machine = before - memory.settled()
        taken = memory.taken_by(pods)
        book.note(name, "memory of all, to that of one", "times", taken.programs / self.one.programs, 2)
        book.note(name, "the same with their supervisors", "times", taken.whole / self.one.whole, 2)
        book.note(name, "what the machine had less, to that of one", "times", machine / self.one.whole, 2)
        memory.remove(pods)

    def close(self) -> None:
        self.subject.pod.remove(force=True)


@dataclass(frozen=True)
class History:
    """A pod with `length` checkpoints against one with ten, in pools of their own; rows are ratios."""

    name: str
    about: str
    size: Size
    length: int
    group: str = "history"
    early: int = 10
    growth: float = 1.2

    def megabytes(self) -> int:
        return 4 * self.size.megabytes

    def start(self, place: Place) -> Running:
        return _History(self, place)


class _History:
    def __init__(self, case: History, place: Place) -> None:
        self.case = case
        self.early = Subject(place.another_pool(), case.size)
        self.late = Subject(place.another_pool(), case.size)
        self.oldest: dict[Subject, podtree.Checkpoint] = {}
        self.pauses: list[float] = []
        for one, length in ((self.early, case.early), (self.late, case.length)):
            for _ in range(length):
                pause = one.save_unwatched()
                if one is self.late:
                    self.pauses.append(pause)
            self.oldest[one] = one.pod.checkpoints()[0]

    def round(self, book: Book) -> None:
        for pause in self.pauses:
            book.note(self.case.name, f"pause of numbers 1 to {self.case.length}, as told", "ms", pause)
        self.pauses = []
        early, late = self._measure(self.early), self._measure(self.late)
        for what, value in late.items():
            book.note(self.case.name, f"{what}: number {self.case.early}", "", early[what])
            book.note(self.case.name, f"{what}: number {self.case.length}", "", value)
            ratio = value / early[what] if early[what] else 1.0
            book.note(self.case.name, f"{what}: late to early", "times", ratio, self.case.growth)

    def _measure(self, one: Subject) -> dict[str, float]:
        saving = one.save()
        return {
            "pause, seen inside (ms)": saving.pause_inside,
            "pause, as told (ms)": saving.pause_told,
            "durable (ms)": saving.durable,
            "branch ready (ms)": one.branch(),
            "branch of the oldest ready (ms)": one.branch(self.oldest[one]),
            "space (KiB)": statistics.median(one.space() / 1024 for _ in range(3)),
            "podtree log (ms)": _command_ms(one.pool, "log"),
        }

    def close(self) -> None:
        self.early.pod.remove(force=True)
        self.late.pod.remove(force=True)


_100 = Size(100)
CASES: tuple[Tree | Commands | Storm | History | Recorded, ...] = (
    Tree("100mb", "100 MB, 1 MB changed, one page in sixteen; 100 KB in files", _100, 3, 8, 4),
    Tree("100mb-dense", "the same, pages side by side", replace(_100, pattern="dense"), 3, 8, 4),
    Tree("100mb-random", "the same, pages at random", replace(_100, pattern="random"), 3, 8, 4),
    Tree("100mb-threads", "the same with 32 threads", replace(_100, threads=32), 3, 8, 4),
    Tree("10-processes", "10 processes, 200 MB in all", Size(200, processes=10), 10, 25),
    Tree("64mb-changed", "64 MB of 100 changed before", replace(_100, changed_kb=65536, throughout=False), 20),
    Tree("64mb-changing", "64 MB of 100 changed ten times a second", replace(_100, changed_kb=65536), 20),
    Tree("100-processes", "100 processes, 1,000 descriptors", Size(200, processes=100, descriptors=1000), 60),
    Commands("commands", "whole commands on a pod of 100 MB", _100),
    Tree("1gb", "1 GB, 1 MB changed", Size(1024), 8, 10, group="large"),
    Tree("4gb", "4 GB, 1 MB changed", Size(4096), 25, 12, group="large"),
    Storm("64-branches", "64 branches of 500 MB at the same time", Size(500), 64),
    History("history", "checkpoint number 1,000 against number 10", _100, 1000),
    Recorded("recorded-redis", "redis-benchmark, recorded and not", recorded.REDIS, 400_000),
    Recorded("recorded-cc", "a C compile, recorded and not", recorded.COMPILE, 5),
    Recorded("recorded-numpy", "a NumPy loop, recorded and not", recorded.NUMPY, 300),
)


def quick(case: Case) -> Case:
    """The same in small: to see that it works, not for figures."""
    if isinstance(case, Recorded):
        return replace(case, amount=max(1, case.amount // 12))
    size = replace(case.size, megabytes=max(16, case.size.megabytes // 16), descriptors=case.size.descriptors // 10)
    size = replace(size, changed_kb=min(size.changed_kb, 4096), processes=max(1, size.processes // 3))
    if isinstance(case, Storm):
        return replace(case, size=size, count=4)
    if isinstance(case, History):
        return replace(case, size=size, length=20)
    return replace(case, size=size)
