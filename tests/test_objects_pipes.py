"""Pipes and FIFOs: bytes, packets, capacity, ends, flags, and the supervisor's stdio pipes."""

from __future__ import annotations

import fcntl
import os
import select
from typing import Any

import pytest

from holder import World, again, world
from podtree.kernel.fdops import F_GETPIPE_SZ, F_SETPIPE_SZ
from podtree.objects.pipes import Chunk, Pipe, StdioPipe, read_chunks, write_chunks

__all__ = ["world"]


def test_chunks_are_read_without_being_consumed() -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    fcntl.fcntl(writer, F_SETPIPE_SZ, 1 << 20)
    os.write(writer, b"s" * 4096)
    fcntl.fcntl(writer, fcntl.F_SETFL, os.O_NONBLOCK | os.O_DIRECT)
    os.write(writer, b"p")
    os.write(writer, b"packet two")
    fcntl.fcntl(writer, fcntl.F_SETFL, os.O_NONBLOCK)
    os.write(writer, b"x" * 100_000)
    expected = (Chunk(b"s" * 4096), Chunk(b"p", True), Chunk(b"packet two", True), Chunk(b"x" * 100_000))
    assert read_chunks(reader) == expected
    assert read_chunks(reader) == expected
    expected = (Chunk(b"short"), *expected[1:], Chunk(b"q", True))  # the kernel itself would melt these
    copy_r, copy_w = os.pipe()
    write_chunks(copy_w, expected)
    assert read_chunks(copy_r) == expected
    assert fcntl.fcntl(copy_w, fcntl.F_GETFL) == os.O_WRONLY
    assert os.read(reader, 4096) == b"s" * 4096
    assert os.read(reader, 99) == b"p"
    assert os.read(reader, 99) == b"packet two"
    assert os.read(reader, 200_000) == b"x" * 100_000
    for fd in (reader, writer, copy_r, copy_w):
        os.close(fd)


def test_both_ends_with_data_and_flags(world: World) -> None:
    def hold() -> dict[str, Any]:
        reader, writer = os.pipe()
        fcntl.fcntl(writer, F_SETPIPE_SZ, 256 << 10)
        os.write(writer, b"in the pipe " * 4000)
        os.set_blocking(reader, False)
        far = 1500
        os.dup2(writer, far, inheritable=True)
        both = again(reader, os.O_RDWR)
        other = again(reader, os.O_RDONLY)
        os.fchown(reader, 1000, 1001)
        return {"r": reader, "w": writer, "far": far, "both": both, "other": other}

    def check(names: dict[str, Any]) -> None:
        assert fcntl.fcntl(names["w"], F_GETPIPE_SZ) == 256 << 10
        assert os.fstat(names["r"]).st_uid == 1000
        assert not os.get_blocking(names["r"])
        assert os.get_blocking(names["other"])
        assert os.get_inheritable(names["far"])
        assert not os.get_inheritable(names["r"])
        os.set_blocking(names["w"], False)
        assert not os.get_blocking(names["far"])  # one description under two numbers
        assert os.read(names["r"], 100_000) == b"in the pipe " * 4000
        with pytest.raises(BlockingIOError):
            os.read(names["r"], 1)
        os.write(names["far"], b"new")
        assert os.read(names["both"], 9) == b"new"
        os.close(names["both"])
        os.close(names["w"])
        os.close(names["far"])
        assert os.read(names["r"], 1) == b""

    saved = world.round_trip(hold, check)
    assert len(saved.files) == 5  # null, and four of the pipe


def test_one_end_only_and_nobody_outside(world: World) -> None:
    def hold() -> dict[str, Any]:
        reader, writer = os.pipe()
        os.write(writer, b"left behind")
        os.close(writer)
        lonely_r, lonely_w = os.pipe()
        os.write(lonely_w, b"unread")
        os.close(lonely_r)
        return {"r": reader, "w": lonely_w}

    def check(names: dict[str, Any]) -> None:
        assert os.read(names["r"], 100) == b"left behind"
        assert os.read(names["r"], 100) == b""
        poll = select.poll()
        poll.register(names["w"], select.POLLOUT)
        assert poll.poll(0)[0][1] & select.POLLERR
        fresh = again(names["w"], os.O_RDONLY | os.O_NONBLOCK)
        assert os.read(fresh, 100) == b"unread"

    world.round_trip(hold, check)


