"""The `podtree` command as a person uses it, for tests: run it, read what it prints, wait for things.

Everything goes through the command line in a process of its own; nothing here imports podtree.
Waits poll with a deadline, and a wait that fails shows what the pods were doing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

TESTS = Path(__file__).resolve().parent
PROJECT = TESTS.parent
PROGRAMS = TESTS / "programs"
WORKLOADS = TESTS / "workloads"
BUILD = PROJECT / "build" / "tests"
"""Compiled programs. In the project, since a pod sees the host's root file system and /tmp may be another."""

SYSTEM_PYTHON = "/usr/bin/python3" if os.access("/usr/bin/python3", os.X_OK) else sys.executable
"""For programs in pods: every user may read it, unlike an interpreter below /root."""

SLOW = float(os.environ.get("PODTREE_TEST_SLOWNESS", "1"))
"""Factor on every deadline, for slow machines."""

Found = TypeVar("Found")


class CommandFailed(AssertionError):
    """A `podtree` command ended otherwise than the test expected; the message holds all it printed."""


@dataclass(frozen=True)
class Done:
    """A command that ended: its exit code (negative: by that signal), what it printed, its wall time in s."""

    args: Sequence[str]
    code: int
    out: str
    err: str
    seconds: float

    def __str__(self) -> str:
        words = " ".join(self.args)
        return f"podtree {words} -> {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


def until(
    probe: Callable[[], Found | None],
    what: str,
    seconds: float = 30,
    every: float = 0.05,
    dump: Callable[[], str] = str,
) -> Found:
    """Calls `probe` until it returns something true, and returns that.

    AssertionError naming `what`, with `dump()`, when that has not happened after `seconds`.
    """
    deadline = time.monotonic() + seconds * SLOW
    while True:
        found = probe()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds:g} s\n{dump()}")
        time.sleep(every)


