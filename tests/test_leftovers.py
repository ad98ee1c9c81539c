"""Tests leave nothing behind: no mounts, loop devices, namespaces, processes, control groups. Runs last."""

from __future__ import annotations

import subprocess
from pathlib import Path

from driver import Podtree, describe, until


def traces(podtree: Podtree) -> list[str]:
    """Everything on this machine that still belongs to the session's PODTREE_HOME."""
    home = str(podtree.home)
    found = [line for pid in podtree.processes() for line in describe(pid)]
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if home in line]
    loops = subprocess.run(
        ["losetup", "--list", "--noheadings", "-O", "NAME,BACK-FILE"], capture_output=True, text=True
    )
    found += [line for line in loops.stdout.splitlines() if home in line]
    found += [str(path) for path in Path("/sys/fs/cgroup").rglob("*") if podtree.pod_ids & names(path)]
    return found


def names(path: Path) -> set[str]:
    """The words of a control group's own name: pod ids stand in it alone or after a prefix."""
    return {path.name, *path.name.replace(".", "-").split("-")} if path.is_dir() else set()


def test_nothing_is_left(session_podtree: Podtree) -> None:
    """After `rm --force` of every pod and `pool unmount`."""
    session_podtree.close()
    left: list[str] = []

    def gone() -> bool:
        left[:] = traces(session_podtree)
        return not left

    until(gone, "all traces are gone", 15, dump=lambda: "\n".join(left))
    stray = [path.name for path in session_podtree.home.iterdir() if path.name not in ("pool", "pool.img")]
    assert all(not any((session_podtree.home / name).rglob("*")) for name in stray if name == "run"), stray


def test_the_pool_comes_back(session_podtree: Podtree) -> None:
    """An unmounted pool is there again at the next command, empty of pods."""
    try:
        assert session_podtree.pods() == []
    finally:
        session_podtree.close()
    assert traces(session_podtree) == []
