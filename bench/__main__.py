"""`make bench`: pause, ready and durable of pods of several sizes, as a table and as JSON.

Three times apart. *pause*: how long the pod's processes stood still, as a program inside sees it that reads the clock
in a loop, and as podtree says. *ready*: from the call to the first instruction of the branch, as that program sees it.
*durable*: from the call until the checkpoint is safely on the disk. From the Python API, unless it says "command".
Cases are run in turn, round after round, so that what else the machine does falls on all of them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click

import podtree
from podtree.pod import control

WORKLOAD = Path(__file__).parent / "workload.py"
WARM_UP = 3
REST_S = 0.25


@dataclass(frozen=True)
class Size:
    """Arguments of workload.py."""

    megabytes: int
    changed_kb: int = 1024
    pattern: str = "sparse"
    file_kb: int = 100
    children: int = 0
    descriptors: int = 0

    def words(self) -> list[str]:
        """As workload.py wants them."""
        return [str(w) for w in (self.megabytes, self.changed_kb, self.pattern, self.file_kb, self.children,
                                 self.descriptors)]  # fmt: skip


@dataclass
class Figure:
    """One row of the table: what was measured, in `unit`, against the target if there is one."""

    name: str
    unit: str
    target: float | None
    values: list[float] = field(default_factory=list)

    def median(self) -> float:
        """Half of the values are above."""
        return statistics.median(self.values)

    def p95(self) -> float:
        """One in twenty is above."""
        return sorted(self.values)[max(0, round(len(self.values) * 0.95) - 1)]


class Pod:
    """A pod with the workload, measured again and again."""

    def __init__(self, pool: podtree.Pool, size: Size) -> None:
        self.pool = pool
        self.pod = pool.run(sys.executable, str(WORKLOAD), *size.words())
        while self.pod.log.count(b"ready") <= size.children:
            time.sleep(0.02)
        for _ in range(WARM_UP):
            time.sleep(REST_S)
            self.last = self.pod.checkpoint()

    def checkpoint(self) -> dict[str, float]:
        """One checkpoint: ms and bytes."""
        time.sleep(REST_S)
        self.pod.kill("USR1")
        time.sleep(0.05)
        begun = time.time_ns()
        self.last = self.pod.checkpoint()
        durable = time.time_ns()
        time.sleep(0.05)
        inside = [length for end, length in gaps(self.pool, self.pod) if begun < end < durable + 50_000_000]
        summary = self.last.summary
        return {
            "pause, inside": max(inside, default=0) / 1e6,
            "pause": summary["pause_ms"],
            "durable": (durable - begun) / 1e6,
            "bytes": summary["bytes_written"],
        }

    def branch(self) -> dict[str, float]:
        """One branch, which is removed again: ms."""
        begun = time.time_ns()
        pod = self.last.branch()[0]
        returned = time.time_ns()
        first = self._first(pod, begun)
        pod.remove(force=True)
        return {"ready": (first - begun) / 1e6, "call": (returned - begun) / 1e6}

    def rewind(self) -> dict[str, float]:
        """Back to the last checkpoint: ms."""
        begun = time.time_ns()
        self.pod.rewind(self.last)
        ready = (self._first(self.pod, begun) - begun) / 1e6
        self.last = self.pod.checkpoint()  # tracking begins anew: what that costs is no increment's
        return {"ready": ready}

    def _first(self, pod: podtree.Pod, since: int) -> int:
        """When the program first read the clock after `since`."""
        while True:
            found = [end for end, _ in gaps(self.pool, pod) if end > since]
            if found:
                return found[0]
            time.sleep(0.005)

    def close(self) -> None:
        """Remove it with all its checkpoints."""
        self.pod.remove(force=True)


def gaps(pool: podtree.Pool, pod: podtree.Pod) -> list[tuple[int, int]]:
    """(end, length) in ns of all gaps that the program in a pod has seen."""
    try:
        text = (control.dirs_of(pool.store, pod.id).vol / "upper/tmp/gaps").read_text()
    except FileNotFoundError:
        return []
    pairs = (line.split() for line in text.splitlines())
    return [(int(pair[0]), int(pair[1])) for pair in pairs if len(pair) == 2]


#: name, size, targets of (pause inside, branch ready, rewind) in ms
CASES: dict[str, tuple[Size, float | None, float | None, float | None]] = {
    "100 MB, 1 MB changed": (Size(100), 3, 8, 4),
    "100 MB, 1 MB dense": (Size(100, pattern="dense"), 3, 8, 4),
    "100 MB, 1 MB at random": (Size(100, pattern="random"), 3, 8, 4),
    "100 MB, 64 MB changed": (Size(100, 65536, "dense"), 20, None, None),
    "1 GB, 1 MB changed": (Size(1000), 8, 10, None),
    "10 processes, 200 MB": (Size(200, children=9), 10, 25, None),
    "100 processes, 1000 descriptors": (Size(200, children=99, descriptors=1000), 60, None, None),
    "4 GB, 1 MB changed": (Size(4000), 25, 12, None),
}


def measure_cases(pool: podtree.Pool, names: list[str], rounds: int) -> list[Figure]:
    """All cases in turn, `rounds` times."""
    figures: dict[str, Figure] = {}

    def note(name: str, unit: str, target: float | None, value: float) -> None:
        figures.setdefault(name, Figure(name, unit, target)).values.append(value)

    pods = {name: Pod(pool, CASES[name][0]) for name in names}
    try:
        for _ in range(rounds):
            for name, pod in pods.items():
                size, pause, ready, rewind = CASES[name]
                found = pod.checkpoint()
                note(f"{name}: pause, seen inside", "ms", pause, found["pause, inside"])
                note(f"{name}: pause, as told", "ms", pause, found["pause"])
                note(f"{name}: durable", "ms", None, found["durable"])
                changed = (size.changed_kb + size.file_kb) << 10
                note(f"{name}: space", "bytes", 1.1 * changed + (64 << 10), found["bytes"])
                found = pod.branch()
                note(f"{name}: branch ready", "ms", ready, found["ready"])
                if rewind is not None:
                    note(f"{name}: rewind ready", "ms", rewind, pod.rewind()["ready"])
    finally:
        for pod in pods.values():
            pod.close()
    return list(figures.values())


def measure_commands(pool: podtree.Pool, rounds: int) -> list[Figure]:
    """Whole commands, their own start included."""
    pod = pool.run("sleep", "1000000")
    program = str(Path(sys.executable).parent / "podtree")
    commands: dict[str, tuple[list[str], float | None]] = {
        "command ps": (["ps"], 100),
        "command checkpoint": (["checkpoint", pod.name], None),
        "command log": (["log"], 100),
        "command exec true": (["exec", pod.name, "--", "true"], None),
    }
    figures = []
    for name, (words, target) in commands.items():
        figure = Figure(name, "ms", target)
        for _ in range(rounds + 1):
            begun = time.monotonic()
            subprocess.run([program, *words], check=True, stdout=subprocess.DEVNULL)
            figure.values.append((time.monotonic() - begun) * 1e3)
        del figure.values[0]
        figures.append(figure)
    pod.remove(force=True)
    return figures


def measure_history(pool: podtree.Pool, length: int) -> list[Figure]:
    """Checkpoint number `length` against number 10: what history costs, as a ratio."""
    pod = Pod(pool, Size(100))
    early, late = [pod.checkpoint() for _ in range(7)], []
    oldest = pod.pod.checkpoints()[0]
    while len(pod.pod.checkpoints()) < length - 7:
        pod.last = pod.pod.checkpoint()
    late = [pod.checkpoint() for _ in range(7)]
    figures = []
    for what in ("pause", "durable", "bytes"):
        ratio = statistics.median(one[what] for one in late) / statistics.median(one[what] for one in early)
        figures.append(Figure(f"checkpoint {length} against 10: {what}", "times", 1.2, [ratio]))
    begun = time.monotonic()
    oldest.branch()[0].remove(force=True)
    took = (time.monotonic() - begun) * 1e3
    figures.append(Figure(f"branch of the oldest of {length}, and its removal", "ms", None, [took]))
    pod.close()
    return figures


def table(figures: list[Figure]) -> str:
    """For people."""
    lines = [f"{'':58}{'median':>12}{'p95':>12}{'target':>12}"]
    for one in figures:
        target = "" if one.target is None else f"{one.target:.4g}"
        reached = "" if one.target is None else ("  reached" if one.median() <= one.target else "  missed")
        digits = ".0f" if one.unit == "bytes" else ".2f"
        lines.append(f"{one.name:58}{one.median():12{digits}}{one.p95():12{digits}}{target:>12} {one.unit}{reached}")
    return "\n".join(lines)


@click.command()
@click.option("--rounds", default=15, show_default=True)
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), help="Only these.")
@click.option("--history", default=0, help="Also: a history of so many checkpoints.")
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Write all values there.")
def main(rounds: int, cases: tuple[str, ...], history: int, path: str | None) -> None:
    """Measure podtree on this machine, in a pool of its own."""
    parts: list[Callable[[podtree.Pool], list[Figure]]] = [
        lambda pool: measure_cases(pool, list(cases) or list(CASES), rounds),
    ]
    if not cases:
        parts.append(lambda pool: measure_commands(pool, rounds))
    if history:
        parts.append(lambda pool: measure_history(pool, history))
    with tempfile.TemporaryDirectory(prefix="podtree-bench-", dir="/var/tmp") as home:
        os.environ["PODTREE_HOME"] = home
        with podtree.Pool() as pool:
            figures = [figure for part in parts for figure in part(pool)]
        subprocess.run([str(Path(sys.executable).parent / "podtree"), "pool", "unmount"], check=True)
    click.echo(table(figures))
    if path:
        data = [{"name": f.name, "unit": f.unit, "target": f.target, "values": f.values} for f in figures]
        Path(path).write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
