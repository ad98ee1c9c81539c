"""memfds with seals, shared anonymous memory, unlinked files of a tmpfs."""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Any

import pytest

from holder import World, again, world
from podtree.kernel import fdops
from podtree.objects.memfd import MemoryFile, MemoryKind

__all__ = ["world"]
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE = 1, 2, 4, 8


def test_memfds(world: World) -> None:
    def hold() -> dict[str, Any]:
        plain = os.memfd_create("plain name", 0)
        os.write(plain, b"contents")
        os.ftruncate(plain, 10 << 20)
        reader = again(plain, os.O_RDONLY)
        os.lseek(reader, 3, os.SEEK_SET)
        sealed = os.memfd_create("", os.MFD_ALLOW_SEALING)
        os.write(sealed, b"for ever")
        os.fchmod(sealed, 0o640)
        fcntl.fcntl(sealed, fdops.F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)
        return {"plain": plain, "reader": reader, "sealed": sealed}

    def check(names: dict[str, Any]) -> None:
        assert os.readlink(f"/proc/self/fd/{names['plain']}") == "/memfd:plain name (deleted)"
        assert os.lseek(names["plain"], 0, os.SEEK_CUR) == 8
        assert os.read(names["reader"], 5) == b"tents"
        os.pwrite(names["plain"], b"X", 8)
        assert os.read(names["reader"], 1) == b"X"
        with pytest.raises(OSError, match="Bad file"):
            os.write(names["reader"], b"x")
        assert os.fstat(names["plain"]).st_size == 10 << 20
        with pytest.raises(PermissionError):
            os.write(names["sealed"], b"x")
        assert os.pread(names["sealed"], 20, 0) == b"for ever"
        assert os.fstat(names["sealed"]).st_mode & 0o777 == 0o640
        assert fcntl.fcntl(names["plain"], fdops.F_GET_SEALS) == F_SEAL_SEAL
        assert fcntl.fcntl(names["sealed"], fdops.F_GET_SEALS) == F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE

    saved = world.round_trip(hold, check)
    what = saved.of("plain").what
    assert isinstance(what, MemoryFile)
    assert (what.kind, what.name, what.size) == (MemoryKind.MEMFD, "plain name", 10 << 20)


def test_shared_anonymous_memory(world: World) -> None:
    def hold() -> dict[str, Any]:
        memory = mmap.mmap(-1, 64 << 10, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        memory[5000:5005] = b"hello"
        KEPT.append(memory)
        with open("/proc/self/maps") as file:
            line = next(text for text in file if "/dev/zero (deleted)" in text)
        return {"range": line.split()[0]}

    def check(names: dict[str, Any]) -> None:
        with mmap.mmap(600 + saved.local["memory"], 64 << 10, mmap.MAP_SHARED) as memory:
            assert memory[5000:5005] == b"hello"
            assert memory[:5000] == bytes(5000)
            with open("/proc/self/maps") as file:
                assert "/dev/zero (deleted)" in file.read()

    pid = world.hold(hold)
    names = world.read_names()
    path = f"/proc/{pid}/map_files/{names['range']}"
    saved = world.collect([pid], local={"memory": (path, os.O_RDWR)})
    assert saved.problems == []
    (what,) = [f.what for f in saved.files if f.id == saved.local["memory"]]
    assert isinstance(what, MemoryFile)
    assert what.kind is MemoryKind.SHARED
    world.end(pid)
    world.finish(world.restore(saved, check))


KEPT: list[mmap.mmap] = []


def test_unlinked_tmpfs_files(world: World) -> None:
    def hold() -> dict[str, Any]:
        fd = os.open("/dev/shm/gone", os.O_RDWR | os.O_CREAT, 0o600)
        os.write(fd, b"in memory" * 1000)
        os.fchown(fd, 5, 6)
        other = again(fd, os.O_RDONLY)
        os.unlink("/dev/shm/gone")
        return {"fd": fd, "other": other}

    def check(names: dict[str, Any]) -> None:
        assert os.pread(names["other"], 20, 9) == b"in memory" * 2 + b"in"
        assert os.readlink(f"/proc/self/fd/{names['fd']}") == "/dev/shm/gone (deleted)"
        assert os.fstat(names["fd"]).st_uid == 5
        assert os.fstat(names["fd"]).st_nlink == 0
        assert os.listdir("/dev/shm") == []

    world.round_trip(hold, check)
