"""fsck finds every flipped byte and every missing piece, names it, and never trips over it."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from podtree.errors import Conflict, Damaged, PodtreeError
from podtree.kernel import btrfs
from podtree.pool import CheckpointRecord, PodState, Pool
from podtree.pool.fsck import Damage, fsck
from podtree.pool.rebuild import rebuild
from podtree.pool.verify import verify_manifest, verify_pages
from podtree.pool.view import checkpoint_line
from pool_fixtures import PAGE, page_file, pool, pool_home, take  # noqa: F401

# ruff: noqa: F811


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """A snapshot that somebody tampers with."""
    btrfs.set_readonly(str(path), False)
    try:
        yield
    finally:
        btrfs.set_readonly(str(path), True)


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def one(pool: Pool) -> tuple[CheckpointRecord, CheckpointRecord]:
    """Two checkpoints: one to damage, one that must stay unsuspected."""
    web = pool.create_pod("web", {"argv": ["x"]})
    return take(pool, web, "a"), take(pool, web, "b")


def damage(pool: Pool, record: CheckpointRecord) -> list[Damage]:
    found = list(fsck(pool).damage)
    assert all((item.where, item.ref) == (record.id, record.ref) for item in found), found
    return found


def test_a_sound_pool(pool: Pool) -> None:
    one(pool)
    report = fsck(pool)
    assert (report.checkpoints, report.damage, report.garbage) == (2, (), ())
    assert report.files >= 2 * 8 and report.bytes > 0


FIRST = 0x7F0000000
FLIPS = [
    ("img/manifest", 3, "not a podtree manifest"),
    ("img/manifest", 10, "checksum"),
    ("img/manifest", 60, "checksum"),
    ("img/mem/1", (FIRST + 1) * PAGE + 7, f"page {FIRST + 1}: checksum"),
    ("img/mem/1.sum", (FIRST + 2) * 8, f"page {FIRST + 2}: checksum"),
    ("img/mem/1.map", 5, "checksum"),
    ("img/mem/1.map", 40, "checksum"),
    ("img/shm/1", PAGE, "page 1: checksum"),
    ("img/shm/1.sum", 3, "page 0: checksum"),
    ("img/shm/1.map", 33, "checksum"),
]


@pytest.mark.parametrize(("name", "offset", "what"), FLIPS)
def test_a_flipped_byte_of_the_image(pool: Pool, name: str, offset: int, what: str) -> None:
    record, _ = one(pool)
    top = pool.checkpoint_dir(record.id)
    with writable(top / "img"):
        flip(top / name, offset)
    (found,) = damage(pool, record)
    assert found.file == name.removesuffix(".sum").removesuffix(".map")
    assert what in found.what


@pytest.mark.parametrize(
    "name", ["img/manifest", "img/mem/1", "img/mem/1.sum", "img/mem/1.map", "img/shm/1", "meta.json"]
)
@pytest.mark.parametrize("how", ["missing", "empty", "cut", "directory"])
def test_a_missing_or_cut_file(pool: Pool, name: str, how: str) -> None:
    record, _ = one(pool)
    path = pool.checkpoint_dir(record.id) / name
    with writable(pool.checkpoint_dir(record.id) / "img"):
        if how in ("missing", "directory"):
            path.unlink()
        if how == "directory":
            path.mkdir()
        if how in ("empty", "cut"):
            os.truncate(path, 0 if how == "empty" else path.stat().st_size - 1)
    assert damage(pool, record)


@pytest.mark.parametrize("part", ["img", "vol", ""])
def test_a_missing_part(pool: Pool, part: str) -> None:
    record, _ = one(pool)
    top = pool.checkpoint_dir(record.id)
    if part:
        btrfs.destroy(str(top / part))
        (found,) = damage(pool, record)
        assert (found.file, "missing" in found.what) == (part, True)
        return
    pool.store.throw_away(top)
    (found,) = damage(pool, record)
    assert "directory is missing" in found.what
    pool.discard(record)
    assert fsck(pool).damage == ()


def test_a_snapshot_that_can_be_written(pool: Pool) -> None:
    record, _ = one(pool)
    btrfs.set_readonly(str(pool.checkpoint_dir(record.id) / "vol"), False)
    (found,) = damage(pool, record)
    assert (found.file, "written" in found.what) == ("vol", True)


def test_a_flipped_byte_on_the_disk(pool: Pool, pool_home: Path) -> None:
    """Below the file system: a file of the volume, of whose contents we keep no checksums."""
    web = pool.create_pod("web", {})
    needle = os.urandom(64)
    (pool.vol_dir(web.id) / "upper/precious").write_bytes(needle * 256)
    record = take(pool, web, "a")
    pool.close()
    Pool.close_home(pool_home)
    with open(pool_home / "pool.img", "r+b") as image:
        at = find(image.fileno(), needle)
        image.seek(at + 5)
        image.write(bytes([needle[5] ^ 0x10]))
    with Pool.open(pool_home) as again:
        found = fsck(again).damage
        assert {(item.file, item.what) for item in found} == {("vol/upper/precious", "Input/output error")}
        assert [item.where for item in found] == [f"pod {web.id}", record.id]


def find(fd: int, needle: bytes) -> int:
    size = os.fstat(fd).st_size
    at = 0
    while at < size:
        at = os.lseek(fd, at, os.SEEK_DATA)
        end = os.lseek(fd, at, os.SEEK_HOLE)
        index = os.pread(fd, end - at, at).find(needle)
        if index >= 0:
            return at + index
        at = end
    raise AssertionError("not found")


def test_the_index_and_the_disk(pool: Pool) -> None:
    record, _ = one(pool)
    (pool.root / "ckpts" / "0123456789ab" / "img").mkdir(parents=True)
    (pool.root / "drafts" / "0123456789ac").mkdir()
    report = fsck(pool)
    assert (report.damage, report.garbage) == ((), ("ckpts/0123456789ab", "drafts/0123456789ac"))
    pool.gc()
    assert fsck(pool).garbage == ()
    with pool.index._lock:
        connection = pool.index._connect()
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("UPDATE checkpoints SET parent = 'gone' WHERE id = ?", (record.id,))
        connection.execute("PRAGMA foreign_keys = ON")
    assert [item.where for item in fsck(pool).damage] == ["index"]


@pytest.mark.parametrize("content", [b"", b"not a database" * 1000, "scribbled", "missing"])
def test_a_damaged_index(pool: Pool, pool_home: Path, content: bytes | str) -> None:
    """It is said, the checkpoints are verified all the same, and nothing is taken for garbage."""
    record, _ = one(pool)
    pool.close()
    path = pool.root / "index.sqlite"
    if content == "scribbled":
        data = bytearray(path.read_bytes())
        for at in range(4096 * 2, len(data), 512):
            data[at : at + 64] = b"\xa5" * 64
        path.write_bytes(data)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.unlink()
    with writable(pool.checkpoint_dir(record.id) / "img"):
        flip(pool.checkpoint_dir(record.id) / "img/shm/1", 0)
    with Pool.open(pool_home) as again:
        report = fsck(again)
        with pytest.raises(Damaged):
            again.gc()
    assert "index" in {item.where for item in report.damage} and report.garbage == ()
    assert (record.id, "img/shm/1") in {(item.where, item.file) for item in report.damage}
    assert report.checkpoints == 2


def test_any_flipped_bit_of_the_index(pool: Pool, pool_home: Path) -> None:
    """No word of a traceback, whatever a bit makes of a row; and never a checkpoint less."""
    web = pool.create_pod("web", {"argv": ["x"]})
    records = [take(pool, web, text) for text in "abc"]
    pool.tag("gold", records[0].id)
    pool.set_pod_state(web.id, PodState.EXITED, exit_code=3)
    pool.close()
    path = pool.root / "index.sqlite"
    sound = path.read_bytes()
    random.seed(4)
    used = [at for at in range(len(sound)) if sound[at]]
    for at in random.sample(used, 150):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1 << random.randrange(8)]) + sound[at + 1 :])
        with Pool.open(pool_home) as again, contextlib.suppress(PodtreeError):
            fsck(again)
            again.pods(removed=True)
            again.resolve("web@2")
            checkpoint_line(again.resolve("gold"))
    path.write_bytes(sound)


def test_an_index_made_again(pool: Pool, pool_home: Path) -> None:
    """Pods, checkpoints, their order and their states are what they were; tags and names while they can be read."""
    web = pool.create_pod("web", {"argv": ["x"]})
    one, two = take(pool, web, "a"), take(pool, web, "b")
    branch = pool.clone_pod(one.id, "try1")
    three = take(pool, branch, "c")
    pool.reset_pod(web.id, one.id)
    gone = pool.clone_pod(two.id, "gone")
    kept = take(pool, gone, "d")
    pool.clone_pod(kept.id, "leaf")
    pool.remove_pod(gone.id)
    with pytest.raises(Conflict):
        rebuild(pool)
    pool.tag("gold", two.id)
    before = {record.id: record for record in pool.checkpoints()}
    for lost in (False, True):
        with open(pool.index.path, "r+b") as file:
            file.truncate(0) if lost else file.seek(100)
            file.write(b"" if lost else b"\x55")  # the type of the first page
        pool.close()
        with pytest.raises(Damaged):
            pool.pods()
        done = rebuild(pool)
        assert (done.pods, done.checkpoints, done.unreadable) == (3, 4, ())
        found = {record.id: record for record in pool.checkpoints()}
        for record in found.values():
            old = before[record.id]
            assert (record.ref, record.parent, record.time_ns, record.message) == (
                old.ref, old.parent, old.time_ns, old.message,
            )  # fmt: skip
        assert pool.pod(web.id).head == one.id and pool.pod(branch.id).head == three.id
        assert pool.pod(branch.id).parent == one.id and pool.pod(web.id).parent is None
        assert pool.pod("web").id == web.id and pool.pod("try1").spec == {"argv": ["x"]}
        assert fsck(pool).damage == () and fsck(pool).garbage == ()
        assert take(pool, pool.pod("web"), "e").number == 3
        pool.discard(pool.resolve("web@latest"))
    assert pool.resolve("gone@1").id == kept.id


def test_an_index_made_again_by_another_process(pool: Pool, pool_home: Path) -> None:
    """Whoever has the old one open, as a running pod's supervisor has, goes on with the new one."""
    web = pool.create_pod("web", {"argv": ["x"]})
    first = take(pool, web, "a")
    os.unlink(pool.index.path)
    other = Pool.open(pool_home)
    rebuild(other)
    second = take(pool, web, "b")
    assert [record.id for record in other.checkpoints()] == [first.id, second.id]
    other.close()


