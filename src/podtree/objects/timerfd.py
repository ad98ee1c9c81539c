"""timerfd_create(2): the clock, what is left, the interval, unread expirations.

What is left is saved as a duration, because the pod's monotonic clocks go on where they stood. Only a timer set to
an instant of the wall clock keeps that instant: it has passed or not when the pod comes back, as after a sleep.
"""

from __future__ import annotations

import time

import msgspec

from podtree.kernel import fdinfo, timers_abi
from podtree.kernel.timers_abi import TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET
from podtree.objects.held import Held

CLOCK_REALTIME_ALARM = 8
WALL_CLOCKS = (time.CLOCK_REALTIME, CLOCK_REALTIME_ALARM)


class TimerFd(msgspec.Struct, frozen=True, tag="timerfd"):
    """Times in nanoseconds. `remaining`, of CLOCK_MONOTONIC's `read_ns` in the pod, is 0 for one that is disarmed.

    `expires`: the instant, for absolute wall clock timers only.
    """

    clock: int
    settime_flags: int
    ticks: int
    remaining: int
    interval: int
    read_ns: int
    expires: int = 0

    @property
    def keeps_instant(self) -> bool:
        return self.clock in WALL_CLOCKS and bool(self.settime_flags & TFD_TIMER_ABSTIME)


def collect(held: Held, clock_offset_ns: int) -> TimerFd:
    """State of a timerfd; its own fdinfo is read again, after gettime has counted what expired.

    `clock_offset_ns`: the pod's CLOCK_MONOTONIC less ours.
    """
    remaining, interval = timers_abi.timerfd_gettime(held.fd)
    read_ns = time.monotonic_ns() + clock_offset_ns
    now = time.clock_gettime_ns(time.CLOCK_REALTIME)
    info = fdinfo.read_fdinfo("self", held.fd)
    clock, flags = int(info.one("clockid")), int(info.one("settime flags"), 8)
    state = TimerFd(clock, flags, int(info.one("ticks")), remaining, interval, read_ns)
    if remaining and state.keeps_instant:
        state = msgspec.structs.replace(state, expires=now + remaining)
    return state


def restore(state: TimerFd) -> int:
    """A new timerfd with its unread expirations; `arm` follows, when it is known when the pod goes on."""
    fd = timers_abi.timerfd_create(state.clock, timers_abi.CLOEXEC)
    if state.ticks:
        timers_abi.timerfd_set_ticks(fd, state.ticks)
    return fd


def arm(fd: int, state: TimerFd, late: int) -> None:
    """Have a restored timerfd go on. The caller is outside of the pod's time namespace: absolute values are its own
    clock's.

    `late` ns have passed for the pod since the timer was read: they count as run down.
    """
    flags = state.settime_flags & (TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET)
    value, ticks = state.remaining, state.ticks
    if value and not state.expires:
        value -= late
        if value <= 0 and state.interval:
            missed = -value // state.interval + 1
            value, ticks = value + missed * state.interval, ticks + missed
        value = max(1, value)
    if state.expires:
        value = state.expires
    elif value and flags & TFD_TIMER_ABSTIME:
        value += time.clock_gettime_ns(state.clock)
    if flags or value or state.interval:
        timers_abi.timerfd_settime(fd, flags, value, state.interval)
    if ticks:
        timers_abi.timerfd_set_ticks(fd, ticks)
