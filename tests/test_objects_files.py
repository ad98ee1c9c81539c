"""Regular files, unlinked ones, directories, the log, O_PATH descriptors."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from holder import World, again, run, world
from podtree.errors import Damaged
from podtree.kernel import fdops
from podtree.objects.files import Directory, Ghost, LogFile, RegularFile, copy_sparse, restore_ghosts
from podtree.objects.held import path_bytes, path_text

__all__ = ["world"]


def link_of(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


def test_paths_of_any_bytes() -> None:
    for path in (b"/tmp/plain", "/tmp/é".encode(), b"/tmp/\xff\xfe", b"/tmp/\\x41%20"):
        assert path_bytes(path_text(path)) == path
    for text in ("", "\0zz", "a\0b", "\0" + b"a\0b".hex()):
        with pytest.raises(Damaged):
            path_bytes(text)


def test_open_files_with_flags_and_offsets(world: World) -> None:
    def hold() -> dict[str, Any]:
        rw = os.open("/tmp/file", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o640)
        os.write(rw, b"0123456789")
        os.ftruncate(rw, 6 << 30)
        os.lseek(rw, 5 << 30, os.SEEK_SET)
        ro = os.open("/tmp/file", os.O_RDONLY | os.O_NOATIME | os.O_NONBLOCK)
        os.read(ro, 4)
        wo = os.open("/tmp/file", os.O_WRONLY | os.O_SYNC)
        direct = os.open("/tmp/file", os.O_RDONLY | os.O_DIRECT | os.O_NOFOLLOW)
        lower = os.open("/etc/passwd", os.O_RDONLY)
        odd = os.open(b"/tmp/\xff (deleted)", os.O_RDWR | os.O_CREAT)
        node = os.open("/tmp", os.O_PATH)
        os.symlink("nowhere", "/tmp/link")
        symlink = os.open("/tmp/link", os.O_PATH | os.O_NOFOLLOW)
        return {
            "rw": rw, "ro": ro, "wo": wo, "direct": direct, "lower": lower, "odd": odd, "node": node, "link": symlink
        }  # fmt: skip

    def check(names: dict[str, Any]) -> None:
        assert os.lseek(names["rw"], 0, os.SEEK_CUR) == 5 << 30
        os.write(names["rw"], b"end")
        assert os.stat("/tmp/file").st_size == (6 << 30) + 3
        assert os.read(names["ro"], 10)[:6] == b"456789"
        flags = fcntl.fcntl(names["ro"], fcntl.F_GETFL)
        assert flags & os.O_NOATIME and flags & os.O_NONBLOCK
        assert fcntl.fcntl(names["wo"], fcntl.F_GETFL) & os.O_SYNC
        assert fcntl.fcntl(names["direct"], fcntl.F_GETFL) & os.O_NOFOLLOW
        assert os.read(names["lower"], 4) == b"root"
        assert os.fstat(names["node"]).st_ino == os.stat("/tmp").st_ino
        assert os.readlink("", dir_fd=names["link"]) == "nowhere"

    saved = world.round_trip(hold, check)
    assert isinstance(saved.of("rw").what, RegularFile)


def test_unlinked_files_share_one_inode(world: World) -> None:
    def hold() -> dict[str, Any]:
        first = os.open("/tmp/gone", os.O_RDWR | os.O_CREAT, 0o604)
        os.write(first, b"x" * 100_000)
        os.setxattr(first, "user.note", b"kept")
        os.fchown(first, 7, 8)
        os.utime(first, ns=(10**18, 10**18 + 1))
        second = os.open("/tmp/gone", os.O_WRONLY | os.O_APPEND)
        os.unlink("/tmp/gone")
        os.mkdir("/tmp/dir")
        inside = os.open("/tmp/dir/inside", os.O_RDWR | os.O_CREAT)
        os.write(inside, b"inside")
        os.unlink("/tmp/dir/inside")
        os.rmdir("/tmp/dir")
        reused = os.open("/tmp/reused", os.O_RDWR | os.O_CREAT)
        os.write(reused, b"old")
        os.unlink("/tmp/reused")
        Path("/tmp/reused").write_text("new")
        unnamed = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
        os.write(unnamed, b"never had a name")
        return {"first": first, "second": second, "inside": inside, "reused": reused, "unnamed": unnamed}

    def check(names: dict[str, Any]) -> None:
        st = os.fstat(names["first"])
        assert (st.st_nlink, st.st_size, st.st_uid, st.st_gid, st.st_mode & 0o777) == (0, 100_000, 7, 8, 0o604)
        assert st.st_mtime_ns == 10**18 + 1
        assert st.st_ino == os.fstat(names["second"]).st_ino
        assert os.getxattr(names["first"], "user.note") == b"kept"
        assert link_of(names["first"]) == "/tmp/gone (deleted)"
        assert not os.path.exists("/tmp/gone")
        os.write(names["second"], b"appended")
        assert os.pread(names["first"], 100, 100_000) == b"appended"
        assert os.pread(names["inside"], 100, 0) == b"inside"
        assert os.pread(names["reused"], 100, 0) == b"old"
        assert Path("/tmp/reused").read_text() == "new"
        assert os.pread(names["unnamed"], 100, 0) == b"never had a name"
        assert os.listdir("/.podtree") == []

    saved = world.round_trip(hold, check, again=False)  # what had to take another name shows it
    ghost = saved.of("first").what
    assert isinstance(ghost, Ghost)
    assert ghost == saved.of("second").what
    assert os.listdir(os.open(".podtree", os.O_RDONLY, dir_fd=world.root_fds[0])) == []


def test_unlinked_file_of_the_lower_layer_is_copied(world: World) -> None:
    text = Path("/etc/passwd").read_bytes()

    def hold() -> dict[str, Any]:
        fd = os.open("/etc/passwd", os.O_RDONLY)
        os.unlink("/etc/passwd")
        return {"fd": fd}

    def check(names: dict[str, Any]) -> None:
        assert os.pread(names["fd"], 1 << 20, 0) == text
        assert not os.path.exists("/etc/passwd")

    world.round_trip(hold, check)


def test_file_with_another_name_keeps_its_identity(world: World) -> None:
    def hold() -> dict[str, Any]:
        fd = os.open("/tmp/one", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"shared")
        os.link("/tmp/one", "/tmp/two")
        os.unlink("/tmp/one")
        return {"fd": fd, "times": os.stat("/").st_mtime_ns}

    def check(names: dict[str, Any]) -> None:
        assert os.fstat(names["fd"]).st_nlink == 1
        os.pwrite(names["fd"], b"SHARED", 0)
        assert Path("/tmp/two").read_bytes() == b"SHARED"
        assert not os.path.exists("/tmp/one")

    saved = world.round_trip(hold, check)
    assert isinstance(saved.of("fd").what, Ghost)


def test_directories(world: World) -> None:
    def hold() -> dict[str, Any]:
        os.mkdir("/tmp/d")
        for i in range(50):
            Path(f"/tmp/d/{i}").touch()
        listed = os.open("/tmp/d", os.O_RDONLY | os.O_DIRECTORY)
        os.lseek(listed, 20, os.SEEK_SET)
        os.mkdir("/tmp/gone", 0o750)
        gone = os.open("/tmp/gone", os.O_RDONLY | os.O_DIRECTORY)
        gone2 = os.open("/tmp/gone", os.O_RDONLY)
        before = os.stat("/tmp").st_mtime_ns
        os.rmdir("/tmp/gone")
        return {"listed": listed, "gone": gone, "gone2": gone2, "before": before, "after": os.stat("/tmp").st_mtime_ns}

    def check(names: dict[str, Any]) -> None:
        assert os.lseek(names["listed"], 0, os.SEEK_CUR) == 20
        assert len(os.listdir(again(names["listed"], os.O_RDONLY))) == 50
        assert os.listdir(names["gone"]) == []
        assert link_of(names["gone"]) == "/tmp/gone (deleted)"
        assert os.fstat(names["gone"]).st_ino == os.fstat(names["gone2"]).st_ino
        assert os.fstat(names["gone"]).st_mode & 0o777 == 0o750
        assert os.stat("/tmp").st_mtime_ns == names["after"]
        with pytest.raises(FileNotFoundError):
            os.open("x", os.O_CREAT | os.O_RDWR, dir_fd=names["gone"])

    saved = world.round_trip(hold, check)
    assert isinstance(saved.of("gone").what, Directory)


def test_log_file(world: World) -> None:
    log = os.open(world.volume / "log", os.O_WRONLY | os.O_APPEND)

    def check(names: dict[str, Any]) -> None:
        os.write(names["log"], b"more\n")

    pid = world.hold(lambda: {"log": log}, keep=(log,))
    saved = world.collect([pid])
    os.close(log)
    assert saved.problems == []
    assert saved.of("log").what == LogFile()
    world.end(pid)
    world.finish(world.restore(saved, check))
    assert (world.volume / "log").read_text() == "log\nmore\n"


def test_changed_lower_file_is_noticed(world: World) -> None:
    pid = world.hold(lambda: {"fd": os.open("/etc/passwd", os.O_RDONLY)})
    saved = world.collect([pid])
    index = next(i for i, f in enumerate(saved.files) if f is saved.of("fd"))
    what = saved.files[index].what
    assert isinstance(what, RegularFile)
    changed = msgspec.structs.replace(what, mtime=what.mtime - 1)
    saved.files[index] = msgspec.structs.replace(saved.files[index], what=changed)
    with pytest.raises(AssertionError, match="/etc/passwd has changed since the checkpoint"):
        world.restore(saved, lambda names: None)


def test_file_of_the_host_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "outside").touch()
    fd = os.open(tmp_path / "outside", os.O_RDONLY)
    pid = world.hold(lambda: {"fd": fd}, keep=(fd,))
    os.close(fd)
    saved = world.collect([pid])
    assert len(saved.problems) == 1
    assert "outside of the pod's mounts" in saved.problems[0]


def test_sparse_copy(tmp_path: Path) -> None:
    source = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    target = os.open(tmp_path / "b", os.O_RDWR | os.O_CREAT)
    os.pwrite(source, b"far", 5 << 30)
    os.ftruncate(source, 6 << 30)
    copy_sparse(source, target, 6 << 30)
    assert os.fstat(target).st_size == 6 << 30
    assert os.pread(target, 3, 5 << 30) == b"far"
    assert os.fstat(target).st_blocks < 100
    os.close(source)
    os.close(target)


def test_locks(world: World) -> None:
    def hold() -> dict[str, Any]:
        fd = os.open("/tmp/locked", os.O_RDWR | os.O_CREAT)
        other = os.open("/tmp/locked2", os.O_RDWR | os.O_CREAT)
        fcntl.flock(fd, fcntl.LOCK_SH)
        fcntl.lockf(fd, fcntl.LOCK_EX, 100, 5)
        fdops.set_lock(other, write=True, start=10, end=None)
        return {"fd": fd, "other": other}

    pid = world.hold(hold)
    saved = world.collect([pid])
    world.end(pid)
    assert saved.problems == []
    assert [(k.kind, k.write, k.start, k.end) for k in saved.of("fd").locks] == [
        ("flock", False, 0, None), ("posix", True, 5, 104)
    ]  # fmt: skip

    def late(deferred: Any) -> None:
        (lock,) = deferred.locks
        assert (lock.file, lock.start, lock.end, lock.pid) == (saved.of("fd").id, 5, 104, pid)

    def check(names: dict[str, Any]) -> None:
        rival = os.open("/tmp/locked2", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fdops.set_lock(rival, write=False, start=11, end=11)
        fdops.set_lock(rival, write=False, start=0, end=9)
        rival = os.open("/tmp/locked", os.O_RDWR)
        fcntl.flock(rival, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with pytest.raises(BlockingIOError):
            fcntl.flock(rival, fcntl.LOCK_EX | fcntl.LOCK_NB)

    world.finish(world.restore(saved, check, late=late))


def test_engine_opened_files(world: World) -> None:
    def hold() -> dict[str, Any]:
        os.mkdir("/tmp/cwd")
        os.chdir("/tmp/cwd")
        os.rmdir("/tmp/cwd")
        return {}

    pid = world.hold(hold)
    local = {
        "cwd": (f"/proc/{pid}/cwd", os.O_PATH | os.O_DIRECTORY),
        "root": (f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY),
        "exe": (f"/proc/{pid}/exe", os.O_RDONLY),
    }
    saved = world.collect([pid], local=local)
    # The interpreter was started outside: that is refused, and nothing else.
    assert ["exe" in p or "python" in p for p in saved.problems] == [True]
    world.end(pid)

    def check(names: dict[str, Any]) -> None:
        os.fchdir(600 + saved.local["cwd"])
        assert os.readlink("/proc/self/cwd") == "/tmp/cwd (deleted)"
        os.fchdir(600 + saved.local["root"])
        assert os.getcwd() == "/"

    world.finish(world.restore(saved, check))


def test_bind_mounted_files_are_external(world: World) -> None:
    source = world.directory / "bound"
    source.mkdir()
    (source / "file").write_text("host")

    def hold() -> dict[str, Any]:
        return {"fd": os.open("/mnt/file", os.O_RDWR)}

    world.binds = [(str(source), "mnt")]
    pid = world.hold(hold)
    saved = world.collect([pid])
    world.end(pid)
    assert saved.problems == []
    what = saved.of("fd").what
    assert isinstance(what, RegularFile)
    assert what.external
    (source / "file").write_text("host has written more")

    def check(names: dict[str, Any]) -> None:
        assert os.read(names["fd"], 100) == b"host has written more"

    world.finish(world.restore(saved, check))


def test_missing_ghost_is_damage(world: World) -> None:
    from podtree.objects.context import RestoreContext

    ctx = RestoreContext(world.root_fd, -1, -1, -1)
    with pytest.raises(Damaged, match="missing in the volume"):
        restore_ghosts([(0, os.O_RDONLY, Ghost("/tmp/x", "g0", 5))], ctx)
    with pytest.raises(Damaged, match="impossible ghost name"):
        restore_ghosts([(0, os.O_RDONLY, Ghost("/tmp/x", "../etc/passwd", 5))], ctx)


def test_many_extents_clone(world: World) -> None:
    """A large unlinked file costs extents, not bytes."""

    def hold() -> dict[str, Any]:
        fd = os.open("/tmp/big", os.O_RDWR | os.O_CREAT)
        for i in range(100):
            os.pwrite(fd, b"%4d" % i * 1024, i * (64 << 20))
        os.unlink("/tmp/big")
        return {"fd": fd}

    def check(names: dict[str, Any]) -> None:
        for i in range(100):
            assert os.pread(names["fd"], 4, i * (64 << 20)) == b"%4d" % i
        assert os.fstat(names["fd"]).st_blocks * 512 < 2 << 20

    world.round_trip(hold, check)
    run("sync", "-f", str(world.pool))
