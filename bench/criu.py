"""The same workloads through criu(8): `criu dump --leave-running`, `criu restore`. Processes only, no files."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench.notes import Notes, wait
from bench.subject import REST_S, STILL_S, WORKLOAD, Saving, Size

if TYPE_CHECKING:
    from bench.place import Place


def obstacle() -> str | None:
    """Why criu can't be measured on this machine; None if it can."""
    if shutil.which("criu") is None:
        return "there is no criu on PATH"
    done = subprocess.run(["criu", "check"], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    said = (done.stderr or done.stdout).strip().splitlines()
    return f"criu check fails: {said[-1] if said else f'exit code {done.returncode}'}"


class CriuSubject:
    """One tree outside of any pod. What criu has restored takes its place: it has the same pids."""

    def __init__(self, place: Place, size: Size) -> None:
        self.directory = place.directory()
        self.notes = Notes(self.directory / "notes")
        self.images = self.directory / "images"
        with open(self.directory / "output", "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(WORKLOAD), str(self.notes.path), size.parameters()],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, cwd="/",
            )  # fmt: skip
        self.saved = 0
        self.notes.wait_for("ready", 1)

    def save(self) -> Saving:
        """Change, and a dump of everything. It isn't synced to the disk."""
        turns = self.notes.count("turn")
        os.kill(self.process.pid, signal.SIGUSR1)
        self.notes.wait_for("turn", turns + 1)
        watching = time.time_ns()
        time.sleep(STILL_S)
        shutil.rmtree(self.images, ignore_errors=True)
        self.images.mkdir()
        called = time.time_ns()
        self._criu("dump", "--tree", str(self.process.pid), "--leave-running")
        self.saved = time.time_ns()
        time.sleep(STILL_S)
        self._rest()
        inside = self.notes.longest_gap(called, self.saved)
        return Saving(inside, 0.0, (self.saved - called) / 1e6, self.notes.longest_gap(watching, called))

    def branch(self) -> float:
        """The tree is ended, and comes back: ms to its first instruction."""
        self._end()
        called = time.time_ns()
        self._criu("restore", "--restore-detached")
        self._rest()
        return (self.notes.awake(self.saved, called) - called) / 1e6

    def _rest(self) -> None:
        os.kill(self.process.pid, signal.SIGUSR2)
        self.notes.wait_for("rest", self.notes.count("turn"))
        time.sleep(REST_S)

    def _criu(self, verb: str, *words: str) -> None:
        command = ["criu", verb, "--images-dir", str(self.images), "--log-file", f"{verb}.log", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            log = self.images / f"{verb}.log"
            last = log.read_text(errors="replace").splitlines()[-3:] if log.exists() else [done.stderr]
            raise RuntimeError(f"{' '.join(command)}: {' / '.join(last)}")

    def _tree(self, pid: int) -> list[int]:
        pids = [pid]
        with contextlib.suppress(FileNotFoundError):
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                pids += self._tree(int(child))
        return pids

    def _end(self) -> None:
        """Until the pids are free again."""
        pids = self._tree(self.process.pid)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        wait(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids) or None, "a killed process stays")

    def close(self) -> None:
        """End it."""
        self._end()
