"""signalfd: the mask, and that signals are read through it."""

from __future__ import annotations

import os
import signal
from typing import Any

from holder import World, world
from podtree.kernel import timers_abi
from podtree.objects.signalfd import SignalFd

__all__ = ["world"]
MASK = 1 << (signal.SIGUSR1 - 1) | 1 << (signal.SIGRTMAX - 1)


def test_signalfd(world: World) -> None:
    def hold() -> dict[str, Any]:
        return {"fd": timers_abi.signalfd(MASK, os.O_NONBLOCK)}

    def check(names: dict[str, Any]) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGRTMAX})
        for number in (signal.SIGRTMAX, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert [os.read(names["fd"], 128)[0] for _ in range(2)] == [signal.SIGUSR1, signal.SIGRTMAX]

    saved = world.round_trip(hold, check)
    assert saved.of("fd").what == SignalFd(MASK)
