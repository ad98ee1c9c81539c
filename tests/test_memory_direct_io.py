"""Memory that a device writes to while it is being copied: the first checkpoint of a large pod copies while it runs.

Direct I/O marks a page as written when it begins, not when the data comes. The disk is made slow for the pod (cgroup
version 1, blkio), so that a read is always under way.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from driver import BUILD, Pod, Podtree
from lives import start, verify
from podtree.kernel.mount import mountinfo

BYTES_PER_S = 20 << 20


@pytest.fixture
def disk() -> Iterator[tuple[Path, Path]]:
    """A directory on a disk, and a control group for which that is slow."""
    hierarchy = next((m.point for m in mountinfo() if m.fstype == "cgroup" and "blkio" in m.options), None)
    BUILD.mkdir(parents=True, exist_ok=True)
    device = Path(f"/sys/dev/block/{os.major(os.stat(BUILD).st_dev)}:{os.minor(os.stat(BUILD).st_dev)}")
    if hierarchy is None or not device.exists():
        pytest.skip("needs cgroup version 1 with blkio, and this directory on a disk")
    whole = device.resolve().parent if (device / "partition").exists() else device
    group, data = Path(hierarchy) / f"podtree-test-{os.getpid()}", BUILD / "direct"
    data.mkdir(exist_ok=True)
    group.mkdir()
    try:
        limit = f"{(whole / 'dev').read_text().strip()} {BYTES_PER_S}"
        (group / "blkio.throttle.read_bps_device").write_text(limit)
        yield data, group
    finally:
        shutil.rmtree(data)
        group.rmdir()


def start_slow(podtree: Podtree, case: str, disk: tuple[Path, Path]) -> Pod:
    """A pod with a case of direct_io.py, for which the disk is slow."""
    data, group = disk
    pod = start(podtree, "direct_io.py", case, name="direct", options=("-v", f"{data}:/data", "--external", "keep"))
    (group / "cgroup.procs").write_text(str(pod.info()["pid"]))
    (data / "slow").touch()
    pod.wait_log("SLOW", 60)
    return pod


def test_direct_reads_while_it_is_copied(podtree: Podtree, disk: tuple[Path, Path]) -> None:
    pod = start_slow(podtree, "slow_reads", disk)
    checkpoints = [pod.checkpoint(), pod.checkpoint()]
    branches = [podtree.branch(one, "direct") for one in checkpoints]
    verify(*branches, pod)
    podtree.remove_all()


def test_requests_under_way_count_when_they_are_done(podtree: Podtree, disk: tuple[Path, Path]) -> None:
    """They are waited for before anything else is looked at that they change."""
    pod = start_slow(podtree, "counted", disk)
    checkpoints = [pod.checkpoint() for _ in range(4)]
    verify(*[podtree.branch(one, "direct") for one in checkpoints], pod)
    podtree.remove_all()
