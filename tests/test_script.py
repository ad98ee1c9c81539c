"""The stub and its scripts: what a traced task does on itself, and that it survives its tracer."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from podtree.kernel import procfs, ptrace
from podtree.kernel.sys import NR
from podtree.script import stub
from podtree.script.task import Remote, Scratch
from podtree.script.vdso import leave_stub, stub_offset

SOURCE = Path(stub.__file__).parent / "arch" / "x86_64.S"

GETPPID = 110

BUSY = """
import math, sys, time
x, n = 1.0, 0
while True:
    for i in range(1000):
        x = math.fmod(x * 1.000001 + 0.1, 1000.0)
    n += 1
    if n % 200 == 0:
        print(n, repr(x), flush=True)
"""

SLEEPER = """
import time
n = 0
while True:
    begun = time.monotonic()
    time.sleep(0.05)
    assert time.monotonic() - begun >= 0.05
    n += 1
    print(n, n * 0.5, flush=True)
"""


def stub_address(pid: int) -> int:
    vdso = next(e for e in procfs.maps(pid) if e.path == "[vdso]")
    return vdso.start + stub_offset()


def stop(pid: int) -> None:
    ptrace.seize(pid, ptrace.PTRACE_O_TRACESYSGOOD | ptrace.PTRACE_O_SUSPEND_SECCOMP)
    ptrace.interrupt(pid)
    while not ptrace.wait(pid).is_interrupt:
        ptrace.cont(pid)
    if leave_stub(pid):
        ptrace.detach(pid)
        time.sleep(0.001)
        stop(pid)


@pytest.fixture
def victim(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    with open(tmp_path / "out", "wb") as out:
        process = subprocess.Popen([sys.executable, "-c", request.param], stdout=out)
    time.sleep(0.3)
    yield process
    process.kill()
    process.wait()


def test_code_is_what_the_source_assembles_to(tmp_path: Path) -> None:
    assert shutil.which("as"), "install binutils to run this test"
    subprocess.run(["as", SOURCE, "-o", tmp_path / "s.o"], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", tmp_path / "s.o", tmp_path / "s.bin"], check=True)
    code = (tmp_path / "s.bin").read_bytes()
    assert code[: stub.SAVE].rstrip(b"\0") == stub.CODE
    assert len(code) == stub.SIZE
    symbols = subprocess.run(["nm", tmp_path / "s.o"], check=True, capture_output=True, text=True).stdout
    offsets = {line.split()[2]: int(line.split()[0], 16) for line in symbols.splitlines()}
    assert offsets == {"run": stub.RUN, "one": stub.ONE, "restore": stub.RESTORE, "save": stub.SAVE}


@pytest.mark.parametrize("victim", [BUSY, SLEEPER], indirect=True)
def test_scripts_leave_no_trace(victim: subprocess.Popen[bytes], tmp_path: Path) -> None:
    pid = victim.pid
    for _ in range(50):
        stop(pid)
        regs = bytes(ptrace.get_regs(pid))
        xstate, mask = ptrace.get_xstate(pid), ptrace.get_sigmask(pid)
        maps = [(e.start, e.end, e.perms) for e in procfs.maps(pid)]
        with Remote(pid, stub_address(pid)) as remote, Scratch(remote, 65536) as area:
            assert remote.run(area.address, [(NR.getpid,), (GETPPID,)]) == [
                pid,
                os.getpid(),
            ]
            assert remote.do(NR.getpid) == pid
        assert bytes(ptrace.get_regs(pid)) == regs
        assert ptrace.get_xstate(pid) == xstate
        assert ptrace.get_sigmask(pid) == mask
        assert [(e.start, e.end, e.perms) for e in procfs.maps(pid)] == maps
        ptrace.detach(pid)
        time.sleep(0.002)
    _assert_progress(victim, tmp_path)


def _assert_progress(victim: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """It is alive, goes on, and every number it computed is right."""
    lines = (tmp_path / "out").read_text().splitlines()
    deadline = time.monotonic() + 20
    while len((tmp_path / "out").read_text().splitlines()) < len(lines) + 2:
        assert victim.poll() is None, "the process died"
        assert time.monotonic() < deadline, "the process no longer makes progress"
        time.sleep(0.02)
    printed = [line.split() for line in (tmp_path / "out").read_text().splitlines()[:-1]]
    assert [int(n) for n, _ in printed] == [int(printed[0][0]) * (i + 1) for i in range(len(printed))]
    if printed[0][0] == "200":
        x, n = 1.0, 0
        expected = []
        for _ in printed[:20]:
            for _ in range(200 * 1000):
                x = (x * 1.000001 + 0.1) % 1000.0
            n += 200
            expected.append(repr(x))
        assert [x for _, x in printed[:20]] == expected


@pytest.mark.parametrize("victim", [BUSY, SLEEPER], indirect=True)
def test_task_survives_the_death_of_its_tracer(victim: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """A tracer that runs scripts without end is killed at random instants; the task never notices."""
    seed = int(os.environ.get("PODTREE_SEED", time.time_ns() & 0xFFFF))
    print("PODTREE_SEED", seed)
    chance = random.Random(seed)
    rounds = int(os.environ.get("PODTREE_KILLS", "60"))
    for _ in range(rounds):
        tracer = os.fork()
        if tracer == 0:
            _trace_forever(victim.pid)
        time.sleep(chance.uniform(0.0005, 0.02))
        os.kill(tracer, signal.SIGKILL)
        os.waitpid(tracer, 0)
        assert victim.poll() is None
        deadline = time.monotonic() + 10
        while procfs.status(victim.pid)["TracerPid"] != "0":
            assert time.monotonic() < deadline
    _assert_progress(victim, tmp_path)


def _trace_forever(pid: int) -> None:
    try:
        while True:
            stop(pid)
            with Remote(pid, stub_address(pid)) as remote, Scratch(remote, 65536) as area:
                remote.run(area.address, [(NR.getpid,)] * 30)
            ptrace.detach(pid)
    finally:
        os._exit(1)
