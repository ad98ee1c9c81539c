"""Stopping and letting go, against processes that are born, killed, stopped and that execute in the same instant.

Without pods: the programs of racing.c are children of the test, which freezes them again and again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from driver import until
from podtree.errors import Refused
from podtree.freeze import Freezer
from podtree.kernel import procfs

pytestmark = pytest.mark.needs("gcc")

FREEZES = 150


class Racer:
    """A program of racing.c. `rounds`: how many it has finished, one byte of output each."""

    def __init__(self, program: Path, case: str, directory: Path) -> None:
        self.out = directory / "out"
        self.errors = directory / "errors"
        with open(self.out, "wb") as out, open(self.errors, "wb") as errors:
            self.process = subprocess.Popen([program, case], stdout=out, stderr=errors, start_new_session=True)

    def rounds(self) -> int:
        assert self.process.poll() is None, self.errors.read_text()
        return self.out.stat().st_size

    def pids(self) -> list[int]:
        """The program's process and all below it."""
        found = [self.process.pid]
        for pid in found:
            try:
                for tid in procfs.threads(pid):
                    found += [int(p) for p in procfs.read_text(f"/proc/{pid}/task/{tid}/children").split()]
            except OSError:
                continue
        return found

    def states(self) -> str:
        """For a failure's message: who waits for what."""
        return subprocess.run(
            ["ps", "-L", "-o", "pid,ppid,lwp,stat,wchan:24,comm", "-g", str(self.process.pid)],
            capture_output=True,
            text=True,
        ).stdout

    def goes_on(self) -> None:
        """It finishes another round."""
        before = self.rounds()
        until(lambda: self.rounds() > before, "the program goes on", 60, dump=self.states)


@pytest.fixture
def racer(compiled: Callable[[str], Path], tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Racer]:
    racer = Racer(compiled("racing"), request.param, tmp_path)
    yield racer
    for pid in reversed(racer.pids()):
        with contextlib.suppress(ProcessLookupError):  # it spawns and ends all the time
            os.kill(pid, signal.SIGKILL)
    racer.process.wait()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "racer",
    [
        "killed",
        "ends",
        "thread_executes",
        "spawns",
        "threads_come_and_go",
        "stopped_and_continued",
        "ignored_signals",
        "blocked_within",
    ],
    indirect=True,
)
def test_nobody_is_lost(racer: Racer) -> None:
    """Frozen and let go at any instant, it goes on, its children are waited for, and no call fails."""
    freezer = Freezer(racer.pids)
    for number in range(FREEZES):
        freezer.freeze().release()
        assert not freezer.tend()
        if number % 10 == 0:
            racer.goes_on()
    racer.goes_on()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("racer", ["leader_ends"], indirect=True)
def test_leaders_end_before_their_threads(racer: Racer) -> None:
    """Whether traced or not when its leader ends, a process can be frozen, and its parent hears of its end."""
    freezer = Freezer(racer.pids)
    seen: set[bool] = set()
    for _ in range(FREEZES):
        before = racer.rounds()
        frozen = freezer.freeze()
        seen |= {process.leaderless for process in frozen.processes if not process.zombie}
        frozen.release()
        until(lambda before=before: not freezer.tend() and racer.rounds() > before, "it goes on", 60, every=0.0001)
    assert seen == {False, True}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("racer", ["limits_run_out"], indirect=True)
def test_timeouts_run_out_between_stops(racer: Racer) -> None:
    """A call with a timeout that is stopped more often than it lasts ends as it should, neither early nor never."""
    freezer = Freezer(racer.pids)
    wanted = racer.rounds() + 6

    def goes_on() -> bool:
        freezer.freeze().release()
        return racer.rounds() >= wanted

    until(goes_on, "the program's calls time out", 60, every=0.001, dump=racer.states)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("racer", ["stays_in_vfork"], indirect=True)
def test_parent_inside_of_vfork_is_refused(racer: Racer) -> None:
    """It can't be stopped: that is said, and when its child has gone on, so does it."""
    freezer = Freezer(racer.pids)
    until(lambda: len(racer.pids()) == 2, "the child is there")
    with pytest.raises(Refused, match="vfork"):
        for _ in range(100):
            freezer.freeze().release()
    while freezer.tend():
        pass
    racer.goes_on()
