"""The frame of the self-verifying programs in Python: one kernel object each, frozen half-way.

    program.py CASE     sets the object up, prints READY, waits for the file $PT_DIR/go,
                        verifies, prints OK or BAD lines, exits with 0 or 1
    program.py --list   the names of its cases, one a line

What happens between READY and the go-file (checkpoints, branches, nothing at all) must not be visible to it.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

DIR = Path(os.environ.get("PT_DIR", "/var/tmp/podtest"))
"""The program's own directory: scratch files, and `go`."""

CASES: dict[str, Callable[[], None]] = {}
_bad: list[str] = []


def case(function: Callable[[], None]) -> Callable[[], None]:
    """Registers a case under its function's name."""
    CASES[function.__name__] = function
    return function


def equal(what: str, got: object, wanted: object) -> None:
    """Notes a failure unless the two are equal."""
    if got != wanted:
        bad(f"{what}: {got!r} instead of {wanted!r}")


def true(what: str, holds: object) -> None:
    """Notes a failure unless it holds."""
    if not holds:
        bad(what)


def bad(what: str) -> None:
    """Notes a failure."""
    _bad.append(what)
    print(f"BAD pid {os.getpid()}: {what}", flush=True)


def within(seconds: float, holds: Callable[[], object]) -> bool:
    """Whether a condition comes true before a deadline that only a failure reaches."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def runs_down(what: str, left: float, total: float, armed: tuple[float, float], asked: float) -> None:
    """Notes a failure unless a timer of `total` s has `left` s, within half a second.

    It was armed at some moment between the two of `armed`, and asked between `asked` and now (monotonic, s):
    however long this program was kept from running in between, what is left lies within these bounds.
    """
    most, least = total - (asked - armed[1]), total - (time.monotonic() - armed[0])
    true(f"{what}: {left} s left, not {least} to {most}", least - 0.5 < left < most + 0.5)


def go() -> bool:
    """Whether the time to verify has come."""
    return (DIR / "go").exists()


def wait_go() -> None:
    """For children: waits without a word until the time to verify."""
    while not go():
        time.sleep(0.02)


def descendants(pid: int) -> set[int]:
    """All processes below one, zombies included."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            below = {int(word) for word in (task / "children").read_text().split()}
            found |= below.union(*(descendants(one) for one in below))
        except OSError:
            continue
    return found


def settle(seconds: float = 5) -> None:
    """Waits until every descendant has been seen at rest several times; one that spins is waited for `seconds`.

    On a busy machine a child that has still something to prepare is runnable, not asleep.
    """
    end = time.monotonic() + seconds
    rests: dict[int, int] = {}
    while time.monotonic() < end:
        pids = descendants(os.getpid())
        for pid in pids:
            try:
                rests[pid] = rests.get(pid, 0) + (stat_field(pid, 3) in "STZ")
            except OSError:
                continue
        if all(rests.get(pid, 0) >= 4 for pid in pids):
            return
        time.sleep(0.05)


def frozen() -> None:
    """Everything is set up: says so, and waits until the time to verify."""
    settle()
    print("READY", flush=True)
    wait_go()


def child(body: Callable[[], None]) -> int:
    """Forks a child that runs `body` and exits with 0, or 1 when it noted a failure; returns its pid."""
    pid = os.fork()
    if pid == 0:
        run_and_exit(body)
    return pid


def reap(pid: int, what: str = "child") -> None:
    """Waits for a child of `child` and notes a failure unless it ended with 0."""
    _, status = os.waitpid(pid, 0)
    equal(f"exit status of {what} {pid}", status, 0)


def run_and_exit(body: Callable[[], None]) -> NoReturn:
    """Runs `body` and ends the process at once: 0 if nothing failed."""
    try:
        body()
    except BaseException:
        bad(traceback.format_exc())
    sys.stdout.flush()
    os._exit(1 if _bad else 0)


def stat_field(pid: int | str, number: int) -> str:
    """Field `number` (as counted in proc_pid_stat(5), from 1) of /proc/PID/stat."""
    text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    head, _, rest = text.rpartition(")")
    return head.split("(", 1)[1] if number == 2 else rest.split()[number - 3]


def status_field(pid: int | str, key: str) -> str:
    """A line of /proc/PID/status, without its key."""
    for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
        if line.startswith(f"{key}:"):
            return line.partition(":")[2].strip()
    raise KeyError(key)


def main() -> None:
    """Runs the case named on the command line."""
    if sys.argv[1:] == ["--list"]:
        print("\n".join(CASES))
        return
    DIR.mkdir(parents=True, exist_ok=True)
    DIR.chmod(0o777)  # some cases become another user
    os.chdir(DIR)

    def whole() -> None:
        CASES[sys.argv[1]]()
        if not _bad:
            print("OK", flush=True)

    run_and_exit(whole)
