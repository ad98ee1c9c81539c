"""SIGKILL to whoever takes the checkpoint, at random instants: the pod goes on, correct, and can be checkpointed.

PODTREE_TORTURE sets the number of kills (default 25); PODTREE_TORTURE_SEED the instants.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from driver import PROGRAMS, SYSTEM_PYTHON, Pod, Podtree, until
from lives import IN_POD

KILLS = int(os.environ.get("PODTREE_TORTURE", "25"))
SEED = int(os.environ.get("PODTREE_TORTURE_SEED", str(random.SystemRandom().randrange(10**6))))


def supervisor_of(podtree: Podtree) -> int | None:
    """Host pid of the only pod's supervisor: the keeper's child of that name; None while there is none."""
    names, parents = {}, {}
    for pid in podtree.processes():
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue
        fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        names[pid], parents[pid] = fields["Name"], int(fields["PPid"])
    found = [
        pid
        for pid, name in names.items()
        if name == "podtree-superv" and names.get(parents[pid], "") == "podtree-keeper"
    ]
    return found[0] if found else None


def load(compiled: Callable[[str], Path]) -> tuple[str, int]:
    """A shell script that starts programs of all kinds, and how many READYs they say."""
    commands = {
        "avx": f"{compiled('registers')} avx",
        "x87": f"{compiled('registers')} x87",
        "blocked": f"{compiled('blocked')} all_kinds",
        "limits": f"{compiled('blocked')} limits_run_out",
        "busy": f"{compiled('blocked')} busy_calls",
        "churn": f"{compiled('churn')} calls",
        "robust": f"{compiled('threads')} robust_list",
        "tcp": f"{SYSTEM_PYTHON} {PROGRAMS}/sockets.py tcp_stream",
        "queued": f"{SYSTEM_PYTHON} {PROGRAMS}/sockets.py tcp_established",
        "signals": f"{SYSTEM_PYTHON} {PROGRAMS}/signals.py signals_under_way",
        "stopped": f"{SYSTEM_PYTHON} {PROGRAMS}/processes.py stopped",
        "pending": f"{SYSTEM_PYTHON} {PROGRAMS}/signals.py pending",
    }
    lines = [f"mkdir -p {IN_POD}"]
    lines += [f'PT_EINTR=1 PT_DIR={IN_POD}/{name} {command} & pids="$pids $!"' for name, command in commands.items()]
    lines += ["for pid in $pids; do wait $pid || echo FAILED $pid; done", "echo ALL DONE"]
    return "\n".join(lines), len(commands)


@pytest.mark.needs("gcc")
@pytest.mark.timeout(300 + 10 * KILLS)
def test_killed_at_random_instants(podtree: Podtree, compiled: Callable[[str], Path]) -> None:
    print(f"PODTREE_TORTURE_SEED={SEED}")
    chance = random.Random(SEED)
    script, count = load(compiled)
    pod = podtree.run("bash", "-c", script, name="tortured")
    pod.wait_log("READY", 60, count)
    began = time.monotonic()
    pod.checkpoint()
    pod.checkpoint()
    usual = (time.monotonic() - began) / 2
    during = 0
    for number in range(KILLS):
        victim = until(lambda: supervisor_of(podtree), "a supervisor is there", 20, dump=podtree.dump)
        command = subprocess.Popen(
            [podtree.program, "checkpoint", pod.name],
            env=podtree.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if chance.random() < 0.7:  # from the moment the freeze begins
            end = time.monotonic() + 10 * usual
            init = int(pod.info()["pid"])
            while time.monotonic() < end and not traced(init):
                pass
            during += traced(init)
            time.sleep(chance.random() ** 2 * usual * 0.5)
        else:
            time.sleep(chance.random() * usual)
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            pass
        try:
            command.wait(60)
        except subprocess.TimeoutExpired:
            command.kill()
            raise AssertionError(
                f"podtree checkpoint hangs after its supervisor was killed\n{podtree.dump()}"
            ) from None
        print(f"kill {number}: of {victim}", flush=True)
        assert pod.running(), pod.podtree("logs", pod.name).out
        if chance.random() < 0.3:
            checkpoint_again(pod)
    checkpoint_again(pod)
    branch = podtree.branch(pod.checkpoint(), "after-torture")
    for one in (pod, branch):
        one.sh(f"for d in {IN_POD}/*/; do touch $d/go; done")
    for one in (pod, branch):
        log = one.wait_log("ALL DONE", 120)
        assert "FAILED" not in log and "BAD" not in log, log
        assert log.split().count("OK") == count, log
    podtree("fsck", timeout=600)
    left = [path.name for path in (podtree.home / "pool" / "ckpts").iterdir() if path.name.startswith(".")]
    assert left == [], "drafts of checkpoints that were cut short"
    ghosts = [str(path) for path in podtree.home.glob("pool/pods/*/vol/upper/.podtree/*")]
    assert ghosts == [], "copies of unlinked files that no checkpoint owns"
    print(f"{during} of {KILLS} while frozen")


def traced(init: int) -> bool:
    """Whether the pod's init is being traced at this instant."""
    text = Path(f"/proc/{init}/status").read_text()
    return "\nTracerPid:\t0\n" not in text


def checkpoint_again(pod: Pod) -> None:
    """A checkpoint works as soon as the new supervisor is there."""

    tried = []

    def attempt() -> bool:
        tried.append(pod.podtree("checkpoint", pod.name, code=None))
        return tried[-1].code == 0

    until(attempt, "a checkpoint after the kill", 30, dump=lambda: f"{tried[-1]}\n{pod.podtree.dump()}")