def test_meta_json_of_another_checkpoint(pool: Pool) -> None:
    record, other = one(pool)
    source, target = (pool.checkpoint_dir(item.id) / "meta.json" for item in (other, record))
    target.write_bytes(source.read_bytes())
    assert [item.file for item in damage(pool, record)] == ["meta.json"]
    target.write_text(json.dumps({"version": 1, "id": 5}))
    assert [item.file for item in damage(pool, record)] == ["meta.json"]


def test_any_flipped_bit_of_meta_json(pool: Pool) -> None:
    record, _ = one(pool)
    path = pool.checkpoint_dir(record.id) / "meta.json"
    sound = path.read_bytes()
    random.seed(5)
    for at in random.sample(range(len(sound)), 100):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1 << random.randrange(8)]) + sound[at + 1 :])
        assert [item.file for item in damage(pool, record)] == ["meta.json"], at
        with pytest.raises(Damaged):
            pool.clone_pod(record.id, None)


def test_a_volume_that_was_tampered_with(pool: Pool) -> None:
    """Of its files we keep no checksums, but the file system knows when it was last changed."""
    record, other = one(pool)
    for number, work in enumerate((lambda path: path.unlink(), lambda path: flip(path, 0))):
        top = pool.checkpoint_dir((record, other)[number].id) / "vol"
        with writable(top):
            work(top / "upper/file")
    found = {item.where: (item.file, item.what) for item in fsck(pool).damage}
    assert found == dict.fromkeys((record.id, other.id), ("vol", "has been changed since it was made"))


