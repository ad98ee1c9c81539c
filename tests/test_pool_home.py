"""Making, mounting, growing and unmounting the pool."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from podtree.errors import Conflict, PodtreeError, Unsupported
from podtree.kernel import loop
from podtree.pool import PodState, Pool, home, locks
from podtree.pool.fsck import fsck
from pool_fixtures import MIB, in_child, pool, pool_home, take  # noqa: F401

# ruff: noqa: F811


def test_first_use_makes_everything_and_the_next_finds_it(pool_home: Path) -> None:
    place = pool_home / "deep" / "home"
    with Pool.open(place, initial_size=256 * MIB) as pool:
        pool.create_pod("web", {})
    try:
        with Pool.open(place) as pool:
            assert [pod.name for pod in pool.pods()] == ["web"]
    finally:
        Pool.close_home(place)


def test_opening_an_open_pool_takes_no_lock(pool: Pool, pool_home: Path) -> None:
    """Nobody waits for another command that makes, grows or unmounts it."""
    pool.create_pod("web", {})

    def open_again() -> None:
        with Pool.open(pool_home) as again:
            assert [pod.name for pod in again.pods()] == ["web"]

    with locks.held(str(pool_home / "lock")):
        assert in_child(open_again) == 0


def test_a_directory_of_its_own_is_made_private(tmp_path: Path) -> None:
    for name in ("new/home", "empty", "mounted"):
        place = tmp_path / name
        if name != "new/home":
            place.mkdir(mode=0o755)
        if name == "mounted":
            (place / "lost+found").mkdir()
        home._make_home(place)
        assert stat.S_IMODE(place.stat().st_mode) == 0o700


def test_a_directory_that_holds_other_things_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "thing").touch()
    tmp_path.chmod(0o755)
    home._make_home(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    tmp_path.chmod(0o1777)
    with pytest.raises(Conflict, match="other things") as caught:
        Pool.open(tmp_path)
    assert str(tmp_path / "podtree") in caught.value.hint
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o1777


def test_the_environment_names_the_place(pool_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PODTREE_HOME", str(pool_home))
    assert home.default_home() == pool_home
    monkeypatch.delenv("PODTREE_HOME")
    assert home.default_home() == Path("/var/lib/podtree")


def test_unmounting_frees_the_loop_device_and_the_next_command_mounts_again(pool: Pool, pool_home: Path) -> None:
    record = take(pool, pool.create_pod("web", {}), "a")
    pool.close()
    assert Pool.close_home(pool_home)
    assert list(loop.attached(str(pool_home / "pool.img"))) == []
    assert str(pool_home) not in Path("/proc/self/mountinfo").read_text()
    assert not Pool.close_home(pool_home)
    with Pool.open(pool_home) as again:
        assert again.resolve("web").id == record.id


def test_a_pool_in_use_is_not_unmounted(pool: Pool, pool_home: Path) -> None:
    with open(pool.root / "held", "w"), pytest.raises(Conflict):
        home.unmount(pool_home, timeout=0.1)
    pool.create_pod("web", {})


def test_several_first_users_at_once(pool_home: Path) -> None:
    def first_use() -> None:
        with Pool.open(pool_home, initial_size=256 * MIB) as pool:
            pool.create_pod(None, {})

    statuses: list[int] = []
    threads = [threading.Thread(target=lambda: statuses.append(in_child(first_use))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [0] * 6
    assert len(list(loop.attached(str(pool_home / "pool.img")))) == 1
    with Pool.open(pool_home) as pool:
        assert len(pool.pods()) == 6


def test_a_second_mount_namespace_uses_the_same_loop_device(pool: Pool, pool_home: Path) -> None:
    """Two devices on one file would be two caches of one disk."""
    script = (
        "from pathlib import Path; from podtree.pool import Pool; from podtree.kernel.sys import NR, syscall;"
        f"syscall(NR.umount2, b'{pool.root}\\0', 0); pool = Pool.open(Path('{pool_home}'));"
        "pool.create_pod('inside', {}); pool.close()"
    )
    subprocess.run(["unshare", "-m", sys.executable, "-c", script], check=True, timeout=60)
    assert len(list(loop.attached(str(pool_home / "pool.img")))) == 1
    assert [pod.name for pod in pool.pods()] == ["inside"]


def test_without_mkfs_it_says_what_to_install(pool_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_args, **_kwargs: None)
    with pytest.raises(Unsupported) as caught:
        Pool.open(pool_home)
    assert "btrfs-progs" in caught.value.hint
    assert not (pool_home / "pool.img").exists()


def test_without_root_it_says_so(pool_home: Path) -> None:
    def as_nobody() -> None:
        os.setresuid(65534, 65534, 65534)
        with pytest.raises((Unsupported, PermissionError)):
            Pool.open(pool_home / "mine")

    assert in_child(as_nobody) == 0


def test_a_directory_on_btrfs_needs_no_file(pool: Pool) -> None:
    place = pool.root / "inner"
    with Pool.open(place) as inner:
        record = take(inner, inner.create_pod("web", {}), "a")
        assert not (place / "pool.img").exists()
        assert inner.info().file is None
        assert inner.gc().finished
    assert not Pool.close_home(place)
    with Pool.open(place) as inner:
        assert inner.resolve("web").id == record.id


def test_the_pool_grows_on_demand(pool: Pool, pool_home: Path) -> None:
    web = pool.create_pod("web", {})
    before = pool.info()
    pool.make_room(1500 * MIB)
    grown = pool.info()
    assert grown.size > before.size and grown.free > 1500 * MIB
    data = os.urandom(MIB)
    with open(pool.vol_dir(web.id) / "upper/big", "wb") as file:
        for _ in range(300):
            file.write(data)
    take(pool, web, "a")
    pool.close()
    Pool.close_home(pool_home)
    with Pool.open(pool_home) as again:
        assert again.info().size == grown.size
        assert (again.vol_dir(web.id) / "upper/big").stat().st_size == 300 * MIB


def test_a_growth_cut_short_is_taken_up_by_the_next(pool: Pool, pool_home: Path) -> None:
    """The process died after it had enlarged the file."""
    image = pool_home / "pool.img"
    os.truncate(image, image.stat().st_size + 100 * MIB)
    size = pool.info().size
    assert home.grow(pool_home, 50 * MIB) == 50 * MIB
    assert pool.info().size == size + 150 * MIB


def test_what_is_freed_is_given_back_to_the_disk(pool: Pool, pool_home: Path) -> None:
    web = pool.create_pod("web", {})
    (pool.vol_dir(web.id) / "upper/big").write_bytes(os.urandom(64 * MIB))
    take(pool, web, "a")
    full = pool.info().file_allocated or 0
    pool.remove_pod(web.id)
    pool.gc()
    assert (pool_home / "pool.img").stat().st_blocks * 512 < full - 48 * MIB


def test_no_room_is_said_before_anything_is_written(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    web = pool.create_pod("web", {})
    with pytest.raises(PodtreeError, match="no room"):
        pool.make_room(1 << 50)
    monkeypatch.setattr(home, "disk_free", lambda _home: MIB)
    with pytest.raises(PodtreeError, match="the disk"):
        pool.begin_checkpoint(web.id)
    monkeypatch.undo()
    take(pool, web, "a")


def test_a_full_pool_can_be_emptied(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod writes until nothing goes any more, and the disk has no room to grow into."""
    monkeypatch.setattr(home, "grow", lambda _home, _by: 0)
    web, other = pool.create_pod("web", {}), pool.create_pod("other", {})
    first = take(pool, web, "a")
    pool.make_room()
    with pytest.raises(OSError, match="No space"), open(pool.vol_dir(web.id) / "upper/big", "wb", 0) as file:
        while True:
            file.write(bytes(MIB))
    with pytest.raises(PodtreeError, match="no room"):
        pool.begin_checkpoint(web.id)
    with pytest.raises(PodtreeError, match="no room"):
        pool.clone_pod(first.id, None)
    for _ in range(30):
        pool.set_pod_state(other.id, PodState.EXITED, exit_code=1)
    pool.discard(first)
    pool.remove_pod(web.id)
    assert pool.gc().bytes_freed > 50 * MIB
    assert fsck(pool).damage == ()
    take(pool, other, "b")


def test_the_index_survives_a_fork(pool: Pool) -> None:
    pool.create_pod("web", {})

    def child() -> None:
        pool.create_pod("other", {})
        pool.close()

    assert in_child(child) == 0
    assert {pod.name for pod in pool.pods()} == {"web", "other"}
    pool.create_pod("third", {})


def test_an_index_of_a_newer_podtree_is_left_alone(pool: Pool, pool_home: Path) -> None:
    with pool.index.transaction() as connection:
        connection.execute("PRAGMA user_version = 99")
    with Pool.open(pool_home) as again, pytest.raises(PodtreeError, match="version 99"):
        again.pods()
    with pool.index.transaction() as connection:
        connection.execute("PRAGMA user_version = 1")
