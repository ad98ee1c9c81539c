"""Exports: a checkpoint goes to another pool and is the same there; nothing that is damaged or hostile gets in."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import socket
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from driver import PROJECT, SYSTEM_PYTHON, Podtree, until
from podtree.errors import Conflict, Damaged, NotFound, PodtreeError, Unsupported, UsageError
from podtree.image import manifest as manifest_file
from podtree.pod.spec import PodSpec, Volume
from podtree.pool import CheckpointRecord, Pool
from podtree.pool.fsck import fsck
from podtree.restore.pod import check_machine
from podtree.transfer import ocitar, schema
from podtree.transfer.export import export
from podtree.transfer.load import Imported, load
from pool_fixtures import MIB, content, pool, pool_home, take  # noqa: F401

# ruff: noqa: F811

DATA = Path(__file__).resolve().parent / "data"
SEED = int(os.environ.get("PODTREE_SEED", "0")) or random.SystemRandom().randrange(1 << 32)


@pytest.fixture
def other() -> Iterator[Pool]:
    """A second pool."""
    home = Path(tempfile.mkdtemp(prefix="ptpool", dir=os.environ.get("PODTREE_TEST_DIR", "/tmp")))
    try:
        with Pool.open(home, initial_size=256 * MIB) as opened:
            yield opened
    finally:
        Pool.close_home(home)
        shutil.rmtree(home)


def spec(**changes: Any) -> dict[str, Any]:
    return PodSpec(argv=("x",), **changes).to_dict()


def write(pool: Pool, record: CheckpointRecord, **options: Any) -> bytes:
    out = io.BytesIO()
    export(pool, record, out, **options)
    return out.getvalue()


def read(pool: Pool, raw: bytes, **options: Any) -> Imported:
    return load(pool, io.BytesIO(raw), **options)


def untouched(pool: Pool) -> None:
    """Nothing of a failed import is there but parts to go on with."""
    assert pool.checkpoints() == [] and pool.pods(removed=True) == [] and pool.tags() == {}
    assert not any(os.listdir(place) for place in (pool.store.ckpts, pool.store.drafts, pool.store.trash))
    assert not (pool.root / "rootfs").exists() or not os.listdir(pool.root / "rootfs")


def strange_tree(top: Path) -> None:
    """Everything that a volume can hold."""
    (top / "dir").mkdir(mode=0o1750)
    file = top / "dir" / "file"
    file.write_bytes(os.urandom(200_000))
    os.link(file, top / "another name")
    os.chown(file, 1000, 2000)
    os.chmod(file, 0o4711)
    os.setxattr(file, "user.note", b"\0\xff")
    os.setxattr(top / "dir", "trusted.overlay.opaque", b"y")
    os.symlink("nowhere/../../x", top / "link")
    os.chown(top / "link", 7, 8, follow_symlinks=False)
    os.utime(top / "link", ns=(1, 2), follow_symlinks=False)
    os.mkfifo(top / "fifo", 0o640)
    os.mknod(top / "whiteout", stat.S_IFCHR, os.makedev(0, 0))
    os.mknod(top / "disk", stat.S_IFBLK | 0o600, os.makedev(8, 1))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(top / "socket"))
    (top / os.fsdecode(b"no utf-8 \xff\n")).write_bytes(b"x")
    with open(top / "sparse", "wb") as sparse:
        sparse.seek(1 << 40)
        sparse.write(b"end")
    (top / "zeros").write_bytes(bytes(300_000))
    (top / "empty").touch()
    (top / "shm" / "deep").mkdir(parents=True)
    os.utime(top / "dir", ns=(123456789, 987654321))


def listing(top: Path) -> dict[str, Any]:
    """All of a tree but inode numbers."""
    found: dict[str, Any] = {}
    for directory, below, files in os.walk(top):
        for name in [*below, *files]:
            path = os.path.join(directory, name)
            info = os.lstat(path)
            kind = stat.S_IFMT(info.st_mode)
            data: Any = None
            if kind == stat.S_IFREG and info.st_size < 1 << 30:
                data = Path(path).read_bytes()
            elif kind == stat.S_IFLNK:
                data = os.readlink(path)
            xattrs = {key: os.getxattr(path, key, follow_symlinks=False)
                      for key in os.listxattr(path, follow_symlinks=False)}  # fmt: skip
            links = 1 if kind == stat.S_IFDIR else info.st_nlink
            size = 0 if kind == stat.S_IFDIR else info.st_size
            found[os.path.relpath(path, top)] = (
                info.st_mode, info.st_uid, info.st_gid, links, size, info.st_rdev, info.st_mtime_ns, data, xattrs,
            )  # fmt: skip
    return found


def test_everything_is_the_same_in_another_pool(pool: Pool, other: Pool) -> None:
    web = pool.create_pod("web", spec())
    strange_tree(pool.vol_dir(web.id) / "upper")
    record = take(pool, web, "a", {"bytes_written": 1, "pause_ms": 2.5})
    pool.tag("gold", record.id)
    raw = write(pool, pool.checkpoint(record.id))
    assert raw == write(pool, pool.checkpoint(record.id)), "an export of the same is the same, to the byte"
    result = read(other, raw)
    found = other.checkpoint(record.id)
    assert (result.id, result.known, result.tags, result.notes[1:]) == (record.id, False, ("gold",), ())
    assert msgspec.structs.replace(found, tags=()) == record
    for part in ("vol/upper", "img"):
        assert listing(other.checkpoint_dir(record.id) / part) == listing(pool.checkpoint_dir(record.id) / part)
    sparse = os.stat(other.checkpoint_dir(record.id) / "vol/upper/sparse")
    assert (sparse.st_size, sparse.st_blocks < 1024) == ((1 << 40) + 3, True)
    assert fsck(other).damage == ()
    assert write(other, found) == raw
    other.gc()
    assert other.has_checkpoint(record.id), "its tag keeps it"
    assert not os.listdir(other.store.incoming)


def test_the_layout_is_one_of_oci(pool: Pool, other: Pool, tmp_path: Path) -> None:
    """Any reader of tar and JSON finds its way; a directory with it can be imported, too."""
    record = take(pool, pool.create_pod("web", spec()), "a")
    with tarfile.open(fileobj=io.BytesIO(write(pool, record))) as archive:
        archive.extractall(tmp_path, filter="data")
    index = json.loads((tmp_path / "index.json").read_text())
    (top,) = index["manifests"]

    def blob(descriptor: dict[str, Any]) -> bytes:
        raw = (tmp_path / "blobs" / descriptor["digest"].replace(":", "/")).read_bytes()
        assert (len(raw), ocitar.digest_text(raw)) == (descriptor["size"], descriptor["digest"])
        return raw

    manifest = json.loads(blob(top))
    assert top["artifactType"] == manifest["artifactType"] == schema.ARTIFACT
    assert json.loads(blob(manifest["config"]))["id"] == record.id
    assert [layer["mediaType"] for layer in manifest["layers"] if blob(layer)] == [
        schema.PACK_TYPE, schema.CHUNKS_TYPE, schema.TREES_TYPE,
    ]  # fmt: skip
    assert load(other, tmp_path).id == record.id
    (tmp_path / "index.json").unlink()
    with pytest.raises(Damaged, match=r"index\.json"):
        load(other, tmp_path)


def test_only_the_difference(pool: Pool, other: Pool) -> None:
    web = pool.create_pod("web", spec())
    (pool.vol_dir(web.id) / "upper" / "large").write_bytes(os.urandom(4 * MIB))
    one = take(pool, web, "a")
    (pool.vol_dir(web.id) / "upper" / "copy").write_bytes((pool.vol_dir(web.id) / "upper" / "large").read_bytes())
    two = take(pool, web, "b")
    pool.tag("two", two.id)
    two = pool.checkpoint(two.id)
    whole, difference = write(pool, two), write(pool, two, since=one)
    assert len(difference) < 40_000 < 4 * MIB < len(whole) < 5 * MIB, "and the copy isn't there twice"
    with pytest.raises(NotFound, match=one.id):
        read(other, difference)
    untouched(other)
    read(other, write(pool, one))
    before = other.store.volumes.space().used
    read(other, difference)
    other.store.volumes.write_out()
    assert other.store.volumes.space().used - before < 3 * MIB, "what they have in common is there once"
    assert other.checkpoint(two.id).parent == one.id
    assert content(other, other.checkpoint_dir(two.id)) == content(pool, pool.checkpoint_dir(two.id))
    assert write(other, other.checkpoint(two.id)) == whole
    with pytest.raises(Conflict, match="itself"):
        write(pool, one, since=one)


def test_another_checkpoint_of_the_same_id(pool: Pool, other: Pool) -> None:
    """Is refused; the same one again is no error."""
    web = pool.create_pod("web", spec())
    one = take(pool, web, "a")
    raw = write(pool, one)
    assert read(pool, raw).known
    assert read(other, raw, tag="mine").tags == ("mine",)
    again = read(other, raw, tag="more")
    assert (again.known, again.tags) == (True, ("mine", "more"))
    impostor = forged(raw, message=one.message, id=take(pool, web, "b").id)
    with pytest.raises(Conflict, match="other contents"):
        read(pool, impostor)
    difference = forged(write(pool, one, since=pool.resolve("web@2")), since={"id": one.id, "digest": "0" * 64})
    with pytest.raises(Conflict, match="isn't here what it was"):
        read(other, forged(difference, id="0123456789ab"))


def forged(raw: bytes, **changes: Any) -> bytes:
    """An export whose configuration says something else, all digests of blobs right."""
    files: dict[str, bytes] = {m.name: m.read(1 << 30) for m in ocitar.members(io.BytesIO(raw))}
    index = msgspec.json.decode(files["index.json"], type=schema.OciIndex)

    def blob(descriptor: schema.Descriptor) -> bytes:
        return files[f"blobs/{descriptor.digest.replace(':', '/')}"]

    manifest = msgspec.json.decode(blob(index.manifests[0]), type=schema.OciManifest)
    config = json.loads(blob(manifest.config)) | changes
    out = io.BytesIO()
    writer = ocitar.Writer(out)
    layers = tuple(writer.blob(layer.media_type, blob(layer)) for layer in manifest.layers)
    new = writer.blob(schema.CONFIG_TYPE, json.dumps(config).encode())
    manifest = msgspec.structs.replace(manifest, config=new, layers=layers)
    top = writer.blob(schema.MANIFEST_TYPE, msgspec.json.encode(manifest))
    writer.finish(msgspec.json.encode(msgspec.structs.replace(index, manifests=(top,))))
    return out.getvalue()


def test_whose_it_is(pool: Pool, other: Pool) -> None:
    """An import adds nothing to the history of a pod that is here; it makes one of its own, by the same name."""
    web = pool.create_pod("web", spec())
    one, two, three = (take(pool, web, text) for text in "abc")
    raws = [write(pool, record) for record in (one, two, three)]
    pool.discard(one)
    result = read(pool, raws[0])
    assert pool.resolve("web@latest").id == three.id and pool.resolve("web").id == three.id
    assert pool.checkpoint(one.id).pod != web.id and pool.resolve(result.tags[0]).id == one.id
    for raw in (raws[2], raws[0], raws[1]):
        read(other, raw)
    assert [(r.ref, r.pod, r.parent) for r in other.checkpoints()] == [
        ("web@1", web.id, None), ("web@2", web.id, one.id), ("web@3", web.id, None),
    ]  # fmt: skip
    assert read(other, forged(raws[0], id="0123456789ab")).ref == "web@4"


def test_cut_off_and_gone_on_with(pool: Pool, other: Pool) -> None:
    web = pool.create_pod("web", spec())
    (pool.vol_dir(web.id) / "upper" / "large").write_bytes(os.urandom(20 * MIB))
    record = take(pool, web, "a")
    raw = write(pool, record)
    with pytest.raises(ocitar.Cut, match="first 2 parts are kept"):
        read(other, raw[: 20 * MIB])
    untouched(other)
    assert read(other, raw).parts_kept == 2
    other.discard(other.untag(f"imported-{record.id}") or other.checkpoint(record.id))
    for end in (0, 1, 511, 512, 600, 2000, len(raw) - 1024 - 512 - 1, len(raw) - 1024):
        with pytest.raises(Damaged):
            read(other, raw[:end])
        assert other.checkpoints() == []
    for path in other.store.incoming.iterdir():
        os.utime(path, (0, 0))
    assert other.gc().leftovers and not os.listdir(other.store.incoming)


def test_any_flipped_bit_is_found(pool: Pool, other: Pool) -> None:
    """At random, and at every field of the tar headers; what isn't found doesn't matter: the import is the same."""
    print(f"PODTREE_SEED={SEED}")
    chance = random.Random(SEED)
    record = take(pool, pool.create_pod("web", spec()), "a")
    pool.tag("gold", record.id)
    raw = write(pool, pool.checkpoint(record.id))
    places = [chance.randrange(len(raw)) for _ in range(60)] + [*range(100), *range(124, 160), *range(257, 265)]
    for at in places:
        bad = bytearray(raw)
        bad[at] ^= 1 << chance.randrange(8)
        try:
            read(other, bytes(bad))
        except PodtreeError:
            assert other.checkpoints() == [], at
            continue
        assert write(other, other.checkpoint(record.id)) == raw, at
        for tag in other.tags():
            other.untag(tag)
        other.discard(other.checkpoint(record.id))


HOSTILE_SPECS: list[tuple[dict[str, Any], type[PodtreeError], str]] = [
    (spec(volumes=(Volume("/", "/host"),)), UsageError, "say which ones"),
    (spec(rootfs="/etc"), UsageError, "say what it is here"),
    (spec(rootfs="/x/rootfs/../../etc"), UsageError, "say what it is here"),
    ({"argv": []}, Damaged, "spec"),
    ({"argv": ["x"], "memory": -1}, Damaged, "spec"),
    ({"argv": ["x"], "hostname": "\n"}, Damaged, "spec"),
]
HOSTILE_FIELDS: list[dict[str, Any]] = [
    {"version": 2}, {"id": "../../../etc/x"}, {"id": "0123456789AB"}, {"pod": ""}, {"number": 0}, {"number": -1},
    {"number": 1 << 70}, {"time_ns": -1}, {"time_ns": 1 << 63}, {"line": ["x"]}, {"own": 1 << 60}, {"own": -1},
    {"foreign": 1}, {"packs": []}, {"packs": [1 << 40]}, {"packs": [0, 0]}, {"digest": "0" * 64}, {"digest": ""},
    {"pod_name": "../x"}, {"summary": []}, {"spec": None}, {"tags": "x"},
    {"below": {"rootfs": "", "points": ["/../x"], "used": [], "carried": ""}},
    {"below": {"rootfs": "", "points": [], "used": [], "carried": "0" * 64}},
]  # fmt: skip


def test_a_hostile_configuration(pool: Pool, other: Pool, tmp_path: Path) -> None:
    raw = write(pool, take(pool, pool.create_pod("web", spec()), "a"))
    for changes in HOSTILE_FIELDS:
        with pytest.raises(Damaged):
            read(other, forged(raw, **changes))
            pytest.fail(f"taken: {changes}")
    for bad, kind, what in HOSTILE_SPECS:
        with pytest.raises(kind, match=what):
            read(other, forged(raw, spec=bad))
    shown = forged(raw, spec=spec(volumes=(Volume("/root", "/host", True),)))
    for given in ((), (Volume(str(tmp_path), "/host"),), (Volume("/", "/host", True), Volume("/", "/more"))):
        with pytest.raises(UsageError):
            read(other, shown, volumes=given)
    with pytest.raises(UsageError, match="isn't shown to pods"):
        read(other, forged(raw, spec=spec(rootfs="/x")), rootfs=str(other.root / "ckpts"))
    untouched(other)
    result = read(other, shown, volumes=(Volume(str(tmp_path), "/host", True),), tag="t")
    assert other.store.meta(result.id).spec["volumes"] == [
        {"source": str(tmp_path), "target": "/host", "read_only": True}
    ]


def entry(path: str, kind: int = stat.S_IFREG, **fields: Any) -> schema.Entry:
    target = "x" if kind == stat.S_IFLNK else ""
    return schema.Entry(path=path, kind=kind, **{"target": target, **fields})


TOP = entry(".", stat.S_IFDIR, mode=0o700)
RUN = schema.Run
HOSTILE_TREES: list[tuple[schema.Entry, ...]] = [
    (entry("."),),
    (entry("a", stat.S_IFDIR),),
    (TOP, TOP),
    *(
        (TOP, entry(path))
        for path in ("..", "../x", "/etc/x", "a/../../x", "", "a//b", "./a", "a/.", "a\0b", "x" * 300)
    ),
    (TOP, entry("a/b")),
    (TOP, entry("a", stat.S_IFLNK), entry("a/b")),
    (TOP, entry("a"), entry("a")),
    (TOP, entry("a", same_as="b")),
    (TOP, entry("a", stat.S_IFDIR), entry("b", stat.S_IFDIR, same_as="a")),
    (TOP, entry("a"), entry("b", stat.S_IFLNK, same_as="a", target="")),
    (TOP, entry("a", 0)),
    (TOP, entry("a", 0o170000)),
    (TOP, entry("a", mode=0o10000)),
    (TOP, entry("a", uid=-1)),
    (TOP, entry("a", uid=(1 << 32) - 1)),
    (TOP, entry("a", size=-1)),
    (TOP, entry("a", size=1 << 63)),
    (TOP, entry("a", mtime=1 << 63)),
    (TOP, entry("a", stat.S_IFLNK, target="")),
    (TOP, entry("a", target="b")),
    (TOP, entry("a", xattrs={"trusted.podtree.key": b"x"})),
    (TOP, entry("a", stat.S_IFDIR, runs=(RUN(0, 0, 1),))),
    (TOP, entry("a", size=10, runs=(RUN(1, 0, 1),))),
    (TOP, entry("a", size=10, runs=(RUN(-65536, 0, 1),))),
    (TOP, entry("a", size=10, runs=(RUN(0, 0, -1),))),
    (TOP, entry("a", size=10, runs=(RUN(0, 0, 2),))),
    (TOP, entry("a", size=10, runs=(RUN(0, 0, 1 << 50),))),
    (TOP, entry("a", size=1 << 20, runs=(RUN(65536, 0, 1), RUN(0, 0, 1)))),
]


UPPER = entry("upper", stat.S_IFDIR)
HOSTILE_VOLUMES: list[tuple[schema.Entry, ...]] = [
    (),
    (TOP, entry("a", stat.S_IFDIR)),
    (TOP, entry("log", stat.S_IFLNK)),
    (TOP, entry("log", stat.S_IFDIR)),
    (TOP, entry("upper", stat.S_IFLNK)),
    (TOP, entry("mounts", stat.S_IFDIR), entry("mounts/x", stat.S_IFLNK)),
    (TOP, entry("mounts", stat.S_IFDIR), entry("mounts/x", stat.S_IFDIR), entry("mounts/x/work", stat.S_IFDIR)),
    (TOP, UPPER, entry("upper/.podtree", stat.S_IFLNK)),
    (TOP, UPPER, entry("upper/.podtree", stat.S_IFDIR), entry("upper/.podtree/x", stat.S_IFLNK)),
]


@pytest.mark.parametrize("tree", HOSTILE_TREES, ids=lambda tree: "-".join(e.path[:10] for e in tree) or "none")
def test_a_hostile_tree(tree: tuple[schema.Entry, ...]) -> None:
    schema.decode_trees(msgspec.msgpack.encode(schema.Trees(vol=(TOP,), img=(TOP,), base=(TOP, entry("b")))))
    with pytest.raises(Damaged):
        schema.decode_trees(msgspec.msgpack.encode(schema.Trees(vol=(TOP,), img=(TOP,), base=tree)))


@pytest.mark.parametrize("tree", HOSTILE_VOLUMES, ids=lambda tree: "-".join(e.path[:20] for e in tree) or "none")
def test_a_hostile_volume(tree: tuple[schema.Entry, ...]) -> None:
    """What of a volume is opened on the host is what it should be, and no link."""
    with pytest.raises(Damaged):
        schema.decode_trees(msgspec.msgpack.encode(schema.Trees(vol=tree, img=(TOP,))))
    link = entry("manifest", stat.S_IFLNK)
    with pytest.raises(Damaged):
        schema.decode_trees(msgspec.msgpack.encode(schema.Trees(vol=(TOP, UPPER), img=(TOP, link))))


def test_bombs() -> None:
    """Nothing becomes larger than it may: not by its own word, nor without one."""
    bomb = schema.compress(bytes(1 << 24))
    for raw in (bomb, bomb[:-1], b"", b"\0" * 64, bomb + b"\0", bomb + bomb):
        with pytest.raises(Damaged):
            schema.decompress(raw, 1 << 20, "x")
    header = ocitar.BLOCK * b"\0"
    for raw in (b"x" * 512, b"x" * 5000, header[:-1] + b"\x01", b""):
        with pytest.raises(Damaged):
            list(ocitar.members(io.BytesIO(raw)))


@pytest.mark.parametrize("kept", ["v1"])
def test_old_exports_can_be_read(kept: str, other: Pool) -> None:
    """Of each version of the format: what tests/data/tiny.c was doing, whole with its base, and what differs later."""
    there = Podtree(other.home)
    try:
        for name in ("whole", "since"):
            there("import", DATA / f"{kept}-{name}.podtree")
        assert fsck(other).damage == ()
        for record in other.checkpoints():
            comes_back(there, other, record)
    finally:
        there.remove_all()


def comes_back(there: Podtree, other: Pool, record: CheckpointRecord) -> None:
    """The program counts on; on another kernel than the export's that is refused, by name."""
    top = other.checkpoint_dir(record.id)
    before = int((top / "vol/upper/count").read_text())
    fd = os.open(top / "img", os.O_RDONLY)
    try:
        check_machine(manifest_file.load(fd))
    except PodtreeError as error:
        assert error.message in there("branch", record.id, code=8).err
        return
    finally:
        os.close(fd)
    volume = Path(there.json("show", there.branch(record.id).name)["volume"])
    until(lambda: int((volume / "upper/count").read_text()) > before + 3, "it counts on")


