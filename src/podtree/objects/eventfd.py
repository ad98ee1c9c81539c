"""eventfd(2): the counter and whether it is a semaphore."""

from __future__ import annotations

import os

import msgspec

from podtree.objects.held import Held

EFD_SEMAPHORE = 1


class EventFd(msgspec.Struct, frozen=True, tag="eventfd"):
    """`count` is the 64-bit counter; reads of a semaphore take 1 from it, others all."""

    count: int
    semaphore: bool


def collect(held: Held) -> EventFd:
    """State of an eventfd from its fdinfo (fs/eventfd.c, eventfd_show_fdinfo; "semaphore": Linux 6.5)."""
    return EventFd(int(held.info.one("eventfd-count"), 16), held.info.one("eventfd-semaphore") == "1")


def restore(state: EventFd) -> int:
    """A new eventfd in that state."""
    fd = os.eventfd(0, os.EFD_CLOEXEC | (EFD_SEMAPHORE if state.semaphore else 0))
    if state.count:
        os.eventfd_write(fd, state.count)
    return fd
