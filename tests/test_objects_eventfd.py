"""eventfd: counter, semaphore, flags."""

from __future__ import annotations

import os
from typing import Any

import pytest

from holder import World, world
from podtree.objects.eventfd import EventFd

__all__ = ["world"]


def test_eventfds(world: World) -> None:
    def hold() -> dict[str, Any]:
        large = os.eventfd(0, os.EFD_NONBLOCK)
        os.eventfd_write(large, 2**64 - 2)
        return {"large": large, "semaphore": os.eventfd(3, os.EFD_SEMAPHORE | os.EFD_CLOEXEC), "empty": os.eventfd(0)}

    def check(names: dict[str, Any]) -> None:
        assert os.eventfd_read(names["large"]) == 2**64 - 2
        with pytest.raises(BlockingIOError):
            os.eventfd_read(names["large"])
        assert [os.eventfd_read(names["semaphore"]) for _ in range(3)] == [1, 1, 1]
        os.eventfd_write(names["empty"], 5)
        assert os.eventfd_read(names["empty"]) == 5

    saved = world.round_trip(hold, check)
    assert saved.of("semaphore").what == EventFd(3, True)
    assert saved.of("large").what == EventFd(2**64 - 2, False)