PROGRAM = """
import os, sys, time
random = os.urandom(1 << 20)
os.makedirs("/srv/t", exist_ok=True)
open("/srv/t/file", "wb").write(random)
ghost = open("/srv/t/ghost", "w+b"); ghost.write(random[::-1]); ghost.flush(); os.unlink("/srv/t/ghost")
print("ready", flush=True)
while not os.path.exists("/srv/t/go"): time.sleep(0.02)
ghost.seek(0)
ok = open("/srv/t/file", "rb").read() == random and ghost.read() == random[::-1]
import json.tool  # something of the base that nobody had open
print("same" if ok else "different", flush=True)
time.sleep(1000)
"""


def test_a_pod_goes_to_another_pool(podtree: Podtree, other: Pool, tmp_path: Path) -> None:
    """Export by the command line, import from a pipe, branch there: it goes on with the same memory and files."""
    pod = podtree.run(SYSTEM_PYTHON, "-c", PROGRAM)
    pod.wait_log("ready")
    one = pod.checkpoint()
    pod.sh("echo later > /srv/t/later")
    two = pod.checkpoint()
    there = Podtree(other.home)
    files = [tmp_path / "one", tmp_path / "two"]
    assert podtree.json("export", one, "-o", files[0])["since"] is None
    assert podtree.json("export", two, "--since", one, "-o", files[1])["bytes"] < files[0].stat().st_size
    piped = subprocess.run([podtree.program, "export", one, "-o", "-"], env=podtree.env, capture_output=True)
    assert piped.stdout == files[0].read_bytes()
    with open(files[0], "rb") as stream:
        done = subprocess.run(
            [there.program, "import", "-"], env=there.env, stdin=stream, capture_output=True, text=True
        )
    assert done.stdout == f"{one}\n", done
    assert there.json("import", files[1])["id"] == two
    try:
        for origin in (one, two):
            for name in ("vol/upper", "img"):
                assert listing(other.checkpoint_dir(origin) / name) == listing(
                    podtree.home / "pool" / "ckpts" / origin / name  # type: ignore[arg-type]
                )
            branch = there.branch(origin)
            assert (branch.sh("ls /srv/t").split() == ["file", "later"]) == (origin == two)
            branch.sh("touch /srv/t/go")
            branch.wait_log("same")
            branch.remove()
    finally:
        there.remove_all()


