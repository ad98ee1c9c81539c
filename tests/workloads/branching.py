"""What every real program goes through: two checkpoints under load, each branched twice, the origin running on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from driver import Pod, Podtree

Mark = Callable[[Pod, str], None]
"""Puts a word into the program's memory and into its files."""
Seen = Callable[[Pod], object]
"""The word as the program has it now; where several places have it, all of them must agree."""
GoesOn = Callable[[Pod], None]
"""Shows that the program's own work goes on, then makes it quiet: five lives at full load starve one another."""


@dataclass(frozen=True)
class Lives:
    """The origin, which ran on, and its branches: two from the first checkpoint, two from the second."""

    origin: Pod
    first: Pod
    first_again: Pod
    second: Pod
    second_again: Pod

    @property
    def all(self) -> list[Pod]:
        return [self.origin, self.first, self.first_again, self.second, self.second_again]


def branch_twice(podtree: Podtree, origin: Pod, mark: Mark, seen: Seen, goes_on: GoesOn | None = None) -> Lives:
    """Marks, checkpoints, marks, checkpoints, marks; branches; checks who sees which mark, then that they are apart.

    The origin is under full load at both checkpoints, and so are the branches when they come to life.
    """
    mark(origin, "one")
    first = origin.checkpoint()
    mark(origin, "two")
    second = origin.checkpoint()
    mark(origin, "three")
    pods = [origin]
    if goes_on:
        goes_on(origin)
    for id, wanted in ((first, "one"), (first, "one"), (second, "two"), (second, "two")):
        pods.append(podtree.branch(id, origin.name))
        expect(pods[-1], seen, wanted)
        if goes_on:
            goes_on(pods[-1])
    expect(origin, seen, "three")
    lives = Lives(*pods)
    names = ("origin-now", "first-now", "first-again-now", "second-now", "second-again-now")
    for pod, name in zip(lives.all, names, strict=True):
        mark(pod, name)
    for pod, name in zip(lives.all, names, strict=True):
        expect(pod, seen, name)
    return lives


def expect(pod: Pod, seen: Seen, wanted: str) -> None:
    """AssertionError unless the pod has the mark `wanted`."""
    found = seen(pod)
    assert found == wanted, f"{pod.name} sees {found} instead of {wanted}"


def line_count(pod: Pod, path: str) -> int:
    """How many lines a file inside has; 0 where there is none."""
    return int(pod.sh(f"cat {path} 2> /dev/null | wc -l"))


def lines_grow(pod: Pod, path: str, seconds: float = 60) -> None:
    """Waits until a file inside that the program appends to has more lines than now."""
    at = line_count(pod, path)
    pod.wait_output(f"cat {path} | wc -l", lambda out: int(out) > at, f"{path} grows", seconds)
