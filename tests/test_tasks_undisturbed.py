"""What runs in a pod never notices a checkpoint: fifty of them, and no EINTR, no lost wake-up, no register touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from driver import PROGRAMS, SYSTEM_PYTHON, Podtree
from lives import IN_POD

CHECKPOINTS = 50
RUNNERS = [
    ("blocked", "all_kinds"),
    ("blocked", "limits_run_out"),
    ("blocked", "busy_calls"),
    ("registers", "avx"),
    ("registers", "x87"),
    ("threads", "process_shared"),
    ("mappings", "writing_all_the_time"),
]
SCRIPTS = [("signals.py", "signals_under_way"), ("sockets.py", "tcp_stream"), ("descriptors.py", "same_instant")]


@pytest.mark.needs("gcc")
@pytest.mark.timeout(600)
def test_fifty_checkpoints(podtree: Podtree, compiled: Callable[[str], Path]) -> None:
    """Ten programs of all kinds side by side in one pod, each with its own directory and log."""
    commands = {f"{program}-{case}": f"{compiled(program)} {case}" for program, case in RUNNERS}
    commands |= {case: f"{SYSTEM_PYTHON} {PROGRAMS / script} {case}" for script, case in SCRIPTS}
    lines = [f"mkdir -p {IN_POD}"]
    lines += [f'PT_DIR={IN_POD}/{name} {command} & pids="$pids $!"' for name, command in commands.items()]
    lines += ["for pid in $pids; do wait $pid || echo FAILED $pid; done", "echo ALL DONE"]
    pod = podtree.run("bash", "-c", "\n".join(lines), name="undisturbed")
    pod.wait_log("READY", 60, len(commands))
    for _ in range(CHECKPOINTS):
        pod.checkpoint()
    branch = podtree.branch(pod.checkpoint(), "undisturbed")
    for one in (pod, branch):
        one.sh(f"for d in {IN_POD}/*/; do touch $d/go; done")
    for one in (pod, branch):
        log = one.wait_log("ALL DONE", 120)
        assert "FAILED" not in log and "BAD" not in log, log
        assert log.split().count("OK") == len(commands), log
