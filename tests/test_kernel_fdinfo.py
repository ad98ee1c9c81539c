"""Parsers of fdinfo and mountinfo, kcmp, and detached /proc."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from podtree.kernel import fdops
from podtree.kernel.fdinfo import LockLine, parse_fdinfo, read_fdinfo
from podtree.kernel.kcmp import compare_files
from podtree.kernel.mountinfo import mounts_of, parse_mountinfo

TEXT = """pos:\t123
flags:\t02100002
mnt_id:\t27
ino:\t5
lock:\t1: POSIX  ADVISORY  WRITE 7181 00:2a:273 5 104
lock:\t2: OFDLCK ADVISORY  READ -1 00:2a:273 0 EOF
tfd:        5 events:       19 data:                5  pos:0 ino:51 sdev:8
tfd:        6 events: 80000001 data: ffffffffffffffff  pos:0 ino:52 sdev:8
"""


def test_fdinfo() -> None:
    info = parse_fdinfo(TEXT)
    assert (info.pos, info.flags, info.mount_id) == (123, 0o2100002, 27)
    assert info.locks[0] == LockLine("POSIX", True, 5, 104, info.locks[0].text)
    assert info.locks[1].end is None
    assert len(info.extra["tfd"]) == 2
    assert info.one("ino") == "5"
    with pytest.raises(ValueError, match="no line"):
        info.one("sigmask")
    with pytest.raises(ValueError, match="unknown lock line"):
        parse_fdinfo("lock:\tnonsense\n")


def test_own_fdinfo(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.write(fd, b"abc")
    info = read_fdinfo("self", fd)
    assert info.pos == 3
    assert info.flags & ~os.O_CLOEXEC == fcntl.fcntl(fd, fcntl.F_GETFL)
    assert mounts_of("self")[info.mount_id].device == os.fstat(fd).st_dev
    os.close(fd)


def test_mountinfo() -> None:
    line = rb"36 35 98:0 /mnt1 /mnt2/with\040space rw,noatime master:1 - ext3 /dev/ro\134ot rw,errors=continue"
    (mount,) = parse_mountinfo(line).values()
    assert (mount.id, mount.parent, mount.device) == (36, 35, os.makedev(98, 0))
    assert (mount.root, mount.point, mount.fstype) == (b"/mnt1", b"/mnt2/with space", "ext3")
    assert mount.source == b"/dev/ro\\ot"


def test_compare_files() -> None:
    a = os.open("/", os.O_RDONLY)
    b, c = os.dup(a), os.open("/", os.O_RDONLY)
    assert compare_files(a, b) == 0
    assert compare_files(a, c) == -compare_files(c, a) != 0
    for fd in (a, b, c):
        os.close(fd)


def test_reopen_gives_another_description() -> None:
    reader, writer = os.pipe()
    again = fdops.reopen(reader, os.O_RDWR | os.O_NONBLOCK)
    os.write(again, b"x")
    assert os.read(reader, 1) == b"x"
    assert os.get_blocking(reader) and not os.get_blocking(again)
    for fd in (reader, writer, again):
        os.close(fd)
