"""Pseudo terminals inside the pod, hung up ones, /dev/tty, and the console."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import termios
from pathlib import Path
from typing import Any

import pytest

from holder import World, world
from podtree.kernel import tty as pty
from podtree.kernel.pidfd import pidfd_getfd
from podtree.objects import ttyqueue
from podtree.objects.descriptors import recover
from podtree.objects.tty import TIOCPKT, HungUpTty, PtyMaster, PtySlave, allocate

__all__ = ["world"]


def test_pairs(world: World) -> None:
    def hold() -> dict[str, Any]:
        first, _ = pty.open_master("/dev/ptmx")
        second, index = pty.open_master("/dev/ptmx")
        os.close(first)  # the pair's number is not the lowest
        assert index == 1
        slave = os.open("/dev/pts/1", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        reading = os.open("/dev/pts/1", os.O_RDONLY | os.O_NOCTTY)
        pty.set_size(second, 33, 77)
        pty.make_raw(slave)
        fcntl.ioctl(second, TIOCPKT, struct.pack("i", 1))
        os.fchown(slave, 12, 13)
        os.fchmod(slave, 0o600)
        alone, _ = pty.open_master("/dev/ptmx")
        fcntl.ioctl(alone, pty.TIOCSPTLCK, struct.pack("i", 1))
        looking, _ = pty.open_master("/dev/ptmx", os.O_RDONLY)
        return {"master": second, "slave": slave, "reading": reading, "alone": alone, "looking": looking}

    def check(names: dict[str, Any]) -> None:
        assert os.ttyname(names["slave"]) == "/dev/pts/1"
        assert pty.get_size(names["slave"]) == (33, 77)
        assert not termios.tcgetattr(names["slave"])[3] & termios.ICANON
        os.write(names["slave"], b"out\n")
        assert os.read(names["master"], 10) == b"\0out\n"  # packet mode, no output processing
        os.write(names["master"], b"in")
        assert os.read(names["reading"], 10) == b"in"
        assert not os.get_blocking(names["slave"])
        st = os.fstat(names["slave"])
        assert (st.st_uid, st.st_gid, st.st_mode & 0o777) == (12, 13, 0o600)
        with pytest.raises(OSError, match="Input/output"):  # still locked
            os.open("/dev/pts/0", os.O_RDWR | os.O_NOCTTY)

        assert fcntl.fcntl(names["looking"], fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert pty.pty_number(names["looking"]) == 2

    saved = world.round_trip(hold, check)
    assert isinstance(saved.of("master").what, PtyMaster)
    assert isinstance(saved.of("slave").what, PtySlave)


def test_hung_up(world: World) -> None:
    def hold() -> dict[str, Any]:
        master, _ = pty.open_master("/dev/ptmx")
        slave = pty.open_slave(master)
        os.close(master)
        other, _ = pty.open_master("/dev/ptmx")
        os.close(pty.open_slave(other))
        fresh, _ = pty.open_master("/dev/ptmx")
        os.set_blocking(fresh, False)
        return {"slave": slave, "other": other, "fresh": fresh}

    def check(names: dict[str, Any]) -> None:
        assert os.read(names["slave"], 1) == b""
        with pytest.raises(OSError, match="Input/output"):
            os.write(names["slave"], b"x")
        with pytest.raises(OSError, match="Input/output"):
            os.read(names["other"], 1)
        with pytest.raises(BlockingIOError):
            os.read(names["fresh"], 1)

    saved = world.round_trip(hold, check)
    assert isinstance(saved.of("slave").what, HungUpTty)


def test_unread_bytes_come_back(world: World) -> None:
    def hold() -> dict[str, Any]:
        master, _ = pty.open_master("/dev/ptmx")
        slave = pty.open_slave(master)
        attributes = termios.tcgetattr(slave)
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        os.write(master, b"line one\nline two\nend of file\x04\x04part")
        os.write(slave, b"shown\n")
        raw_master, _ = pty.open_master("/dev/ptmx")
        raw = pty.open_slave(raw_master)
        pty.make_raw(raw)
        os.write(raw_master, bytes(range(256)))
        return {"master": master, "slave": slave, "raw": raw, "raw_master": raw_master}

    def check(names: dict[str, Any]) -> None:
        slave = names["slave"]
        assert os.read(slave, 100) == b"line one\n"
        assert os.read(slave, 100) == b"line two\n"
        assert os.read(slave, 100) == b"end of file"
        assert os.read(slave, 100) == b""
        os.write(names["master"], b"ial\n")
        assert os.read(slave, 100) == b"partial\n"
        assert os.read(names["master"], 100) == b"shown\r\n"
        assert os.read(names["raw"], 300) == bytes(range(256))

    pid = world.hold(hold)
    saved = world.collect([pid])
    assert saved.problems == [], saved.problems
    again = world.collect([pid])  # the first collection changed nothing
    assert again.of("master").what == saved.of("master").what
    assert again.of("raw_master").what == saved.of("raw_master").what
    world.end(pid)
    restored = world.restore(saved, check)
    second = world.collect([restored])
    assert second.problems == []
    world.finish(restored)


def test_master_outside_is_refused(world: World) -> None:
    master, _ = pty.open_master("/dev/ptmx")
    slave = pty.open_slave(master)
    pid = world.hold(lambda: {"slave": slave}, keep=(slave,))
    os.close(slave)
    saved = world.collect([pid])
    assert len(saved.problems) == 1
    assert "master side is held by a process outside" in saved.problems[0]
    os.close(master)


def test_allocate_gives_the_wanted_number(world: World) -> None:
    def hold() -> dict[str, Any]:
        master = allocate(5)
        assert os.listdir("/dev/pts") in (["5", "ptmx"], ["ptmx", "5"])
        return {"master": master}

    world.hold(hold)


def test_console_with_its_session(world: World) -> None:
    def hold() -> dict[str, Any]:
        master, _ = pty.open_master("/dev/ptmx")
        slave = os.open("/dev/pts/0", os.O_RDWR | os.O_NOCTTY)
        pty.make_controlling(slave)
        for number in (0, 1, 2):
            os.dup2(slave, number)
        controlling = os.open("/dev/tty", os.O_RDWR | os.O_NONBLOCK)
        pty.set_size(slave, 40, 100)
        os.write(master, b"typed ahead\nhalf")
        names = {"slave": slave, "tty": controlling, "master": master}
        Path("/names.json").write_text(json.dumps(names))
        os.kill(os.getpid(), signal.SIGSTOP)  # the master is taken out of here
        os.close(master)
        return names

    pid = world.hold(hold)
    pidfd = os.pidfd_open(pid)
    console = pidfd_getfd(pidfd, world.read_names()["master"])
    os.kill(pid, signal.SIGCONT)
    world.wait_stopped(pid)
    saved = world.collect([pid], consoles={pty.pty_number(console): console})
    assert saved.problems == [], saved.problems
    what = saved.of("slave").what
    assert isinstance(what, PtySlave) and what.console
    settings = next(f.what.settings for f in saved.files if isinstance(f.what, PtySlave) and f.what.settings)
    assert settings.session == settings.foreground == pid
    assert (settings.queues.lines, settings.queues.partial) == ((b"typed ahead\n",), b"half")
    world.end(pid)
    os.close(console)

    def prepare() -> None:
        master, _ = pty.open_master("/dev/ptmx")
        os.dup2(master, 900)
        os.close(master)

    def late(deferred: Any) -> None:
        (need,) = deferred.terminals
        assert need.session == pid
        pty.make_controlling(need.slot)
        os.tcsetpgrp(need.slot, os.getpgrp())

    def check(names: dict[str, Any]) -> None:
        assert pty.get_size(names["slave"]) == (40, 100)
        assert os.readlink(f"/proc/self/fd/{names['tty']}") == "/dev/tty"
        assert os.tcgetpgrp(names["tty"]) == os.getpgrp()
        assert os.read(names["tty"], 100) == b"typed ahead\n"
        os.write(900, b"+half\n")
        assert os.read(0, 100) == b"half+half\n"
        assert not os.get_blocking(names["tty"])
        os.write(1, b"shown")
        shown = b""
        while not shown.endswith(b"shown"):
            shown += os.read(900, 100)

    world.finish(world.restore(saved, check, prepare=prepare, late=late))


def test_killed_between_reading_and_putting_back(world: World) -> None:
    def hold() -> dict[str, Any]:
        master, _ = pty.open_master("/dev/ptmx")
        slave = pty.open_slave(master)
        os.write(master, b"one\ntwo\nthr")
        return {"master": master, "slave": slave}

    pid = world.hold(hold)
    names = world.read_names()
    pidfd = os.pidfd_open(pid)
    master = pidfd_getfd(pidfd, names["master"])
    before = termios.tcgetattr(master)
    for calls in range(1, 14):  # killed at the first ioctl that puts back, the second, ...
        child = os.fork()
        if child == 0:
            _die_after(calls)
            world.collect([pid])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        recover(world.volume / "image", world.root_fd, [pid], [])
        assert termios.tcgetattr(master) == before
        assert not list((world.volume / "image").glob("tty*"))
    assert world.collect([pid]).problems == []
    slave = pty.open_slave(master)
    assert os.read(slave, 100) == b"one\n"
    assert os.read(slave, 100) == b"two\n"
    os.write(master, b"ee\n")
    assert os.read(slave, 100) == b"three\n"
    os.close(slave)
    os.close(master)


def _die_after(calls: int) -> None:
    """SIGKILL to this process after its N-th change of a terminal."""
    real, count = fcntl.ioctl, 0

    def ioctl(fd: int, request: int, *rest: Any) -> Any:
        nonlocal count
        result = real(fd, request, *rest)
        if request in (ttyqueue.TCSETS2, termios.TIOCSTI):
            count += 1
            if count == calls:
                os.kill(os.getpid(), signal.SIGKILL)
        return result

    ttyqueue.fcntl.ioctl = ioctl  # type: ignore[attr-defined]
