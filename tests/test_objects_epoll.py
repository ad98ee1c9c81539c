"""epoll: registrations of all kinds, closed numbers, spent one-shots, nesting."""

from __future__ import annotations

import os
import select
from typing import Any

from holder import World, world
from podtree.objects.epoll import Epoll

__all__ = ["world"]


def control(epoll: int, fd: int, events: int, data: int) -> None:
    import struct

    from podtree.kernel.sys import NR, syscall

    syscall(NR.epoll_ctl, epoll, 1, fd, struct.pack("=IQ", events & 0xFFFFFFFF, data))


def wait(epoll: int) -> list[tuple[int, int]]:
    """(data, events), in the order of data."""
    import struct

    from podtree.kernel.sys import NR, syscall

    raw = bytearray(12 * 32)
    count = syscall(NR.epoll_wait, epoll, raw, 32, 0)
    return sorted((data, events) for events, data in struct.iter_unpack("=IQ", raw[: 12 * count]))


def new_epoll() -> int:
    made = select.epoll()
    fd = os.dup(made.fileno())
    made.close()
    os.set_inheritable(fd, False)
    return fd


def test_registrations(world: World) -> None:
    def hold() -> dict[str, Any]:
        epoll = new_epoll()
        reader, writer = os.pipe()
        counter = os.eventfd(1)
        control(epoll, reader, select.EPOLLIN, 2**63 + 5)
        control(epoll, writer, select.EPOLLOUT | select.EPOLLET, 2)
        control(epoll, counter, select.EPOLLIN | select.EPOLLEXCLUSIVE, 3)
        high = 3000
        os.dup2(counter, high)
        control(epoll, high, select.EPOLLIN, 4)
        closed = os.dup(counter)
        control(epoll, closed, select.EPOLLIN, 5)
        os.close(closed)
        reused = os.open("/dev/null", os.O_RDONLY)  # the closed number again, for something else
        assert reused == closed
        outer = new_epoll()
        control(outer, epoll, select.EPOLLIN, 6)
        return {"epoll": epoll, "r": reader, "w": writer, "counter": counter, "high": high, "outer": outer}

    def check(names: dict[str, Any]) -> None:
        assert wait(names["outer"]) == [(6, select.EPOLLIN)]
        ready = wait(names["epoll"])
        assert ready == [(2, select.EPOLLOUT), (3, 1), (4, 1), (5, 1)]
        assert wait(names["epoll"]) == [(3, 1), (4, 1), (5, 1)]  # 2 is edge-triggered
        os.eventfd_read(names["counter"])
        assert wait(names["epoll"]) == []
        assert wait(names["outer"]) == []
        os.write(names["w"], b"x")
        assert (2**63 + 5, 1) in wait(names["epoll"])

    saved = world.round_trip(hold, check)
    what = saved.of("epoll").what
    assert isinstance(what, Epoll)
    assert len(what.watches) == 5
    assert len({w.file for w in what.watches}) == 3


def test_spent_one_shots(world: World) -> None:
    def hold() -> dict[str, Any]:
        epoll = new_epoll()
        counter = os.eventfd(1)
        reader, writer = os.pipe()
        control(epoll, counter, select.EPOLLIN | select.EPOLLONESHOT, 1)
        os.write(writer, b"x")
        control(epoll, reader, select.EPOLLIN | select.EPOLLONESHOT, 2)
        assert wait(epoll) == [(1, 1), (2, 1)]
        os.read(reader, 1)
        fresh = os.eventfd(7)
        control(epoll, fresh, select.EPOLLIN | select.EPOLLONESHOT, 3)
        return {"epoll": epoll, "counter": counter, "r": reader, "w": writer}

    def check(names: dict[str, Any]) -> None:
        assert wait(names["epoll"]) == [(3, 1)]
        os.write(names["w"], b"y")
        os.close(names["w"])
        assert wait(names["epoll"]) == []  # not even for the hang-up

    saved = world.round_trip(hold, check)
    what = saved.of("epoll").what
    assert isinstance(what, Epoll)
    assert [w.spent for w in sorted(what.watches, key=lambda w: w.data)] == [True, True, False]


def test_watched_file_that_only_epoll_keeps(world: World) -> None:
    """Alive in nothing but another process outside: refused by name."""
    outside_r, outside_w = os.pipe()

    def hold() -> dict[str, Any]:
        epoll = new_epoll()
        control(epoll, outside_r, select.EPOLLIN, 1)
        os.close(outside_r)
        os.close(outside_w)
        return {"epoll": epoll}

    pid = world.hold(hold, keep=(outside_r, outside_w))
    saved = world.collect([pid])
    assert len(saved.problems) == 1
    assert "no process of the pod has the file open" in saved.problems[0]
    os.close(outside_r)
    os.close(outside_w)
