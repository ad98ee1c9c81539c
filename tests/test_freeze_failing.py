"""Stopping that fails, or meets the dying: what a program can't do meanwhile, and what has to be let go of later."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from driver import SYSTEM_PYTHON, Podtree, until
from lives import start, verify
from podtree.errors import Refused
from podtree.freeze import Freezer
from podtree.kernel import procfs, ptrace
from podtree.kernel.sys import NR, syscall
from podtree.pod import seccomp
from podtree.script.task import Remote
from podtree.script.vdso import stub_offset
from podtree.tracees import SEIZE_OPTIONS

GET_KEYRING, SESSION = 0, -3  # keyctl(2), KEYCTL_GET_KEYRING_ID of the session keyring: the pods' filter forbids it
TRACEME = 0  # ptrace(2)


@contextmanager
def child(work: Callable[[], object]) -> Iterator[int]:
    """A process that does `work`, which is killed and reaped, if it is still there, at the end."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.fixture
def shared() -> Iterator[mmap.mmap]:
    """Memory for what a child has to tell: numbers of eight bytes."""
    with mmap.mmap(-1, 4096) as memory:
        yield memory


def number(shared: mmap.mmap, index: int) -> int:
    return int(struct.unpack_from("<Q", shared, index * 8)[0])


def test_the_filter_holds_until_the_task_has_stopped(tmp_path: Path, shared: mmap.mmap) -> None:
    """A program that is just being seized must not get one system call past its seccomp filter; scripts may."""
    program = seccomp.load(tmp_path)

    def work() -> None:
        seccomp.install(program)
        tries = passed = 0
        while True:
            tries += 1
            try:
                syscall(NR.keyctl, GET_KEYRING, SESSION, 0)
                passed += 1
            except OSError:
                pass
            struct.pack_into("<QQ", shared, 0, tries, passed)

    with child(work) as pid:
        until(lambda: number(shared, 0) > 100, "the child tries")
        ptrace.seize(pid, SEIZE_OPTIONS)
        begun = number(shared, 0)
        until(lambda: number(shared, 0) > begun + 1000, "the child goes on trying")
        freezer = Freezer(lambda: [pid])
        frozen = freezer.freeze()  # finds it seized already
        vdso = next(e for e in procfs.maps(pid) if e.path == "[vdso]")
        with Remote(pid, vdso.start + stub_offset()) as remote:
            assert remote.call(NR.keyctl, GET_KEYRING, SESSION & 0xFFFFFFFF, 0) < 1 << 32
        frozen.release()
        until(lambda: not freezer.tend(), "all are let go")
        begun = number(shared, 0)
        until(lambda: number(shared, 0) > begun + 1000, "the child goes on trying")
        assert number(shared, 1) == 0


def test_exit_status_of_an_own_child_is_left_to_who_waits(shared: mmap.mmap) -> None:
    """The supervisor traces the pod's first process and is its parent: the tracer must not take the exit status."""

    def work() -> None:
        signal.pause()

    with child(work) as pid:
        freezer = Freezer(lambda: [pid])
        frozen = freezer.freeze()
        os.kill(pid, signal.SIGKILL)
        frozen.release()
        until(lambda: not freezer.tend(), "all are let go")
        assert os.waitpid(pid, 0) == (pid, signal.SIGKILL)


def test_one_killed_while_stopped_is_reaped_for_its_parent(shared: mmap.mmap) -> None:
    """A traced process that ends is shown to its parent only when its tracer has taken notice."""

    def work() -> None:
        grandchild = os.fork()
        if grandchild == 0:
            signal.pause()
        struct.pack_into("<Q", shared, 0, grandchild)
        os.waitpid(grandchild, 0)
        struct.pack_into("<Q", shared, 8, 1)
        signal.pause()

    with child(work) as pid:
        until(lambda: number(shared, 0), "the grandchild is there")
        grandchild = number(shared, 0)
        freezer = Freezer(lambda: [pid, grandchild])
        frozen = freezer.freeze()
        os.kill(grandchild, signal.SIGKILL)
        frozen.release()
        until(lambda: not freezer.tend(), "all are let go")
        until(lambda: number(shared, 1), "its parent has heard of its end")


def test_left_in_a_script_while_it_is_stopped() -> None:
    """A tracer was killed in the midst of a script of a process that job control keeps stopped: it comes home."""

    def work() -> None:
        while True:
            signal.pause()

    with child(work) as pid:
        os.kill(pid, signal.SIGSTOP)
        until(lambda: procfs.stat(pid).state == "T", "the child is stopped")

        def leave() -> None:
            Freezer(lambda: [pid]).freeze()
            vdso = next(e for e in procfs.maps(pid) if e.path == "[vdso]")
            Remote(pid, vdso.start + stub_offset()).__enter__()
            os.kill(os.getpid(), signal.SIGKILL)

        with child(leave) as tracer:
            os.waitid(os.P_PID, tracer, os.WEXITED | os.WNOWAIT)
        freezer = Freezer(lambda: [pid])
        frozen = freezer.freeze()
        assert frozen.processes[0].first.sigmask == 0
        assert frozen.processes[0].first.group_stop == signal.SIGSTOP
        frozen.release()
        until(lambda: procfs.stat(pid).state == "T", "the child is stopped as before")


def test_inside_of_vfork(podtree: Podtree, compiled: Callable[[str], Path]) -> None:
    """A parent in vfork(2) can't be stopped: that is refused, and neither the pod nor its supervisor hangs."""
    pod = podtree.run(compiled("vforks"), name="vforks")
    pod.wait_log("READY")
    assert "vfork" in podtree("check", pod.name, code=3).out
    pod.sh("touch /tmp/go")
    pod.wait_log("parent goes on")  # though it was traced, and stops now
    podtree("check", pod.name)
    pod.kill()
    assert pod.wait() == 137


def test_blocked_calls_outlive_attempts_that_fail(podtree: Podtree, compiled: Callable[[str], Path]) -> None:
    """A stop that is given up interrupts nobody: no EINTR, as after one that succeeds."""
    pod = start(podtree, compiled("blocked"), "all_kinds", name="blocked")
    podtree("exec", "-d", pod.name, "--", compiled("racing"), "stays_in_vfork")
    until(lambda: "stays_in_vfork" in pod.sh("ps -e -o args="), "somebody is inside of vfork")
    for _ in range(2):  # refused, or at the last attempt not: that child goes on now and then
        podtree("checkpoint", pod.name, code=None)
    pod.sh("pkill -KILL -f [s]tays_in_vfork || true")
    verify(pod)


def test_traced_by_its_parent(podtree: Podtree) -> None:
    """PTRACE_TRACEME makes the pod's supervisor, the parent of its first process, the tracer: refused, harmless."""
    script = "import ctypes, time; ctypes.CDLL(None).ptrace(0, 0, 0, 0); print('READY', flush=True); time.sleep(1000)"
    pod = podtree.run(SYSTEM_PYTHON, "-c", script, name="traceme")
    pod.wait_log("READY")
    assert "PTRACE_TRACEME" in podtree("check", pod.name, code=3).out
    podtree("stop", "-t", "1", pod.name)
    assert pod.info()["exit_code"] == 137


def test_who_asked_to_be_traced_is_named() -> None:
    def work() -> None:
        ctypes.CDLL(None).ptrace(TRACEME, 0, 0, 0)
        time.sleep(1000)

    with child(work) as pid:
        until(lambda: procfs.status(pid)["TracerPid"] != "0", "it is traced")
        with pytest.raises(Refused, match="PTRACE_TRACEME"):
            Freezer(lambda: [pid]).freeze()
