"""What the tests of pods share beside the driver: a raw command, and a look into a running pod from outside."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from driver import SLOW, Pod, Podtree, until


def start(podtree: Podtree, *args: str, stdin: int | None = subprocess.PIPE) -> subprocess.Popen[bytes]:
    """A `podtree` command that goes on while the test does something else."""
    return subprocess.Popen(
        [str(podtree.program), *args], env=podtree.env, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def piped(podtree: Podtree, args: Sequence[str], data: bytes) -> subprocess.CompletedProcess[bytes]:
    """A `podtree` command with bytes on stdin."""
    command = [str(podtree.program), *args]
    return subprocess.run(command, env=podtree.env, input=data, capture_output=True, timeout=60 * SLOW)


def supervisor_of(pod: Pod) -> int:
    """Host pid of a running pod's supervisor: the one that serves its control socket, its init's parent at first."""
    return parent(int(pod.info()["pid"]))


def parent(pid: int) -> int:
    """Parent of a process."""
    return int(status(pid)["PPid"])


def status(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def wait_gone(pid: int) -> None:
    """Until there is no such process, or only its zombie."""

    def gone() -> bool:
        try:
            return status(pid)["State"].startswith("Z")
        except OSError:
            return True

    until(gone, f"process {pid} is gone")


@contextlib.contextmanager
def writable(snapshot: Path) -> Iterator[None]:
    """A snapshot that somebody tampers with."""
    subprocess.run(["btrfs", "property", "set", str(snapshot), "ro", "false"], check=True)
    try:
        yield
    finally:
        subprocess.run(["btrfs", "property", "set", str(snapshot), "ro", "true"], check=True)
