"""A pod with the workload in it, and what its checkpoints, branches and rewinds cost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import podtree
from bench.notes import Notes
from podtree.pod import control
from podtree.pool.pool import Pool as Store

WORKLOAD = Path(__file__).resolve().parent / "workload.py"
NOTES = "/tmp/notes"
REST_S = 0.3  # what a verb leaves to be done behind it is over
STILL_S = 0.05
PROGRAM = str(Path(sys.executable).parent / "podtree")


@dataclass(frozen=True)
class Size:
    """What workload.py is like; megabytes, kilobytes and descriptors are those of all its processes together."""

    megabytes: int
    changed_kb: int = 1024
    pattern: str = "sparse"
    file_kb: int = 100
    processes: int = 1
    threads: int = 1
    descriptors: int = 0
    throughout: bool = True  # goes on changing the same pages, ten times a second, while it is saved

    def parameters(self) -> str:
        """As workload.py wants them."""
        return json.dumps(asdict(self))

    def most_space(self) -> float:
        """What a checkpoint may take, in bytes."""
        return 1.1 * ((self.changed_kb + self.file_kb) << 10) + (64 << 10)


@dataclass(frozen=True)
class Saving:
    """What one checkpoint cost: ms."""

    pause_inside: float
    pause_told: float
    durable: float
    noise: float  # the longest gap in the time before, without a checkpoint


@contextlib.contextmanager
def own_pool(parent: Path) -> Iterator[podtree.Pool]:
    """A new pool, of which nothing is left behind."""
    home = Path(tempfile.mkdtemp(prefix="podtree-bench-", dir=parent))
    pool = podtree.Pool(home)
    try:
        yield pool
    finally:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})  # not in the middle of this
        try:
            for pod in pool.pods():
                pod.remove(force=True)
            pool.close()
            Store.close_home(home)
            shutil.rmtree(home)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def command(pool: podtree.Pool, *words: str) -> str:
    """Run podtree as a person would; its output."""
    env = {**os.environ, "PODTREE_HOME": str(pool.store.home)}
    return subprocess.run([PROGRAM, *words], check=True, stdout=subprocess.PIPE, text=True, env=env).stdout


class Subject:
    """One pod, measured again and again."""

    def __init__(self, pool: podtree.Pool, size: Size) -> None:
        self.pool = pool
        self.pod = pool.run(sys.executable, str(WORKLOAD), NOTES, size.parameters())
        self.notes(self.pod).wait_for("ready", 1)
        self.last: podtree.Checkpoint | None = None
        self.saved = 0

    def notes(self, pod: podtree.Pod) -> Notes:
        """What the workload in a pod has noted."""
        return Notes(control.dirs_of(self.pool.store, pod.id).vol / "upper" / NOTES.lstrip("/"))

    def go(self) -> None:
        """Have it change everything once; it watches the clock then."""
        turns = self.notes(self.pod).count("turn")
        self.pod.kill("USR1")
        self.notes(self.pod).wait_for("turn", turns + 1)

    def rest(self, pause_s: float = REST_S) -> None:
        """Have it do nothing, and let everybody else come to rest."""
        self.pod.kill("USR2")
        self.notes(self.pod).wait_for("rest", self.notes(self.pod).count("turn"))
        time.sleep(pause_s)

    def save(self) -> Saving:
        """Change, and a checkpoint."""
        self.go()
        watching = time.time_ns()
        time.sleep(STILL_S)
        called = time.time_ns()
        self.last = self.pod.checkpoint()
        self.saved = time.time_ns()
        time.sleep(STILL_S)
        self.rest()
        notes = self.notes(self.pod)
        return Saving(
            pause_inside=notes.longest_gap(called, self.saved),
            pause_told=self.last.summary["pause_ms"],
            durable=(self.saved - called) / 1e6,
            noise=notes.longest_gap(watching, called),
        )

    def save_unwatched(self) -> float:
        """The same as quickly as it goes, for the pause as told alone."""
        self.go()
        self.last = self.pod.checkpoint()
        self.saved = time.time_ns()
        self.rest(0)
        return self.last.summary["pause_ms"]

    def space(self) -> int:
        """Bytes by which a change and its checkpoint make the file system fuller."""
        volumes = self.pool.store.store.volumes
        volumes.wait_destroyed(30)
        volumes.make_durable()
        before = volumes.space().used
        self.save()
        volumes.make_durable()
        return volumes.space().used - before

    def branch(self, checkpoint: podtree.Checkpoint | None = None) -> float:
        """One branch, which is removed again: ms to its first instruction."""
        called = time.time_ns()
        pod = (checkpoint or self.last).branch()[0]
        return self._answered(pod, called)

    def branch_command(self) -> float:
        """The same by `podtree branch`."""
        called = time.time_ns()
        name = command(self.pool, "branch", self.last.id).split()[-1]
        return self._answered(self.pool.pod(name), called)

    def _answered(self, pod: podtree.Pod, called: int) -> float:
        ready = self.awake(pod, called) - called
        pod.remove(force=True)
        time.sleep(REST_S)
        return ready / 1e6

    def awake(self, pod: podtree.Pod, called: int) -> int:
        """When a pod brought back after `called` first ran."""
        pod.kill("USR2")
        return self.notes(pod).awake(self.saved, called)

    def rewind(self, *, by_command: bool = False) -> float:
        """A change, and back to the last checkpoint: ms to the first instruction."""
        self.go()
        self.rest()
        called = time.time_ns()
        if by_command:
            command(self.pool, "rewind", self.pod.id, self.last.id)
        else:
            self.pod.rewind(self.last)
        return (self.awake(self.pod, called) - called) / 1e6