def test_other_files_below(podtree: Podtree, other: Pool, tmp_path: Path) -> None:
    """What the processes have open below has to be the same, to the byte; or it is carried along."""
    root = tmp_path / "root"
    for name in ("bin", "lib"):
        (root / name).mkdir(parents=True)
    subprocess.run(["gcc", "-O1", "-nostdlib", "-static", "-ffreestanding", "-fno-stack-protector", "-s",
                    "-o", root / "bin/tiny", DATA / "tiny.c"], check=True)  # fmt: skip
    (root / "lib/unused").write_text("1")
    pod = podtree.run("/bin/tiny", options=["--rootfs", root])
    until(lambda: (Path(podtree.json("show", pod.name)["volume"]) / "upper/count").exists(), "it counts")
    checkpoint = pod.checkpoint()
    plain, carried = tmp_path / "plain", tmp_path / "carried"
    podtree("export", checkpoint, "-o", plain)
    podtree("export", checkpoint, "--with-base", "-o", carried)
    copy = tmp_path / "copy"
    shutil.copytree(root, copy, copy_function=shutil.copy2)
    program = copy / "bin/tiny"
    times = program.stat()
    (copy / "lib/unused").write_text("2")  # nobody had that open
    for change, what in (
        (lambda: os.utime(program), "another time"),
        (lambda: program.write_bytes(program.read_bytes()[:-1] + b"!"), "other contents"),
        (lambda: program.write_bytes(b""), "0 bytes"),
        (program.unlink, "can't be opened"),
        (lambda: program.symlink_to("/bin/true"), "no plain file"),
    ):
        change()
        if what != "another time" and program.exists() and not program.is_symlink():
            os.utime(program, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(Unsupported, match=rf"/bin/tiny .*{what}"), open(plain, "rb") as stream:
            load(other, stream, rootfs=str(copy))
    untouched(other)
    with open(plain, "rb") as stream, pytest.raises(UsageError, match="say what it is here"):
        load(other, stream)
    shutil.rmtree(root)
    with open(carried, "rb") as stream:
        load(other, stream)
    there = Podtree(other.home)
    try:
        branch = there.branch(checkpoint)
        made = Path(there.json("show", branch.name)["spec"]["rootfs"])
        assert (made / "lib/unused").read_text() == "1" and made.parent == other.root / "rootfs"
        other.gc()
        assert made.exists()
    finally:
        there.remove_all()


def test_exports_kept_here_are_small() -> None:
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 300_000
    assert PROJECT in DATA.parents
