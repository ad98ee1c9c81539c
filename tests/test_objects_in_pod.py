"""One test per kernel object: held by a program in a pod, checkpointed, killed, branched, and still what it was.

The programs verify themselves (tests/programs); what each case holds is in its docstring there. All selected
cases of a program live in one pod, each a process in a session of its own, and are frozen at one instant.
When that pod as a whole can't be frozen or brought back, each case is tried in a pod of its own, to find the culprit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet

from driver import PROGRAMS, SYSTEM_PYTHON, Podtree
from lives import End, cases_of, ends, generations, live_on, start, start_together, verify

PYTHON = (
    *("processes", "descriptors", "watching", "pidfds", "views", "mqueues", "aio"),
    *("sockets", "signals", "credentials", "sysvipc"),
)
COMPILED = ("registers", "blocked", "threads", "leaders", "sharing", "attributes", "mappings", "tracers")
ALONE = {  # about the pod's pid 1, all its pids, everything that happens in its shared directories
    ("processes", "tree"), ("processes", "new_pids_go_on"), ("watching", "undisturbed"),
    ("sockets", "unix_own_messages"), ("leaders", "itself"),
}  # fmt: skip
REFUSED = {  # (program, case): the object and the reason that are named
    ("watching", "unread"): ("anon_inode:inotify", "events are unread"),
    ("watching", "directory_notify"): ("/dir", "dnotify"),
    ("attributes", "dispatch"): ("thread", "syscall user dispatch"),
    ("sharing", "siblings"): ("CLONE_FILES", "isn't its parent"),
    ("tracers", "at_event"): ("task", "at a ptrace event"),
    ("aio", "polling"): ("AIO context", "it polls"),
    ("aio", "inherited"): ("AIO context", "another process"),
}
KNOWN: dict[tuple[str, str], str] = {}  # product gaps: a test that begins to pass fails, so that its line here goes
PY_CASES = [(program, case) for program in PYTHON for case in cases_of(f"{program}.py")]
C_CASES = [(program, case) for program in COMPILED for case in cases_of(f"{program}.c")]


def marked(cases: list[tuple[str, str]]) -> list[ParameterSet]:
    """Parameters: those not refused, the known gaps marked."""
    found = []
    for one in cases:
        if one not in REFUSED:
            marks = [pytest.mark.xfail(strict=True, reason=KNOWN[one])] if one in KNOWN else []
            found.append(pytest.param(*one, marks=marks, id="-".join(one)))
    return found


class Results:
    """How the cases fared, program by program, each program run when it is asked for first."""

    def __init__(self, podtree: Podtree, compiled: Callable[[str], Path], selected: set[tuple[str, str]]) -> None:
        self.podtree = podtree
        self.compiled = compiled
        self.selected = selected
        self._ends: dict[str, dict[str, dict[str, End]] | None] = {}  # program -> pod -> case -> end; None: it failed

    def command(self, program: str, case: str) -> list[str | Path]:
        """The words that start a case."""
        if program in PYTHON:
            return [SYSTEM_PYTHON, PROGRAMS / f"{program}.py", case]
        return [self.compiled(program), case]

    def together(self, program: str) -> dict[str, dict[str, End]] | None:
        """All selected cases of a program in one pod, through several lives."""
        if program not in self._ends:
            self._ends[program] = None
            cases = [case for name, case in sorted(self.selected) if name == program]
            commands = {case: self.command(program, case) for case in cases}
            try:
                pods = generations(self.podtree, start_together(self.podtree, commands, program))
                self._ends[program] = dict(zip((pod.name for pod in pods), ends(pods), strict=True))
            except AssertionError as failed:
                print(f"{program}: together: {failed}")
            finally:
                self.podtree.remove_all()
        return self._ends[program]

    def verify(self, program: str, case: str) -> None:
        """Asserts that a case found everything as it was, in each of its lives."""
        found = self.together(program) if (program, case) not in ALONE else None
        if found is None:
            words = self.command(program, case)
            origin = start(self.podtree, *words[-2:], name=case.replace("_", "-"))  # type: ignore[arg-type]
            try:
                live_on(self.podtree, origin)
            finally:
                self.podtree.remove_all()
            return
        lives = {pod: in_pod.get(case) for pod, in_pod in found.items()}
        wrong = [
            f"{pod}: " + (f"ended with {end.code}\n{end.text}" if end else "did not end in time")
            for pod, end in lives.items()
            if not end or not end.good()
        ]
        assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def results(
    session_podtree: Podtree, compiled: Callable[[str], Path], request: pytest.FixtureRequest
) -> Iterator[Results]:
    """Of the cases that this session runs: `pytest -k NAME` freezes one case alone."""
    selected = set()
    for item in request.session.items:
        if item.path == request.path and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            params = item.callspec.params
            selected.add((params["program"], params["case"]))
    yield Results(session_podtree, compiled, selected - ALONE - set(REFUSED))


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("program", "case"), marked(PY_CASES))
def test_python(results: Results, program: str, case: str) -> None:
    results.verify(program, case)


@pytest.mark.needs("gcc")
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("program", "case"), marked(C_CASES))
def test_compiled(results: Results, program: str, case: str) -> None:
    results.verify(program, case)


@pytest.mark.needs("gcc")
@pytest.mark.parametrize(("program", "case"), list(REFUSED))
def test_refused(podtree: Podtree, results: Results, program: str, case: str) -> None:
    """Refused before anything is written, naming process, object and reason; the pod runs on unharmed."""
    what, why = REFUSED[program, case]
    words = results.command(program, case)
    pod = start(podtree, *words[-2:], name=case.replace("_", "-"))  # type: ignore[arg-type]
    culprits = [pid for pid in pod.processes() if pid != 1] or [1]
    for command in ("check", "checkpoint"):
        done = podtree(command, pod.name, code=3)
        problem = json.loads(podtree(command, pod.name, "--json", code=3).out)["problems"][0]
        assert problem["pid"] in culprits and what in problem["object"] and why in problem["reason"], problem
        assert f"process {problem['pid']} " in done.out + done.err and why in done.out + done.err, done
    assert podtree.json("log", pod.name) == []
    verify(pod)
