"""Dying at any point leaves a whole checkpoint (pod, rewind...) or none; what was reported is on the disk."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from podtree.pool import Pool, faults
from podtree.pool.fsck import fsck
from pool_fixtures import content, fill, in_child, pool, pool_home, take  # noqa: F401

# ruff: noqa: F811

Work = Callable[[Pool], object]


def die_at(number: int) -> list[str]:
    """Arm the fault points: SIGKILL at the `number`th one that is passed."""
    passed: list[str] = []

    def hook(name: str) -> None:
        passed.append(name)
        if len(passed) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    faults.hook = hook
    return passed


def every_death(pool: Pool, work: Work, check: Callable[[int], None]) -> int:
    """Do `work` in children that die at the first, second... fault point, until one comes through; their count."""
    for number in range(1, 60):

        def child(number: int = number) -> None:
            die_at(number)
            work(pool)

        status = in_child(child)
        assert status in (0, signal.SIGKILL), status
        check(number)
        if status == 0:
            return number - 1
    raise AssertionError("never came through")


def assert_sound(pool: Pool) -> None:
    """What is there is whole, and after a gc there's nothing else."""
    pool.gc()
    report = fsck(pool)
    assert report.damage == () and report.garbage == ()
    assert os.listdir(pool.root / "drafts") == os.listdir(pool.root / "trash") == []
    assert set(os.listdir(pool.root / "ckpts")) == {record.id for record in pool.checkpoints()}
    assert set(os.listdir(pool.root / "pods")) == {pod.id for pod in pool.pods()}
    for record in pool.checkpoints():
        assert content(pool, pool.checkpoint_dir(record.id))[: len(record.message)] == record.message
    for pod in pool.pods():
        assert sorted(set(os.listdir(pool.pod_dir(pod.id))) & {"vol", "img"}) == ["img", "vol"]


def test_checkpoint(pool: Pool) -> None:
    web = pool.create_pod("web", {})
    first = take(pool, web, "a")

    def check(_number: int) -> None:
        assert_sound(pool)
        numbers = [record.number for record in pool.checkpoints()]
        assert numbers == list(range(1, len(numbers) + 1))
        assert pool.pod("web").head == pool.resolve("web").id

    deaths = every_death(pool, lambda pool: take(pool, web, "b"), check)
    assert deaths >= 6
    assert pool.checkpoints()[0].id == first.id
    assert take(pool, web, "c").parent == pool.resolve("web@latest").parent


def test_leftovers_go_at_the_next_checkpoint(pool: Pool) -> None:
    web = pool.create_pod("web", {})

    def dying() -> None:
        die_at(2)
        take(pool, web, "a")

    assert in_child(dying) == signal.SIGKILL
    assert len(os.listdir(pool.root / "drafts")) == 1
    take(pool, web, "b")
    assert os.listdir(pool.root / "drafts") == []


def test_new_pods_and_branches(pool: Pool) -> None:
    record = take(pool, pool.create_pod("web", {}), "a")
    assert every_death(pool, lambda pool: pool.create_pod(None, {}), lambda _: assert_sound(pool)) >= 4
    assert every_death(pool, lambda pool: pool.clone_pod(record.id, None), lambda _: assert_sound(pool)) >= 4


def test_rewind(pool: Pool) -> None:
    web = pool.create_pod("web", {})
    first, second = take(pool, web, "a"), take(pool, web, "b")
    seen = set()

    def check(_number: int) -> None:
        assert_sound(pool)
        now = content(pool, pool.pod_dir(web.id))[0]
        seen.add(now)
        with pool.begin_checkpoint(web.id) as draft:  # what a checkpoint made now would descend from
            assert draft.parent == {"a": first.id, "b": second.id}[now]
        pool.reset_pod(web.id, second.id)

    assert every_death(pool, lambda pool: pool.reset_pod(web.id, first.id), check) >= 4
    assert seen == {"a", "b"}


def test_removal(pool: Pool) -> None:
    def work(pool: Pool) -> None:
        web = pool.create_pod("web", {})
        take(pool, web, "a")
        record = take(pool, web, "b")
        pool.discard(record)
        pool.remove_pod(web.id)

    def check(_number: int) -> None:
        assert_sound(pool)
        for pod in pool.pods():
            pool.remove_pod(pod.id)
        assert_sound(pool)
        assert pool.checkpoints() == []

    assert every_death(pool, work, check) >= 20