def test_named_and_unlinked_fifos(world: World) -> None:
    def hold() -> dict[str, Any]:
        os.mkfifo("/tmp/named", 0o640)
        named = os.open("/tmp/named", os.O_RDONLY | os.O_NONBLOCK)  # still waiting for its first writer
        os.mkfifo("/tmp/gone")
        reader = os.open("/tmp/gone", os.O_RDONLY | os.O_NONBLOCK)
        writer = os.open("/tmp/gone", os.O_WRONLY | os.O_NONBLOCK)
        os.write(writer, b"no name")
        os.unlink("/tmp/gone")
        os.mkfifo("/tmp/hung")
        hung = os.open("/tmp/hung", os.O_RDONLY | os.O_NONBLOCK)
        os.close(os.open("/tmp/hung", os.O_WRONLY | os.O_NONBLOCK))
        return {"named": named, "reader": reader, "writer": writer, "hung": hung}

    def check(names: dict[str, Any]) -> None:
        poll = select.poll()
        for name in ("named", "hung"):
            poll.register(names[name], select.POLLIN)
        assert poll.poll(0) == [(names["hung"], select.POLLHUP)]
        writer = os.open("/tmp/named", os.O_WRONLY | os.O_NONBLOCK)
        os.write(writer, b"hello")
        assert os.read(names["named"], 10) == b"hello"
        assert os.read(names["reader"], 10) == b"no name"
        os.write(names["writer"], b"more")
        assert os.read(names["reader"], 10) == b"more"
        assert not os.path.exists("/tmp/gone")
        assert os.readlink(f"/proc/self/fd/{names['reader']}") == "/tmp/gone (deleted)"

    world.round_trip(hold, check)


def test_pipe_held_outside_is_refused(world: World) -> None:
    reader, writer = os.pipe()
    pid = world.hold(lambda: {"r": reader}, keep=(reader,))
    saved = world.collect([pid])
    assert len(saved.problems) == 1
    assert "writing end is held by a process outside" in saved.problems[0]
    assert f"fd {reader} (pipe:[" in saved.problems[0]
    os.close(reader)
    os.close(writer)


def test_supervisors_stdio_pipes(world: World) -> None:
    in_r, in_w = os.pipe()
    out_r, out_w = os.pipe()
    os.write(in_w, b"typed ahead")
    os.write(out_w, b"not yet logged")

    def hold() -> dict[str, Any]:
        return {"in": in_r, "out": out_w, "out2": again(out_w, os.O_WRONLY | os.O_APPEND)}

    pid = world.hold(hold, keep=(in_r, out_w))
    saved = world.collect([pid], stdio_fds=(in_w, out_r))
    assert saved.problems == []
    assert saved.of("in").what == StdioPipe(0, 0o600, 0, 0, (Chunk(b"typed ahead"),))
    world.end(pid)
    for fd in (in_r, in_w, out_r, out_w):
        os.close(fd)
    in_r, in_w = os.pipe()
    out_r, out_w = os.pipe()

    def check(names: dict[str, Any]) -> None:
        os.write(names["out"], b" first")
        os.write(names["out2"], b" second " + os.read(names["in"], 100))

    restored = world.restore(saved, check, stdio_fds=(in_r, out_w), keep=(in_r, out_w))
    assert os.read(out_r, 100) == b"not yet logged"
    world.finish(restored)
    assert os.read(out_r, 100) == b" first second typed ahead"
    for fd in (in_r, in_w, out_r, out_w):
        os.close(fd)


def test_state_is_typed() -> None:
    assert Pipe("pipe:1", 65536, 0o600, 0, 0).hangup
