"""Pods, checkpoints, tags: what the pool promises when nothing goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from podtree.errors import Conflict, NotFound, PodtreeError, UsageError
from podtree.pool import CheckpointId, PodId, PodState, Pool
from pool_fixtures import content, fill, pool, pool_home, take  # noqa: F401

# ruff: noqa: F811


def test_a_new_pod_has_an_empty_volume_and_image(pool: Pool) -> None:
    web = pool.create_pod("web", {"argv": ["redis-server"]})
    assert sorted(os.listdir(pool.vol_dir(web.id))) == ["log", "upper", "work"]
    assert os.listdir(pool.img_dir(web.id)) == []
    assert (web.state, web.parent, web.head, web.spec) == (PodState.CREATED, None, None, {"argv": ["redis-server"]})
    assert pool.pod("web") == pool.pod(web.id) == pool.pod(web.id[:5]) == web
    assert pool.pods() == [web]


def test_everything_is_for_root_only(pool: Pool) -> None:
    web = pool.create_pod("web", {})
    record = take(pool, web, "a")
    for path in (pool.home, pool.root, pool.pod_dir(web.id), pool.checkpoint_dir(record.id), pool.run_dir(web.id)):
        assert path.stat().st_mode & 0o077 == 0, path
    assert (pool.home / "pool.img").stat().st_mode & 0o077 == 0


def test_pods_without_a_name_get_one(pool: Pool) -> None:
    names = {pool.create_pod(None, {}).name for _ in range(5)}
    assert len(names) == 5 and all("-" in name for name in names)


@pytest.mark.parametrize("name", ["", "a@b", "-x", "a/b", "..", "0123456789ab", "a b", "x" * 64, "é", "a\n"])
def test_names_that_could_not_be_referred_to_are_refused(pool: Pool, name: str) -> None:
    with pytest.raises(UsageError):
        pool.create_pod(name, {})
    assert os.listdir(pool.root / "pods") == os.listdir(pool.root / "drafts") == []


def test_names_are_unique_among_pods_and_tags(pool: Pool) -> None:
    web = pool.create_pod("web", {})
    first = take(pool, web, "a")
    pool.tag("good", first.id)
    for attempt in (
        lambda: pool.create_pod("web", {}),
        lambda: pool.create_pod("good", {}),
        lambda: pool.clone_pod(first.id, "web"),
        lambda: pool.tag("web", first.id),
        lambda: pool.tag("good", first.id),
        lambda: pool.rename_pod(web.id, "good"),
    ):
        with pytest.raises(Conflict):
            attempt()
    assert os.listdir(pool.root / "pods") == [web.id]


def test_a_checkpoint_keeps_volume_and_image_of_its_time(pool: Pool) -> None:
    web = pool.create_pod("web", {})
    records = [take(pool, web, text) for text in ("a", "b", "c")]
    fill(pool, web, "d")
    assert [content(pool, pool.checkpoint_dir(record.id))[0] for record in records] == ["a", "b", "c"]
    assert [record.number for record in records] == [1, 2, 3]
    assert [record.parent for record in records] == [None, records[0].id, records[1].id]
    assert [record.message for record in records] == ["a", "b", "c"]
    assert pool.checkpoints() == records
    assert pool.pod("web").head == records[2].id


def test_the_summary_comes_back(pool: Pool) -> None:
    web = pool.create_pod("web", {})
    summary = {"pause_ms": 1.5, "processes": 3, "bytes_written": 12, "nested": {"a": [1, None]}}
    assert pool.resolve(take(pool, web, "a", summary).id).summary == summary


def test_an_aborted_draft_leaves_nothing(pool: Pool) -> None:
    web = pool.create_pod("web", {})
    for steps in range(4):
        draft = pool.begin_checkpoint(web.id)
        for step in (draft.flush_volume, draft.snapshot_volume, draft.snapshot_image)[:steps]:
            step()
        draft.abort()
        draft.abort()
        for name in ("drafts", "ckpts", "trash"):
            assert os.listdir(pool.root / name) == []
    assert take(pool, web, "a").number == 1


def test_an_incomplete_draft_can_not_be_committed(pool: Pool) -> None:
    web = pool.create_pod("web", {})
    draft = pool.begin_checkpoint(web.id)
    draft.snapshot_volume()
    with pytest.raises(PodtreeError, match="both"):
        draft.commit()
    with pytest.raises(PodtreeError, match="already"):
        draft.commit()
    assert os.listdir(pool.root / "drafts") == []
    take(pool, web, "a")


def test_one_checkpoint_of_a_pod_at_a_time(pool: Pool) -> None:
    web, other = pool.create_pod("web", {}), pool.create_pod("other", {})
    with pool.begin_checkpoint(web.id), pytest.raises(Conflict):
        pool.begin_checkpoint(web.id)
    with pool.begin_checkpoint(web.id):
        take(pool, other, "b")


def test_a_branch_starts_as_its_checkpoint_and_goes_its_own_way(pool: Pool) -> None:
    web = pool.create_pod("web", {"argv": ["x"]})
    first = take(pool, web, "a")
    take(pool, web, "b")
    one, two = pool.clone_pod(first.id, "one"), pool.clone_pod(first.id, None)
    assert (one.parent, one.head, one.spec, two.name) == (first.id, first.id, {"argv": ["x"]}, "web-1")
    fill(pool, one, "1")
    assert content(pool, pool.pod_dir(two.id))[0] == content(pool, pool.checkpoint_dir(first.id))[0] == "a"
    mine = take(pool, one, "2")
    assert (mine.parent, mine.number, mine.ref) == (first.id, 1, "one@1")


def test_a_branch_of_a_missing_checkpoint(pool: Pool) -> None:
    with pytest.raises(NotFound):
        pool.clone_pod(CheckpointId("0" * 12), None)


def test_rewind_puts_both_back_and_later_checkpoints_descend_from_there(pool: Pool) -> None:
    web = pool.create_pod("web", {"argv": ["x"]})
    first, second = take(pool, web, "a"), take(pool, web, "b")
    (pool.pod_dir(web.id) / "note.json").write_text("kept")
    pool.reset_pod(web.id, first.id)
    assert content(pool, pool.pod_dir(web.id))[0] == "a"
    assert (pool.pod_dir(web.id) / "note.json").read_text() == "kept"
    third = take(pool, web, "c")
    assert (third.parent, third.number) == (first.id, 3)
    assert content(pool, pool.checkpoint_dir(second.id))[0] == "b"
    assert os.listdir(pool.root / "trash") == []


def test_rewind_with_an_overlay_mounted_on_the_old_volume(pool: Pool, pool_home: Path) -> None:
    web = pool.create_pod("web", {})
    first = take(pool, web, "a")
    volume = pool.vol_dir(web.id)
    merged = pool_home / "merged"
    merged.mkdir()
    options = f"lowerdir=/usr/share,upperdir={volume}/upper,workdir={volume}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(merged)], check=True)
    try:
        (merged / "late").write_text("x")
        take(pool, web, "b")
        pool.reset_pod(web.id, first.id)
        assert not (volume / "upper/late").exists()
    finally:
        subprocess.run(["umount", str(merged)], check=True)


def test_a_checkpoint_may_be_discarded_while_a_pod_is_rewound_to_it(pool: Pool) -> None:
    web = pool.create_pod("web", {})
    one, two, _three = (take(pool, web, text) for text in "abc")
    with pool.begin_reset(web.id, two.id) as reset:
        pool.discard(two)
        reset.commit()
    assert content(pool, pool.pod_dir(web.id))[0] == "b"
    assert pool.pod("web").head == one.id
    with pool.begin_reset(web.id, one.id) as reset:
        pass
    assert content(pool, pool.pod_dir(web.id))[0] == "b" and os.listdir(pool.root / "drafts") == []


def test_a_pods_past_is_where_it_can_be_rewound_to(pool: Pool) -> None:
    """Its own checkpoints, and its origin's up to where it was branched; not what came later there, nor others'."""
    web = pool.create_pod("web", {})
    one, two, three = (take(pool, web, text) for text in "abc")
    branch = pool.clone_pod(two.id, "try1")
    own = take(pool, branch, "d")
    deep = pool.clone_pod(own.id, "try2")
    for record in (one, two, own):
        pool.reset_pod(deep.id, record.id)
        assert content(pool, pool.pod_dir(deep.id))[0] == record.message
        assert pool.pod("try2").head == record.id
    for pod, record in ((deep, three), (branch, three), (web, own)):
        with pytest.raises(UsageError, match="no checkpoint of pod"):
            pool.reset_pod(pod.id, record.id)
    stranger = pool.create_pod("other", {})
    with pytest.raises(UsageError):
        pool.reset_pod(stranger.id, one.id)


def test_states_and_the_pid_of_a_running_pod(pool: Pool) -> None:
    web = pool.create_pod("web", {})
    running = pool.set_pod_state(web.id, PodState.RUNNING, init_pid=os.getpid())
    assert (running.state, running.init_pid, running.is_running) == (PodState.RUNNING, os.getpid(), True)
    with pytest.raises(Conflict):
        pool.remove_pod(web.id)
    ended = pool.set_pod_state(web.id, PodState.EXITED, exit_code=3)
    assert (ended.state, ended.exit_code, ended.init_pid) == (PodState.EXITED, 3, None)
    assert ended.ended is not None and ended.ended.tzinfo is not None


def test_a_running_pod_whose_processes_are_gone_shows_as_lost(pool: Pool) -> None:
    web = pool.create_pod("web", {})
    init, monitor = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    pool.set_pod_state(web.id, PodState.RUNNING, init_pid=init.pid, monitor_pid=monitor.pid)
    init.send_signal(signal.SIGKILL)
    init.wait()
    assert pool.pod("web").state is PodState.RUNNING  # its end is about to be noted
    monitor.kill()
    monitor.wait()
    assert pool.pod("web").state is PodState.LOST
    pool.remove_pod(web.id)


def test_a_pod_of_before_the_reboot_shows_as_lost(pool: Pool) -> None:
    web = pool.create_pod("web", {})
    pool.set_pod_state(web.id, PodState.RUNNING, init_pid=os.getpid())
    with pool.index.transaction() as connection:
        connection.execute("UPDATE pods SET boot_id = 'another'")
    assert pool.pod("web").state is PodState.LOST


def test_rm_takes_checkpoints_along_but_those_that_others_need(pool: Pool) -> None:
    web = pool.create_pod("web", {})
    records = [take(pool, web, text) for text in "abcde"]
    pool.tag("gold", records[3].id)
    branch = pool.clone_pod(records[1].id, "try1")
    pool.reset_pod(web.id, records[0].id)
    side = take(pool, web, "f")
    removed = pool.remove_pod(web.id)
    assert set(removed.checkpoints) == {records[4].id, side.id}
    assert [record.ref for record in pool.checkpoints()] == ["web@1", "web@2", "web@3", "web@4"]
    with pytest.raises(NotFound):
        pool.pod("web")
    assert pool.resolve("web@2").id == records[1].id
    assert pool.resolve("gold").id == records[3].id
    pool.untag("gold")
    assert set(pool.gc().checkpoints) == {records[2].id, records[3].id}
    assert set(pool.discard(branch).checkpoints) == {records[0].id, records[1].id}
    for name in ("pods", "ckpts", "drafts", "trash"):
        assert os.listdir(pool.root / name) == []
    assert pool.pods(removed=True) == []


def test_a_removed_pods_name_is_free_again(pool: Pool) -> None:
    first = pool.create_pod("web", {})
    old = take(pool, first, "a")
    pool.tag("old", old.id)
    pool.remove_pod(first.id)
    second = pool.create_pod("web", {})
    new = take(pool, second, "b")
    assert pool.resolve("web@1").id == new.id
    assert pool.resolve("old").id == old.id


def test_discarding_one_in_the_middle_joins_its_neighbours(pool: Pool) -> None:
    web = pool.create_pod("web", {})
    one, two, three = (take(pool, web, text) for text in "abc")
    branch = pool.clone_pod(two.id, "try1")
    pool.discard(two)
    assert pool.checkpoint(three.id).parent == one.id
    assert pool.pod(branch.id).parent == pool.pod(branch.id).head == one.id
    with pytest.raises(NotFound, match="discarded"):
        pool.resolve("web@2")
    assert take(pool, web, "d").number == 4
    assert take(pool, branch, "e").parent == one.id


def test_discarding_the_newest_and_the_only_one(pool: Pool) -> None:
    web = pool.create_pod("web", {})
    one, two = take(pool, web, "a"), take(pool, web, "b")
    pool.discard(two)
    assert pool.pod("web").head == one.id
    pool.discard(one)
    assert pool.pod("web").head is None
    assert take(pool, web, "c").number == 3


def test_a_tagged_checkpoint_is_not_discarded(pool: Pool) -> None:
    record = take(pool, pool.create_pod("web", {}), "a")
    pool.tag("gold", record.id)
    with pytest.raises(Conflict, match="gold"):
        pool.discard(record)
    pool.untag("gold")
    pool.discard(record)


def test_the_parent_may_be_discarded_while_a_checkpoint_is_made(pool: Pool) -> None:
    web = pool.create_pod("web", {})
    one, two = take(pool, web, "a"), take(pool, web, "b")
    fill(pool, web, "c")
    with pool.begin_checkpoint(web.id) as draft:
        draft.snapshot_volume()
        pool.discard(two)
        draft.snapshot_image()
        assert draft.commit().parent == one.id


def test_the_winner_takes_name_and_history(pool: Pool) -> None:
    web = pool.create_pod("web", {})
    records = [take(pool, web, text) for text in "abc"]
    branch = pool.clone_pod(records[1].id, "try1")
    mine = take(pool, branch, "x")
    other = pool.clone_pod(records[2].id, "try2")
    winner = pool.commit_pod(branch.id, web.id)
    assert (winner.id, winner.name, winner.parent) == (branch.id, "web", None)
    assert [pool.resolve(f"web@{n}").id for n in (1, 2, 3, 4)] == [*(r.id for r in records), mine.id]
    assert not pool.pod_dir(web.id).exists()
    assert content(pool, pool.pod_dir(winner.id))[0] == "x"
    assert pool.pod(other.id).parent == records[2].id
    assert take(pool, winner, "y").ref == "web@5"
    assert pool.gc().checkpoints == ()
    with pytest.raises(NotFound):
        pool.pod("try1")


def test_only_a_branch_can_take_the_place_of_an_ended_origin(pool: Pool) -> None:
    web, stranger = pool.create_pod("web", {}), pool.create_pod("stranger", {})
    branch = pool.clone_pod(take(pool, web, "a").id, None)
    with pytest.raises(Conflict, match="not branched"):
        pool.commit_pod(stranger.id, web.id)
    with pytest.raises(Conflict):
        pool.commit_pod(web.id, web.id)
    pool.set_pod_state(web.id, PodState.RUNNING, init_pid=os.getpid())
    with pytest.raises(Conflict, match="running"):
        pool.commit_pod(branch.id, web.id)
    assert {pod.name for pod in pool.pods()} == {"web", "web-1", "stranger"}


def test_gc_reports_what_it_frees(pool: Pool) -> None:
    web = pool.create_pod("web", {})
    (pool.vol_dir(web.id) / "upper/big").write_bytes(os.urandom(8 << 20))
    record = take(pool, web, "a")
    pool.tag("t", record.id)
    pool.remove_pod(web.id)
    pool.untag("t")
    stray = pool.root / "ckpts" / "0123456789ab"
    pool.store.volumes.create(str(pool.root / "loose"))
    stray.mkdir()
    os.rename(pool.root / "loose", stray / "vol")
    plan = pool.gc(dry_run=True)
    assert (plan.checkpoints, plan.leftovers, plan.bytes_freed) == ((record.id,), ("0123456789ab",), 0)
    report = pool.gc()
    assert (report.checkpoints, report.leftovers, report.finished) == ((record.id,), ("0123456789ab",), True)
    assert report.bytes_freed >= 8 << 20
    assert pool.gc().checkpoints == pool.gc().leftovers == ()


def test_gc_leaves_what_living_processes_make(pool: Pool, pool_home: Path) -> None:
    web = pool.create_pod("web", {})
    fill(pool, web, "a")
    draft = pool.begin_checkpoint(web.id)
    draft.snapshot_volume()
    with Pool.open(pool_home) as other:
        assert other.gc().leftovers == ()
    draft.snapshot_image()
    draft.commit()


def test_locks_are_between_processes_and_reentrant_within_one(pool: Pool, pool_home: Path) -> None:
    pod = PodId("0123456789ab")
    with Pool.open(pool_home) as other, pool.lock_pod(pod):
        with pool.lock_pod(pod):
            pass
        with pytest.raises(Conflict), other.lock_pod(pod, timeout=0.05):
            pass
    with Pool.open(pool_home) as other, other.lock_pod(pod, timeout=0):
        pass