def test_collection(pool: Pool) -> None:
    def prepare() -> None:
        web = pool.create_pod("web", {})
        pool.tag("t", take(pool, web, "a").id)
        pool.remove_pod(web.id)
        pool.untag("t")

    prepare()

    def check(_number: int) -> None:
        assert_sound(pool)
        prepare()

    assert every_death(pool, lambda pool: pool.gc(), check) >= 3


def test_deaths_at_random_times(pool: Pool) -> None:
    """Not at points that somebody thought of."""
    web = pool.create_pod("web", {})
    take(pool, web, "a")

    def busy() -> None:
        while True:
            record = take(pool, web, "b")
            pool.clone_pod(record.id, None)
            pool.reset_pod(web.id, record.id)

    for seed in range(25):
        pid = os.fork()
        if pid == 0:
            busy()
        time.sleep(random.Random(seed).uniform(0.005, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for pod in pool.pods():
            if pod.id != web.id:
                pool.remove_pod(pod.id)
    assert_sound(pool)


def test_power_loss(pool: Pool, pool_home: Path, tmp_path: Path) -> None:
    """The disk as it is at each fault point, and after each commit, is a sound pool with all that was reported."""
    web = pool.create_pod("web", {})
    images: list[tuple[str, list[str], Path]] = []
    reported: list[str] = []

    def cut(name: str) -> None:
        copy = tmp_path / f"{len(images)}.img"
        subprocess.run(["cp", "--sparse=always", pool_home / "pool.img", copy], check=True)
        images.append((name, list(reported), copy))

    for text in "abc":
        faults.hook = cut if text == "b" else None
        reported.append(take(pool, web, text).id)
        faults.hook = None
        cut(f"after {text}")
    first = pool.checkpoint(pool.resolve("web@1").id)
    faults.hook = cut
    pool.reset_pod(web.id, first.id)
    faults.hook = None
    pool.close()
    Pool.close_home(pool_home)
    for name, known, image in images:
        # The same file system twice at a time confuses the kernel: one after the other, in the same place.
        shutil.move(image, pool_home / "pool.img")
        with Pool.open(pool_home) as revived:
            found = {record.id for record in revived.checkpoints()}
            assert found >= set(known), name
            assert_sound(revived)
        Pool.close_home(pool_home)


def test_gc_beside_checkpoints(pool: Pool, pool_home: Path) -> None:
    """Collections and checkpoints of several processes at once take nothing from each other."""
    pods = [pool.create_pod(f"pod{number}", {}) for number in range(2)]
    until = time.monotonic() + 2

    def collect() -> None:
        while time.monotonic() < until:
            pool.gc(timeout=0)

    def checkpoint(name: str) -> None:
        pod = pool.pod(name)
        while time.monotonic() < until:
            take(pool, pod, "a")
            pool.remove_pod(pool.clone_pod(pool.resolve(name).id, None).id)

    statuses: list[int] = []
    works = [collect, collect, *(lambda pod=pod: checkpoint(pod.name) for pod in pods)]
    threads = [threading.Thread(target=lambda work=work: statuses.append(in_child(work))) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [0, 0, 0, 0]
    assert_sound(pool)
    assert {record.pod_name for record in pool.checkpoints()} == {"pod0", "pod1"}


@pytest.mark.parametrize("point", ["commit:meta", "install:renamed", "install:durable", "commit:transaction"])
def test_an_error_in_commit_leaves_nothing(pool: Pool, point: str) -> None:
    web = pool.create_pod("web", {})

    def hook(name: str) -> None:
        if name == point:
            faults.hook = None
            raise OSError(28, "No space left on device")

    faults.hook = hook
    with pytest.raises(OSError, match="space"):
        take(pool, web, "a")
    assert os.listdir(pool.root / "ckpts") == os.listdir(pool.root / "drafts") == []
    fill(pool, web, "b")
    assert take(pool, web, "b").number == 1


def test_an_interrupt_right_after_the_transaction_keeps_the_checkpoint(pool: Pool) -> None:
    web = pool.create_pod("web", {})

    def hook(name: str) -> None:
        if name == "commit:indexed":
            raise KeyboardInterrupt

    faults.hook = hook
    with pytest.raises(KeyboardInterrupt):
        take(pool, web, "a")
    faults.hook = None
    assert content(pool, pool.checkpoint_dir(pool.resolve("web@1").id))[0] == "a"
    take(pool, web, "b")