class Podtree:
    """One PODTREE_HOME and the command on it."""

    def __init__(self, home: Path, program: Path | None = None) -> None:
        self.home = home
        self.program = program or Path(sys.executable).parent / "podtree"
        self.env = {**os.environ, "PODTREE_HOME": str(home)}
        self.pod_ids: set[str] = set()  # all that were ever made: the leftovers test looks for their traces
        self._numbers = itertools.count(1)

    # ---- running commands

    def __call__(self, *args: str | Path, code: int | None = 0, timeout: float = 60, stdin: str | None = None) -> Done:
        """Runs `podtree ARGS`. CommandFailed unless it ends with `code` (None: any) within `timeout` s."""
        words = [str(arg) for arg in args]
        began = time.monotonic()
        process = subprocess.Popen(
            [str(self.program), *words],
            env=self.env,
            stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            out, err = process.communicate(stdin, timeout=timeout * SLOW)
        except subprocess.TimeoutExpired:
            state = self.dump(extra=[process.pid])
            process.kill()
            out, err = self._rest(process)
            raise CommandFailed(
                f"podtree {' '.join(words)}: still running after {timeout:g} s\n"
                f"--- stdout\n{out}\n--- stderr\n{err}\n{state}"
            ) from None
        done = Done(words, process.returncode, out, err, time.monotonic() - began)
        if code is not None and done.code != code:
            raise CommandFailed(f"expected exit code {code}\n{done}")
        return done

    @staticmethod
    def _rest(process: subprocess.Popen[str]) -> tuple[str, str]:
        """What a killed command had printed; a process that still holds its pipes is not waited for."""
        try:
            return process.communicate(timeout=2)
        except subprocess.TimeoutExpired:
            return "", "(its pipes are still held open by another process)"

    def json(self, *args: str | Path, timeout: float = 60) -> Any:
        """The object that `podtree ARGS --json` prints. Words for a program, after `--`, stay last."""
        words = [str(arg) for arg in args]
        at = words.index("--") if "--" in words else len(words)
        done = self(*words[:at], "--json", *words[at:], timeout=timeout)
        try:
            return json.loads(done.out)
        except ValueError as error:
            raise CommandFailed(f"not JSON ({error}):\n{done}") from None

    def json_of(self, *args: str | Path, code: int) -> Any:
        """The one object that `podtree ARGS` prints when it ends with `code`; `--json` is among the words."""
        return json.loads(self(*args, code=code).out)

    # ---- pods

    def new_name(self, stem: str) -> str:
        """A pod name that this session has not used."""
        return f"{stem}-{next(self._numbers)}"

    def run(self, *command: str | Path, name: str = "pod", options: Sequence[str | Path] = ()) -> Pod:
        """`podtree run -d` with `options`; returns as soon as the command does."""
        pod = Pod(self, self.new_name(name))
        self("run", "-d", "--name", pod.name, *visible_project(), *options, "--", *command)
        self.note_pods()
        return pod

    def branch(self, ref: str, name: str | None = None) -> Pod:
        """`podtree branch`: a new pod from a checkpoint, running when this returns."""
        pod = Pod(self, self.new_name(name or "branch"))
        answer = self.json("branch", ref, "--name", pod.name)
        objects = answer if isinstance(answer, list) else [answer]
        assert len(objects) == 1, f"one branch was asked for: {answer}"
        self.note_pods()
        return pod

    def pods(self) -> list[dict[str, Any]]:
        """`podtree ps --json`."""
        found = self.json("ps")
        assert isinstance(found, list), found
        return found

    def note_pods(self) -> None:
        """Remembers the ids of all pods that exist now."""
        with contextlib.suppress(OSError):
            self.pod_ids.update(path.name for path in (self.home / "pool" / "pods").iterdir())

    def remove_all(self) -> None:
        """Ends and removes every pod, and every checkpoint that only they used."""
        self.note_pods()
        for pod in self.pods():
            self("rm", "--force", pod["name"], code=None)

    def close(self) -> None:
        """Removes all pods and unmounts the pool; the home directory stays, for whoever made it."""
        if (self.home / "pool").exists():
            self.remove_all()
            self("pool", "unmount")

    # ---- what is going on

    def dump(self, extra: Sequence[int] = ()) -> str:
        """All processes of this home's pods and supervisors: state and where in the kernel each thread waits."""
        lines = ["--- processes of this PODTREE_HOME"]
        for pid in sorted({*self.processes(), *extra}):
            lines += describe(pid)
        return "\n".join(lines)

    def processes(self) -> list[int]:
        """Host pids of everything that belongs to this home: by environment, command line or control group."""
        home = str(self.home).encode()
        marks = [home, *(pod_id.encode() for pod_id in self.pod_ids)]
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                text = (entry / "cgroup").read_bytes() + (entry / "cmdline").read_bytes()
                if any(mark in text for mark in marks) or b"PODTREE_HOME=" + home in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found


def describe(pid: int) -> list[str]:
    """Lines about a process and its threads, from /proc; empty when it is gone."""
    lines = []
    with contextlib.suppress(OSError):
        task = Path(f"/proc/{pid}")
        words = (task / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:160]
        lines.append(f"{pid}: {words}")
        for thread in sorted((task / "task").iterdir()):
            fields = {}
            for line in (thread / "status").read_text().splitlines():
                key, _, value = line.partition(":")
                fields[key] = value.strip()
            where = (thread / "wchan").read_text()
            call = (thread / "syscall").read_text().split(" ")[0].strip()
            lines.append(
                f"    {thread.name} {fields['Name']} {fields['State']} tracer={fields['TracerPid']}"
                f" nspid={fields.get('NSpid', '')!r} wchan={where} syscall={call}"
                f" pending={fields['SigPnd']}/{fields['ShdPnd']} blocked={fields['SigBlk']}"
            )
    return lines


def visible_project() -> list[str]:
    """Options that show the project inside a pod where it doesn't lie on the root file system."""
    if PROJECT.stat().st_dev == os.stat("/").st_dev:
        return []
    return ["-v", f"{PROJECT}:{PROJECT}:ro"]


class Pod:
    """A pod by its name. Nothing is cached: each question is a `podtree` command."""

    def __init__(self, podtree: Podtree, name: str) -> None:
        self.podtree = podtree
        self.name = name

    def __repr__(self) -> str:
        return f"Pod({self.name})"

    def exec(self, *command: str | Path, code: int | None = 0, timeout: float = 60, stdin: str | None = None) -> str:
        """What a command started inside prints."""
        return self.podtree("exec", self.name, "--", *command, code=code, timeout=timeout, stdin=stdin).out

    def sh(self, script: str, code: int | None = 0, timeout: float = 60) -> str:
        """What a shell script started inside prints, without the last line end."""
        return self.exec("sh", "-c", script, code=code, timeout=timeout).rstrip("\n")

    def python(self, script: str, timeout: float = 60) -> str:
        """What a Python program started inside prints, without the last line end."""
        return self.exec(SYSTEM_PYTHON, "-c", script, timeout=timeout).rstrip("\n")

    def read(self, path: str | Path) -> str:
        """A file as seen inside."""
        return self.exec("cat", path)

    def logs(self) -> str:
        """All that the pod has printed."""
        return self.podtree("logs", self.name).out

    def wait_log(self, text: str, seconds: float = 30, count: int = 1) -> str:
        """Waits until the log has `text` (`count` times) and returns the log."""

        def probe() -> str | None:
            log = self.logs()
            return log if log.count(text) >= count else None

        return until(probe, f"{self.name} prints {text!r}", seconds, 0.1, self._state)

    def wait_output(self, script: str, wanted: Callable[[str], bool], what: str, seconds: float = 30) -> str:
        """Runs a shell script inside until what it prints is `wanted`."""

        def probe() -> str | None:
            done = self.podtree("exec", self.name, "--", "sh", "-c", script, code=None)
            return done.out if done.code == 0 and wanted(done.out) else None

        return until(probe, f"{self.name}: {what}", seconds, 0.1, self._state)

    def _state(self) -> str:
        log = self.podtree("logs", self.name, code=None)
        return f"--- log of {self.name}\n{log.out[-4000:]}{log.err}\n{self.podtree.dump()}"

    def info(self) -> dict[str, Any]:
        """This pod's object of `podtree ps --json`."""
        found = [pod for pod in self.podtree.pods() if pod["name"] == self.name]
        assert len(found) == 1, f"{self.name} in podtree ps: {found}"
        return found[0]

    def running(self) -> bool:
        """Whether `podtree ps` says so."""
        return bool(self.info()["state"] == "running")

    def checkpoint(self, *options: str, timeout: float = 120) -> str:
        """`podtree checkpoint`; returns the checkpoint's id."""
        answer = self.podtree.json("checkpoint", self.name, *options, timeout=timeout)
        assert {"id", "pause_ms", "total_ms", "bytes_written", "processes"} <= set(answer), answer
        return str(answer["id"])

    def kill(self, signal_name: str = "KILL") -> None:
        """`podtree kill`."""
        self.podtree("kill", "-s", signal_name, self.name)

    def wait(self, seconds: float = 60) -> int:
        """The exit code of the pod, once it has ended; fails when that takes more than `seconds`."""
        return int(self.podtree("wait", self.name, timeout=seconds).out)

    def remove(self) -> None:
        """`podtree rm --force`."""
        self.podtree("rm", "--force", self.name)

    def processes(self) -> dict[int, str]:
        """Pid inside the pod -> command line, seen from inside, without the process that looks."""
        listing = self.sh("ps -e -o pid=,ppid=,args=")
        found = {}
        for line in listing.splitlines():
            pid, parent, args = line.split(None, 2)
            if parent != "0" or pid == "1":
                found[int(pid)] = args
        return {pid: args for pid, args in found.items() if not args.startswith("ps -e")}

    def signal(self, pid: int, number: signal.Signals) -> None:
        """Sends a signal to a process of the pod, from inside."""
        self.sh(f"kill -{int(number)} {pid}")
