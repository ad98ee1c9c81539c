"""A checkpoint is captured, then written, then durable; or it is lost, and that is said."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from driver import SYSTEM_PYTHON, Podtree, until
from pod_fixtures import supervisor_of
from podtree.pool import pending
from podtree.pool.pending import Pending, State
from podtree.pool.records import CheckpointId

COUNTER = "import time\nn = 0\nwhile True:\n    n += 1; print(n, flush=True); time.sleep(0.01)"
LARGE = "import os, time\nkept = os.urandom(200 << 20)\nprint('ready', flush=True)\ntime.sleep(1000)"


def test_notes(tmp_path: Path) -> None:
    assert pending.read(tmp_path) == []
    note = pending.begun(CheckpointId("0123456789ab"), "why", 5)
    pending.note(tmp_path, note)
    assert pending.read(tmp_path) == [note] and note.state is State.CAPTURED
    gone = Pending(
        id=CheckpointId("0123456789ac"), state=State.WRITTEN, time_ns=6, pid=note.pid, start=1, boot=note.boot
    )
    pending.note(tmp_path, gone)
    assert [found.state for found in pending.read(tmp_path)] == [State.CAPTURED, State.LOST]
    pending.forget(tmp_path, note.id)
    assert [found.id for found in pending.read(tmp_path)] == [gone.id]
    (tmp_path / pending.NAME).write_bytes(b'[{"id"')
    assert pending.read(tmp_path) == []


def test_captured_then_durable(podtree: Podtree) -> None:
    """The next ones come after it; each branches to what it was when it was captured."""
    pod = podtree.run(SYSTEM_PYTHON, "-c", COUNTER)
    pod.wait_log("3\n")
    found = [podtree.json("checkpoint", pod.name, "--no-wait", "-m", f"number {n}") for n in range(3)]
    assert [one["state"] for one in found] == ["captured"] * 3
    assert all(one["pause_ms"] > 0 for one in found)
    assert podtree("wait", *(one["id"] for one in found)).out.split() == [f"{pod.name}@{n}" for n in (1, 2, 3)]
    assert {one["state"] for one in podtree.json("log", pod.name)} == {"durable"}
    assert podtree.json("show", found[0]["id"])["state"] == "durable"
    assert podtree.json("checkpoint", pod.name)["state"] == "durable"
    counts = [int((podtree.home / "pool/ckpts" / one["id"] / "vol/log").read_text().split()[-1]) for one in found]
    assert counts == sorted(counts)
    branch = podtree.branch(found[1]["id"])
    branch.wait_log(f"\n{counts[1] + 3}\n")
    lines = branch.logs().split()
    assert lines == [str(n + 1) for n in range(len(lines))]
    for words in (["--stop"], ["--tag", "x"]):
        podtree("checkpoint", pod.name, "--no-wait", *words, code=2)
    podtree("wait", "0123456789ab", code=4)


@pytest.mark.needs("chattr")
def test_lost(podtree: Podtree) -> None:
    """What can't be written after it was captured is lost; the pod goes on, and so do its checkpoints."""
    pod = podtree.run(SYSTEM_PYTHON, "-c", COUNTER)
    pod.checkpoint()
    image = podtree.home / "pool" / "pods" / pod.info()["id"] / "img"
    subprocess.run(["chattr", "+i", image], check=True)
    try:
        one = podtree.json("checkpoint", pod.name, "--no-wait", "-m", "in vain")["id"]
        assert "is lost" in podtree("wait", one, code=6).err
        podtree("checkpoint", pod.name, code=1)
    finally:
        subprocess.run(["chattr", "-i", image], check=True)
    found = podtree.json("log", pod.name)
    assert [(o["state"], o["message"]) for o in found] == [("lost", "in vain"), ("durable", "")]
    assert podtree.json("show", one)["state"] == "lost" and "(lost)" in podtree("log", pod.name).out
    podtree("gc")
    assert [one["state"] for one in podtree.json("log", pod.name)] == ["durable"]
    two = pod.checkpoint()
    branch = podtree.branch(two)
    branch.wait_log(str(int(branch.logs().split()[-1]) + 5))


def test_the_supervisor_dies(podtree: Podtree) -> None:
    """Whatever was reported captured is then durable or said to be lost."""
    pod = podtree.run(SYSTEM_PYTHON, "-c", LARGE)
    pod.wait_log("ready")
    one = podtree.json("checkpoint", pod.name, "--no-wait")["id"]
    os.kill(supervisor_of(pod), signal.SIGKILL)
    done = podtree("wait", one, code=None)
    assert done.code in (0, 6), done
    state = podtree.json("show", one)["state"]
    assert state == ("durable" if done.code == 0 else "lost")
    until(lambda: podtree("checkpoint", pod.name, code=None).code == 0, "it has a supervisor again")
    assert pod.running()
