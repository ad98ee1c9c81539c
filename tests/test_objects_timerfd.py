"""timerfd: armed and not, periodic, expired and unread, on each clock."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from holder import World, world
from podtree.kernel import timers_abi
from podtree.kernel.timers_abi import NANO, TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET
from podtree.objects.timerfd import TimerFd

__all__ = ["world"]


def timer(clock: int, flags: int, value: int, interval: int = 0) -> int:
    fd = timers_abi.timerfd_create(clock, os.O_NONBLOCK)
    timers_abi.timerfd_settime(fd, flags, value, interval)
    return fd


def ticks(fd: int) -> int:
    return int.from_bytes(os.read(fd, 8), "little")


def test_timerfds(world: World) -> None:
    wall = time.time_ns() + 500 * NANO

    def hold() -> dict[str, Any]:
        expired = timer(time.CLOCK_MONOTONIC, 0, 1)
        periodic = timer(time.CLOCK_BOOTTIME, 0, 1000, NANO * 3600)
        fast = timer(time.CLOCK_MONOTONIC, 0, 1000, NANO // 1000)
        time.sleep(0.01)
        return {
            "off": timer(time.CLOCK_MONOTONIC, 0, 0),
            "expired": expired,
            "periodic": periodic,
            "fast": fast,
            "later": timer(time.CLOCK_MONOTONIC, 0, 300 * NANO, 7),
            "absolute": timer(
                time.CLOCK_MONOTONIC, TFD_TIMER_ABSTIME, time.clock_gettime_ns(time.CLOCK_MONOTONIC) + 300 * NANO
            ),
            "wall": timer(time.CLOCK_REALTIME, TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET, wall),
            "soon": timer(time.CLOCK_MONOTONIC, 0, NANO // 5),
        }

    def check(names: dict[str, Any]) -> None:
        for name in ("off", "later", "absolute", "wall"):
            with pytest.raises(BlockingIOError):
                os.read(names[name], 8)
        assert ticks(names["expired"]) == 1
        assert ticks(names["periodic"]) == 1
        assert ticks(names["fast"]) > 10
        left, interval = timers_abi.timerfd_gettime(names["later"])
        assert 290 * NANO < left <= 300 * NANO and interval == 7
        left, _ = timers_abi.timerfd_gettime(names["absolute"])
        assert 290 * NANO < left <= 300 * NANO
        left, _ = timers_abi.timerfd_gettime(names["wall"])
        assert abs(time.time_ns() + left - wall) < NANO // 100
        left, _ = timers_abi.timerfd_gettime(names["periodic"])
        assert 3590 * NANO < left <= 3600 * NANO
        time.sleep(0.25)
        assert ticks(names["soon"]) == 1

    saved = world.round_trip(hold, check, again=False)
    what = saved.of("wall").what
    assert isinstance(what, TimerFd)
    assert abs(what.expires - wall) < NANO // 1000
    assert what.settime_flags == TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET


def test_collecting_again_gives_the_same(world: World) -> None:
    def hold() -> dict[str, Any]:
        one = timer(time.CLOCK_MONOTONIC, 0, 1)
        absolute = timer(time.CLOCK_MONOTONIC, TFD_TIMER_ABSTIME, time.monotonic_ns() + 99 * NANO, 5 * NANO)
        return {"one": one, "absolute": absolute, "off": timer(time.CLOCK_REALTIME, 0, 0)}

    world.round_trip(hold, lambda names: None)