def test_a_pods_own_files(pool: Pool) -> None:
    web = pool.create_pod("web", {"argv": ["x"]})
    path = pool.pod_dir(web.id) / "spec.json"
    path.write_text(path.read_text().replace("x", "y"))
    assert [(item.where, item.file) for item in fsck(pool).damage] == [(f"pod {web.id}", "spec.json")]
    path.unlink()
    assert [(item.where, item.file) for item in fsck(pool).damage] == [(f"pod {web.id}", "spec.json")]


def test_only_some_checkpoints(pool: Pool) -> None:
    record, other = one(pool)
    with writable(pool.checkpoint_dir(record.id) / "img"):
        flip(pool.checkpoint_dir(record.id) / "img/shm/1", 0)
    assert fsck(pool, [other]).damage == ()
    assert len(fsck(pool, [record]).damage) == 1


def test_much_damage_is_not_listed_page_by_page(tmp_path: Path) -> None:
    page_file(tmp_path / "mem" / "1", {number: bytes([number % 251]) * PAGE for number in range(100)})
    os.truncate(tmp_path / "mem/1.sum", 0)
    os.truncate(tmp_path / "mem/1.sum", 800)
    found = verify_pages(tmp_path / "mem/1")
    assert len(found) == 21 and "more" in found[-1]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["1", "1.map", "1.sum"]), st.binary(max_size=200), st.integers(0, 100))
def test_hostile_files_of_pages(tmp_path: Path, name: str, content: bytes, offset: int) -> None:
    """Whatever is in them: an answer in text."""
    page_file(tmp_path / "mem" / "1", {0: b"a" * PAGE, 3: b"b" * PAGE})
    with open(tmp_path / "mem" / name, "r+b") as file:
        before = file.read()
        file.seek(offset)
        file.write(content)
        file.seek(0)
        changed = file.read() != before
    found = verify_pages(tmp_path / "mem/1")
    assert all(isinstance(item, str) for item in found)
    if changed and name == "1.map":
        assert found


@given(st.binary(max_size=300))
def test_hostile_manifests(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "manifest"
    path.write_bytes(content)
    assert verify_manifest(path)
    path.write_bytes(b"PODTREE\x01" + content)
    assert verify_manifest(path)
