"""The contract of volume backends, on each of them."""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from pathlib import Path

import pytest

from podtree.kernel import btrfs
from podtree.pool import Pool
from podtree.volume.backend import VolumeBackend
from podtree.volume.btrfs import BtrfsVolumes
from pool_fixtures import MIB, in_child, pool, pool_home  # noqa: F401


@pytest.fixture(params=[BtrfsVolumes])
def volumes(request: pytest.FixtureRequest, pool: Pool) -> VolumeBackend:  # noqa: F811
    backend: VolumeBackend = request.param(str(pool.root))
    return backend


@pytest.fixture
def place(pool: Pool) -> Path:  # noqa: F811
    return pool.root


def test_a_new_volume_is_an_empty_directory(volumes: VolumeBackend, place: Path) -> None:
    volumes.create(str(place / "v"))
    assert list((place / "v").iterdir()) == []
    assert volumes.exists(str(place / "v"))
    assert not volumes.is_snapshot(str(place / "v"))


def test_a_snapshot_keeps_what_was_and_can_not_be_written(volumes: VolumeBackend, place: Path) -> None:
    volumes.create(str(place / "v"))
    (place / "v/file").write_text("before")
    volumes.snapshot(str(place / "v"), str(place / "s"))
    (place / "v/file").write_text("after")
    assert (place / "s/file").read_text() == "before"
    assert volumes.is_snapshot(str(place / "s"))
    with pytest.raises(OSError, match="Read-only"):
        (place / "s/file").write_text("no")


def test_a_clone_and_its_source_do_not_see_each_other(volumes: VolumeBackend, place: Path) -> None:
    volumes.create(str(place / "v"))
    (place / "v/file").write_text("common")
    volumes.snapshot(str(place / "v"), str(place / "s"))
    for name in ("a", "b"):
        volumes.clone(str(place / "s"), str(place / name))
        (place / name / "file").write_text(name)
    assert [(place / name / "file").read_text() for name in "avsb"] == ["a", "common", "common", "b"]


def test_a_prepared_snapshot_is_of_the_instant_it_is_taken(volumes: VolumeBackend, place: Path) -> None:
    volumes.create(str(place / "v"))
    before = len(os.listdir("/proc/self/fd"))
    take = volumes.prepare_snapshot(str(place / "v"), str(place / "s"))
    (place / "v/file").write_text("late")
    take()
    del take
    assert (place / "s/file").read_text() == "late"
    assert len(os.listdir("/proc/self/fd")) == before


def test_flush_changes_nothing_and_leaves_nothing(volumes: VolumeBackend, place: Path) -> None:
    volumes.create(str(place / "v"))
    (place / "v/file").write_bytes(os.urandom(MIB))
    before = sorted(os.listdir(place))
    with open(place / "v/open", "w") as file:
        volumes.flush(str(place / "v"), str(place / "scratch"))
        file.write("still writable")
    assert sorted(os.listdir(place)) == before


def test_a_snapshot_that_was_tampered_with_is_known(place: Path) -> None:
    """Also when it is immutable again; being cloned, or made writable and left alone, is no change."""
    volumes = BtrfsVolumes(str(place))
    volumes.create(str(place / "v"))
    (place / "v/file").write_text("before")
    volumes.snapshot(str(place / "v"), str(place / "s"))
    (place / "v/file").write_text("after")
    volumes.clone(str(place / "s"), str(place / "clone"))
    btrfs.set_readonly(str(place / "s"), False)
    btrfs.set_readonly(str(place / "s"), True)
    volumes.write_out()
    assert not volumes.was_changed(str(place / "s"))
    btrfs.set_readonly(str(place / "s"), False)
    (place / "s/file").write_text("BEFORE")
    btrfs.set_readonly(str(place / "s"), True)
    volumes.write_out()
    assert volumes.was_changed(str(place / "s"))


def test_destroy_removes_volumes_and_snapshots_and_frees_their_space(volumes: VolumeBackend, place: Path) -> None:
    volumes.create(str(place / "v"))
    (place / "v/file").write_bytes(os.urandom(16 * MIB))
    volumes.snapshot(str(place / "v"), str(place / "s"))
    used = volumes.space().used
    volumes.destroy(str(place / "v"))
    volumes.destroy(str(place / "s"))
    assert not (place / "v").exists() and not (place / "s").exists()
    assert volumes.wait_destroyed(30)
    assert volumes.space().used <= used - 15 * MIB


def test_a_plain_directory_is_no_volume(volumes: VolumeBackend, place: Path) -> None:
    (place / "d").mkdir()
    assert not volumes.exists(str(place / "d"))
    assert not volumes.exists(str(place / "missing"))
    with pytest.raises(OSError, match="/d'"):
        volumes.destroy(str(place / "d"))


def test_errors_name_the_path(volumes: VolumeBackend, place: Path) -> None:
    volumes.create(str(place / "v"))
    for work in (
        lambda: volumes.create(str(place / "v")),
        lambda: volumes.snapshot(str(place / "v"), str(place / "v")),
        lambda: volumes.clone(str(place / "missing"), str(place / "x")),
    ):
        with pytest.raises(OSError, match=str(place)):
            work()


def test_the_read_only_flag_can_be_set(place: Path) -> None:
    btrfs.create(str(place / "v"))
    btrfs.set_readonly(str(place / "v"), True)
    assert btrfs.is_readonly(str(place / "v"))
    btrfs.set_readonly(str(place / "v"), False)
    (place / "v/file").write_text("again")


def commit_rarely(place: Path) -> None:
    """The file system's own commits come every five minutes, after the test's end."""
    subprocess.run(["mount", "-o", "remount,commit=300", str(place)], check=True)


def test_nobody_waits_for_a_commit_that_is_not_his(volumes: VolumeBackend, place: Path) -> None:
    """Three processes make something durable at nearly the same time; nobody else does for a while."""
    commit_rarely(place)

    def work() -> None:
        time.sleep(random.random() * 0.03)
        (place / str(os.getpid())).touch()
        volumes.make_durable()

    for _ in range(60):
        statuses: list[int] = []
        threads = [threading.Thread(target=lambda: statuses.append(in_child(work))) for _ in range(3)]  # noqa: B023
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [0] * 3


def test_space_is_freed_although_no_commit_is_due(volumes: VolumeBackend, place: Path) -> None:
    commit_rarely(place)
    volumes.create(str(place / "v"))
    volumes.make_durable()
    volumes.destroy(str(place / "v"))
    volumes.make_durable()
    assert volumes.wait_destroyed(120)
