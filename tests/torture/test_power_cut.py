"""The power goes at a random instant, and the disk has dropped, kept or torn what was not flushed; or writes fail.

What was reported durable is there, whole. PODTREE_CUTS sets the number of instants (default 12), PODTREE_FAILURES that
of writes at which a disk fails (default 1), PODTREE_SEED which.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from faultydisk import FaultyDisk
from podtree.errors import PodtreeError
from podtree.pool import Pool
from pool_fixtures import MIB, content, pool_home, take  # noqa: F401
from test_pool_crash import assert_sound

# ruff: noqa: F811

FAILURES = int(os.environ.get("PODTREE_FAILURES", "1"))
CUTS = int(os.environ.get("PODTREE_CUTS", "12"))
SEED = int(os.environ.get("PODTREE_SEED", "0")) or random.SystemRandom().randrange(1 << 32)


@pytest.fixture
def disk(pool_home: Path, tmp_path: Path) -> Iterator[FaultyDisk]:
    """Below the pool in `pool_home`, which has been made."""
    Pool.open(pool_home, initial_size=256 * MIB).close()
    Pool.close_home(pool_home)
    made = FaultyDisk(pool_home / "pool.img", tmp_path)
    made.mount()
    try:
        yield made
    finally:
        Pool.close_home(pool_home)
        made.unmount()


def work(pool: Pool, chance: random.Random, disk: FaultyDisk, steps: int) -> list[tuple[int, str, str]]:
    """Checkpoints, branches, rewinds and removals; (position in the log when it was reported, what, id)."""
    reported: list[tuple[int, str, str]] = []
    web = pool.create_pod("web", {})
    for number in range(steps):
        record = take(pool, web, chance.choice("abc") * chance.randrange(1, 9))
        reported.append((disk.position, "made", record.id))
        match chance.randrange(5):
            case 0:
                pool.remove_pod(pool.clone_pod(record.id, None).id)
            case 1:
                pool.reset_pod(web.id, record.id)
            case 2:
                victim = chance.choice(pool.checkpoints(web.id))
                reported.append((disk.position, "unmade", victim.id))  # from here on it may be gone
                pool.discard(victim)
            case 3:
                pool.tag(f"t{number}", record.id)
                pool.untag(f"t{number}")
    return reported


def durable(reported: list[tuple[int, str, str]], at: int) -> set[str]:
    """What must be there of a disk whose power went then."""
    gone = {one for position, what, one in reported if what == "unmade" and position <= at}
    return {one for position, what, one in reported if what == "made" and position <= at} - gone


def test_power_cut(pool_home: Path, disk: FaultyDisk, tmp_path: Path) -> None:
    print(f"PODTREE_SEED={SEED}")
    chance = random.Random(SEED)
    with Pool.open(pool_home) as pool:
        reported = work(pool, chance, disk, max(8, CUTS // 4))
    end = disk.position
    Pool.close_home(pool_home)
    disk.unmount()
    for number in range(CUTS):
        at = chance.randrange(end) if number % 3 else chance.choice(reported)[0] + chance.randrange(3)
        disk.cut(at, chance, tmp_path / "cut")
        shutil.move(tmp_path / "cut", pool_home / "pool.img")
        what = f"PODTREE_SEED={SEED}, cut {number} at {at} of {end}"
        with Pool.open(pool_home) as revived:
            found = {record.id for record in revived.checkpoints()}
            assert found >= durable(reported, at), what
            for record in revived.checkpoints():
                assert content(revived, revived.checkpoint_dir(record.id)).startswith(record.message), what
            assert_sound(revived)
        Pool.close_home(pool_home)


@pytest.mark.parametrize("number", range(FAILURES))
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails(pool_home: Path, disk: FaultyDisk, tmp_path: Path, code: int, number: int) -> None:
    """An error at the nth write is reported, nothing hangs, and what was durable is there on another disk."""
    print(f"PODTREE_SEED={SEED}")
    chance = random.Random(SEED)
    after = (chance.randrange(200) + number) % 200
    with Pool.open(pool_home) as pool:
        web = pool.create_pod("web", {})
        first = take(pool, web, "a")
        known = {first.id}
        disk.fail(code, after)
        begun = time.monotonic()
        for _ in range(100):
            try:
                known.add(take(pool, web, "b").id)
            except PodtreeError as error:
                assert error.message
                break
            except OSError as error:
                assert error.errno in (errno.EIO, errno.EROFS, errno.ENOSPC), error
                break
        else:
            pytest.fail("a disk that fails went unnoticed")
        assert time.monotonic() - begun < 120
    Pool.close_home(pool_home)
    position = disk.position
    disk.fail(0, 0)
    disk.unmount()
    disk.cut(position, random.Random(1), tmp_path / "cut")
    shutil.move(tmp_path / "cut", pool_home / "pool.img")
    with Pool.open(pool_home) as revived:
        assert {record.id for record in revived.checkpoints()} >= known, f"PODTREE_SEED={SEED}"
        assert_sound(revived)
        take(revived, revived.pod("web"), "c")
