"""tmpfs contents: every kind of file with its attributes, hard links, incremental contents, hostile lists."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from holder import World, world
from podtree.errors import Damaged
from podtree.objects.context import RestoreContext
from podtree.objects.tmpfs import TmpfsEntry, TmpfsMount, restore_tmpfs

__all__ = ["world"]


def fill() -> dict[str, Any]:
    base = Path("/dev/shm")
    (base / "dir" / "deep").mkdir(parents=True)
    (base / "dir" / "deep" / "file").write_bytes(b"deep" * 5000)
    os.truncate(base / "dir" / "deep" / "file", 1 << 30)
    os.link(base / "dir" / "deep" / "file", base / "hard")
    os.symlink("dir/deep", base / "soft")
    os.mkfifo(base / "fifo")
    os.chmod(base / "fifo", 0o620)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("/dev/shm/socket")
    (base / "empty").touch()
    os.chown(base / "empty", 100, 200)
    os.chmod(base / "empty", 0o4755)
    os.setxattr(base / "empty", "user.colour", b"green")
    (base / os.fsdecode(b"odd \xff\n")).write_text("odd")
    os.utime(base / "dir" / "deep", ns=(10**18, 10**18 + 7))
    os.chmod(base / "dir", 0o1777)
    os.utime(base / "dir", ns=(10**18, 10**18 + 8))
    os.unlink("/dev/full")
    Path("/dev/own").write_text("added by the program")
    kept = os.open(base / "empty", os.O_RDWR)
    return {"kept": kept}


def check(names: dict[str, Any]) -> None:
    base = Path("/dev/shm")
    file = base / "dir" / "deep" / "file"
    assert file.stat().st_size == 1 << 30
    assert file.stat().st_blocks < 100
    with file.open("rb") as opened:
        assert opened.read(20_001) == b"deep" * 5000 + b"\0"
    assert file.stat().st_ino == (base / "hard").stat().st_ino
    assert file.stat().st_nlink == 2
    assert os.readlink(base / "soft") == "dir/deep"
    assert stat.filemode((base / "fifo").stat().st_mode) == "prw--w----"
    assert stat.S_ISSOCK((base / "socket").stat().st_mode)
    empty = (base / "empty").stat()
    assert (empty.st_uid, empty.st_gid, empty.st_mode & 0o7777) == (100, 200, 0o4755)
    assert os.getxattr(base / "empty", "user.colour") == b"green"
    assert (base / os.fsdecode(b"odd \xff\n")).read_text() == "odd"
    assert (base / "dir" / "deep").stat().st_mtime_ns == 10**18 + 7
    assert (base / "dir").stat().st_mtime_ns == 10**18 + 8
    assert stat.S_IMODE((base / "dir").stat().st_mode) == 0o1777
    assert os.fstat(names["kept"]).st_ino == empty.st_ino
    assert not os.path.exists("/dev/full")
    assert Path("/dev/own").read_text() == "added by the program"
    assert os.readlink("/dev/ptmx") == "pts/ptmx"
    assert os.stat("/dev/null").st_rdev == os.makedev(1, 3)
    assert os.path.exists("/dev/pts/ptmx")


def plain(mounts: list[TmpfsMount]) -> list[Any]:
    """As builtins, without the keys and access times."""
    return [
        [{k: v for k, v in msgspec.to_builtins(e).items() if k not in ("key", "atime")} for e in m.entries]
        for m in mounts
    ]


def test_everything_comes_back(world: World) -> None:
    points = ("/dev", "/dev/shm")
    pid = world.hold(fill)
    saved = world.collect([pid], tmpfs=points)
    assert saved.problems == []
    encoded = msgspec.msgpack.encode(saved.tmpfs)
    saved.tmpfs = msgspec.msgpack.decode(encoded, type=list[TmpfsMount])
    world.end(pid)
    restored = world.restore(saved, check)
    second = world.collect([restored], tmpfs=points)
    assert second.problems == []
    assert plain(second.tmpfs) == plain(saved.tmpfs)
    keys = [[e.key for m in s.tmpfs for e in m.entries] for s in (saved, second)]
    assert keys[0] == keys[1]  # so that the second image shares the first's pages
    world.finish(restored)


def directory(path: str) -> TmpfsEntry:
    return TmpfsEntry(path, stat.S_IFDIR, 0o755)


@pytest.mark.parametrize(
    "entries",
    [
        (),
        (TmpfsEntry("x", stat.S_IFREG),),
        (directory("."), TmpfsEntry("../x", stat.S_IFDIR)),
        (directory("."), TmpfsEntry("/etc/x", stat.S_IFDIR)),
        (directory("."), TmpfsEntry("a/b", stat.S_IFDIR)),
        (directory("."), TmpfsEntry("..", stat.S_IFDIR)),
        (directory("."), TmpfsEntry("l", stat.S_IFLNK, target="/"), TmpfsEntry("l/x", stat.S_IFDIR)),
        (directory("."), TmpfsEntry("mem", stat.S_IFCHR, device=(1, 1))),
        (directory("."), TmpfsEntry("disk", stat.S_IFBLK, device=(8, 0))),
        (directory("."), TmpfsEntry("h", stat.S_IFREG, same_as="../../etc/passwd")),
        (directory("."), TmpfsEntry("d", stat.S_IFREG, key="../../x")),
    ],
)
def test_hostile_lists(tmp_path: Path, entries: tuple[TmpfsEntry, ...]) -> None:
    ctx = RestoreContext(-1, -1, -1, -1)
    with pytest.raises(Damaged):
        restore_tmpfs(TmpfsMount(str(tmp_path), entries), ctx)
