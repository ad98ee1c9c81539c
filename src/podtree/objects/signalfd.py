"""signalfd(2): the set of signals. The signals themselves are pending on the tasks, not here."""

from __future__ import annotations

import msgspec

from podtree.kernel import timers_abi
from podtree.objects.held import Held


class SignalFd(msgspec.Struct, frozen=True, tag="signalfd"):
    """Bit N-1 of `mask` is signal N."""

    mask: int


def collect(held: Held) -> SignalFd:
    """State of a signalfd from its fdinfo."""
    return SignalFd(int(held.info.one("sigmask"), 16))


def restore(state: SignalFd) -> int:
    """A new signalfd for that set."""
    return timers_abi.signalfd(state.mask, timers_abi.CLOEXEC)
