"""Interval timers and POSIX timers (setitimer(2), timer_create(2), proc_pid_timers(5))."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

import msgspec

from podtree.kernel import procfs
from podtree.kernel.sys import NR
from podtree.script.task import Results, Script

SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD, SIGEV_THREAD_ID = 0, 1, 2, 4
ITIMER_REAL = 0
PR_TIMER_CREATE_RESTORE_IDS = 77  # linux/prctl.h (6.15)


class IntervalTimers(msgspec.Struct, frozen=True):
    """ITIMER_REAL, _VIRTUAL, _PROF as struct itimerval (32 bytes each): interval, remaining."""

    values: tuple[bytes, bytes, bytes]


class PosixTimer(msgspec.Struct, frozen=True):
    """One POSIX timer of a process. Times in nanoseconds; `overrun` is not settable and lost if > 0."""

    id: int
    clock: int
    notify: int  # SIGEV_*
    signal: int
    value: int  # sigval
    thread: int  # inner tid for SIGEV_THREAD_ID
    remaining: bytes  # struct itimerspec: interval, remaining


def ask_interval_timers(script: Script) -> list[int]:
    """Add the calls that read the three interval timers; returns addresses."""
    addresses = [script.space(32) for _ in range(3)]
    for which, address in enumerate(addresses):
        script.add(NR.getitimer, which, address, name="getitimer")
    return addresses


def read_interval_timers(addresses: list[int], results: Results) -> IntervalTimers:
    """Interval timers from a finished script."""
    real, virtual, prof = (results.bytes_at(a, 32) for a in addresses)
    return IntervalTimers((real, virtual, prof))


REAL_TIME_CLOCKS = (0, 1, 7, 8, 9, 11)  # REALTIME, MONOTONIC, BOOTTIME, the two ALARMs, TAI: not those of CPU time


def _run_down(value: bytes, late_ns: int, unit_ns: int) -> bytes:
    """A struct itimerval or itimerspec with `late_ns` less left, but never nothing: that would mean "off"."""
    seconds, fraction = struct.unpack("<qq", value[16:])
    left = seconds * 1_000_000_000 + fraction * unit_ns
    if not left:
        return value
    left = max(unit_ns, left - late_ns)
    return value[:16] + struct.pack("<qq", left // 1_000_000_000, left % 1_000_000_000 // unit_ns)


def restore_interval_timers(timers: IntervalTimers, script: Script, late_ns: int) -> None:
    """Add the calls that arm them with what was left, less the time that has passed for the pod since.

    A periodic timer whose signal is pending is only armed again when that is delivered, and shows nothing
    left; setitimer(2) would take that for "off", so it gets a whole interval.
    """
    for which, value in enumerate(timers.values):
        if value != bytes(32):
            if value[16:] == bytes(16):
                value = value[:16] * 2
            if which == ITIMER_REAL:
                value = _run_down(value, late_ns, 1000)
            script.add(NR.setitimer, which, script.put(value), 0, name="setitimer")


_TIMER = re.compile(
    r"ID: (\d+)\nsignal: (\d+)/([0-9a-f]+)\nnotify: (\w+)/(?:(tid|pid)\.(\d+))\nClockID: (-?\d+)"
)


def list_posix_timers(pid: int) -> list[tuple[int, int, int, int, int, int]]:
    """(id, clock, notify, signal, value, host tid) of each POSIX timer of a stopped process."""
    found = []
    for match in _TIMER.finditer(procfs.read_text(f"/proc/{pid}/timers")):
        number, signo, value, how, kind, target, clock = match.groups()
        notify = {"none": SIGEV_NONE, "signal": SIGEV_SIGNAL, "thread": SIGEV_THREAD}[how]
        if kind == "tid":
            notify |= SIGEV_THREAD_ID
        found.append((int(number), int(clock), notify, int(signo), int(value, 16), int(target)))
    return found


def ask_posix_timers(ids: list[int], script: Script) -> list[int]:
    """Add the calls that read what is left on each; returns addresses of struct itimerspec."""
    addresses = []
    for number in ids:
        address = script.space(32)
        script.add(NR.timer_gettime, number, address, name="timer_gettime")
        addresses.append(address)
    return addresses


def restore_posix_timers(
    timers: list[PosixTimer], script: Script, late_ns: int, number: Callable[[int], int]
) -> None:
    """Add the calls that make the timers with the ids they had, and arm them; `late_ns` as for the others.

    `number`: what their process calls a thread of the pod's.

    The ids are the program's handles, so the kernel is asked to use exactly them (6.15+).
    """
    if not timers:
        return
    script.add(NR.prctl, PR_TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0, name="restore timer ids")
    for timer in timers:
        thread = number(timer.thread) if timer.thread else 0
        event = struct.pack("<QiiI", timer.value, timer.signal, timer.notify, thread)
        ident = script.put(struct.pack("<i", timer.id))
        script.add(NR.timer_create, timer.clock, script.put(event.ljust(64, b"\0")), ident, name="timer_create")
    script.add(NR.prctl, PR_TIMER_CREATE_RESTORE_IDS, 0, 0, 0, 0, name="restore timer ids")
    for timer in timers:
        if timer.remaining[16:] != bytes(16):
            late = late_ns if timer.clock in REAL_TIME_CLOCKS else 0
            left = script.put(_run_down(timer.remaining, late, 1))
            script.add(NR.timer_settime, timer.id, 0, left, 0, name="timer_settime")
