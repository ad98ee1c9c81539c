"""Signals pending, blocked and handled; alternate stacks; interval and POSIX timers; the clocks."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
import time
from pathlib import Path

from inpod import bad, case, child, equal, frozen, main, reap, runs_down, status_field, true, wait_go, within

libc = ctypes.CDLL(None, use_errno=True)
NR_RT_SIGQUEUEINFO, NR_RT_TGSIGQUEUEINFO, NR_RT_SIGTIMEDWAIT = 129, 297, 128
NR_TIMER_CREATE, NR_TIMER_SETTIME, NR_TIMER_GETTIME, NR_TIMER_GETOVERRUN = 222, 223, 224, 225
SI_QUEUE, SI_TIMER, SI_TKILL, SI_USER = -1, -2, -6, 0
SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD_ID = 0, 1, 4


class Siginfo(ctypes.Structure):
    """siginfo_t as sigqueue(3) and timers fill it; 128 bytes."""

    _fields_ = [
        ("signo", ctypes.c_int),
        ("errno", ctypes.c_int),
        ("code", ctypes.c_int),
        ("_pad", ctypes.c_int),
        ("pid", ctypes.c_int),
        ("uid", ctypes.c_int),
        ("value", ctypes.c_uint64),
        ("_rest", ctypes.c_byte * 96),
    ]


def queue(number: int, value: int, tid: int = 0) -> None:
    """Queues a signal with a payload for this process, or one of its threads."""
    info = Siginfo(number, 0, SI_QUEUE, 0, os.getpid(), os.getuid(), value)
    if tid:
        done = libc.syscall(NR_RT_TGSIGQUEUEINFO, os.getpid(), tid, number, ctypes.byref(info))
    else:
        done = libc.syscall(NR_RT_SIGQUEUEINFO, os.getpid(), number, ctypes.byref(info))
    assert done == 0, os.strerror(ctypes.get_errno())


def take(numbers: set[int], seconds: int = 0) -> Siginfo | None:
    """Takes one pending signal, with everything it carries; waits up to `seconds`."""
    mask = ctypes.c_uint64(sum(1 << (number - 1) for number in numbers))
    info, limit = Siginfo(), (ctypes.c_long * 2)(seconds, 0)
    while True:
        found = libc.syscall(NR_RT_SIGTIMEDWAIT, ctypes.byref(mask), ctypes.byref(info), limit, 8)
        # A tracer killed right after a stop can't undo this EINTR, which signal(7) lists
        if not (found < 0 and ctypes.get_errno() == errno.EINTR and "PT_EINTR" in os.environ):
            break
    return info if found > 0 else None


def masks(who: int | str = "self") -> dict[str, str]:
    """The signal masks of /proc/PID/status."""
    return {key: status_field(who, key) for key in ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt")}


@case
def pending() -> None:
    """Pending signals for the process and for a thread: order, payload, sender; unblocked, they arrive."""
    realtime = signal.SIGRTMIN + 3
    blocked = {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, realtime}
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    os.kill(os.getpid(), signal.SIGUSR1)
    libc.syscall(234, os.getpid(), threading.get_native_id(), int(signal.SIGUSR2))  # tgkill
    for value in (11, 22, 33 << 33):
        queue(realtime, value)
    queue(realtime, 44, threading.get_native_id())
    before = masks()
    frozen()
    equal("masks", masks(), before)
    mine = take({realtime})
    equal("the thread's own comes first", mine and (mine.code, mine.value), (SI_QUEUE, 44))
    values = []
    while (info := take({realtime})) is not None:
        values.append((info.code, info.pid, info.value))
    equal("queued", values, [(SI_QUEUE, os.getpid(), value) for value in (11, 22, 33 << 33)])
    first, second = take({signal.SIGUSR1}), take({signal.SIGUSR2})
    equal("by kill", first and (first.code, first.pid), (SI_USER, os.getpid()))
    equal("by tgkill", second and (second.code, second.pid), (SI_TKILL, os.getpid()))
    equal("SIGTERM was never sent", take({signal.SIGTERM}), None)


@case
def pending_for_a_handler() -> None:
    """A blocked signal is delivered to its handler when it is unblocked after the checkpoint."""
    got: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: got.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    os.kill(os.getpid(), signal.SIGUSR1)
    frozen()
    equal("not yet", got, [])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    equal("delivered", got, [signal.SIGUSR1])


@case
def pending_in_relatives() -> None:
    """Signals pending in a child and in one thread of it."""

    def body() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
        got: list[object] = []

        def thread() -> None:
            wait_go()
            info = take({signal.SIGUSR2})
            got.append(info and info.code)

        worker = threading.Thread(target=thread)
        worker.start()
        libc.syscall(234, os.getpid(), worker.native_id, int(signal.SIGUSR2))
        wait_go()
        worker.join()
        equal("the thread's", got, [SI_TKILL])
        info = take({signal.SIGUSR1}, 60)
        equal("the process's, of its parent", info and info.pid, os.getppid())

    pid = child(body)
    bit = 1 << signal.SIGUSR1 - 1
    true("set-up: it blocks the signal", within(60, lambda: int(status_field(pid, "SigBlk"), 16) & bit))
    os.kill(pid, signal.SIGUSR1)
    frozen()
    reap(pid)


@case
def handlers() -> None:
    """Handlers with their flags and masks as the kernel has them, ignored and default signals."""

    class Action(ctypes.Structure):
        """struct kernel_sigaction, x86_64."""

        _fields_ = [
            ("handler", ctypes.c_void_p),
            ("flags", ctypes.c_ulong),
            ("restorer", ctypes.c_void_p),
            ("mask", ctypes.c_uint64),
        ]

    def action(number: int) -> tuple[object, ...]:
        found = Action()
        assert libc.syscall(13, number, None, ctypes.byref(found), 8) == 0  # rt_sigaction
        return found.handler, found.flags, found.restorer, found.mask

    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.siginterrupt(signal.SIGUSR1, False)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raw = Action()
    libc.syscall(13, int(signal.SIGUSR1), None, ctypes.byref(raw), 8)
    raw.mask = 0x5A5A00
    raw.flags |= 0x40000000 | 0x08000000  # SA_NODEFER, SA_ONSTACK
    assert libc.syscall(13, int(signal.SIGUSR2), ctypes.byref(raw), None, 8) == 0
    before = {number: action(number) for number in range(1, 65) if number not in (9, 19)}
    frozen()
    for number, wanted in before.items():
        equal(f"action of signal {number}", action(number), wanted)


@case
def alternate_stacks() -> None:
    """Alternate signal stacks of two threads."""

    class Stack(ctypes.Structure):
        """stack_t, sigaltstack(2)."""

        _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

    areas = [ctypes.create_string_buffer(65536) for _ in range(2)]

    def body(area: object, results: list[object]) -> None:
        new, now = Stack(ctypes.addressof(area), 0, 65536), Stack()  # type: ignore[arg-type]
        assert libc.sigaltstack(ctypes.byref(new), None) == 0
        wait_go()
        libc.sigaltstack(None, ctypes.byref(now))
        results.append((now.sp, now.flags, now.size))

    results: list[object] = []
    worker = threading.Thread(target=body, args=(areas[0], results))
    worker.start()
    new, now = Stack(ctypes.addressof(areas[1]), 0, 65536), Stack()
    libc.sigaltstack(ctypes.byref(new), None)
    frozen()
    worker.join()
    libc.sigaltstack(None, ctypes.byref(now))
    results.append((now.sp, now.flags, now.size))
    equal("stacks", results, [(ctypes.addressof(area), 0, 65536) for area in areas])


@case
def interval_timers() -> None:
    """The three interval timers: remaining time, interval, and that they ring."""
    rings: list[int] = []
    signal.signal(signal.SIGALRM, lambda *_: rings.append(1))
    signal.signal(signal.SIGVTALRM, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_IGN)
    began = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 500, 77)
    armed = time.monotonic()
    signal.setitimer(signal.ITIMER_VIRTUAL, 600, 7)
    signal.setitimer(signal.ITIMER_PROF, 700, 8)

    def body() -> None:
        count = [0]

        def ring(*_: object) -> None:
            count[0] += 1

        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        wait_go()
        at = count[0]
        true("the periodic timer goes on", within(30, lambda: count[0] > at))

    pid = child(body)
    frozen()
    at = time.monotonic()
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    runs_down("real", left, 500, (began, armed), at)
    equal("interval", interval, 77.0)
    left, interval = signal.getitimer(signal.ITIMER_VIRTUAL)
    true(f"virtual: {left} left", 590 < left <= 600.1)
    equal("interval", interval, 7.0)
    left, interval = signal.getitimer(signal.ITIMER_PROF)
    true(f"profiling: {left} left", 690 < left <= 700.1)
    equal("interval", interval, 8.0)
    reap(pid)
    equal("rings before", rings, [])
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0)
    true("rings", within(30, lambda: rings))


class Sigevent(ctypes.Structure):
    """struct sigevent, sigevent(3type); 64 bytes."""

    _fields_ = [
        ("value", ctypes.c_uint64),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("tid", ctypes.c_int),
        ("_rest", ctypes.c_byte * 44),
    ]


def posix_timer(clock: int, event: Sigevent, value: float, interval: float = 0, absolute: bool = False) -> int:
    """A POSIX timer by its kernel id, armed."""
    number = ctypes.c_int()
    assert libc.syscall(NR_TIMER_CREATE, clock, ctypes.byref(event), ctypes.byref(number)) == 0
    parts = [int(interval), int(interval % 1 * 1e9), int(value), int(value % 1 * 1e9)]
    assert libc.syscall(NR_TIMER_SETTIME, number.value, int(absolute), (ctypes.c_long * 4)(*parts), None) == 0
    return number.value


def posix_left(number: int) -> tuple[float, float]:
    """Remaining and interval of a POSIX timer, s."""
    spec = (ctypes.c_long * 4)()
    assert libc.syscall(NR_TIMER_GETTIME, number, spec) == 0, f"timer {number} is gone"
    return spec[2] + spec[3] / 1e9, spec[0] + spec[1] / 1e9


@case
def posix_timers() -> None:
    """POSIX timers: ids with gaps, clocks, payload, to a thread, silent, with an expiry already pending."""
    number = signal.SIGRTMIN + 5
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    tid = threading.get_native_id()
    began = time.monotonic()
    first = posix_timer(1, Sigevent(1, number, SIGEV_SIGNAL), 1000, 10)
    dropped = posix_timer(1, Sigevent(2, number, SIGEV_SIGNAL), 1000)
    silent = posix_timer(1, Sigevent(3, number, SIGEV_NONE), 900)
    libc.syscall(226, dropped)  # timer_delete
    boot = posix_timer(7, Sigevent(4, number, SIGEV_SIGNAL), 800)
    armed = time.monotonic()
    rung = posix_timer(1, Sigevent(0xABCD12345678, number, SIGEV_SIGNAL), 0.01)
    cpu = posix_timer(2, Sigevent(6, number, SIGEV_SIGNAL), 5000, 2)
    bit = 1 << number - 1
    true("set-up: it has rung", within(30, lambda: int(masks()["ShdPnd"], 16) & bit))
    to_thread = posix_timer(1, Sigevent(7, number, SIGEV_THREAD_ID, tid), time.monotonic() + 700, 0, True)
    idle = threading.Thread(target=time.sleep, args=(1000,), daemon=True)
    idle.start()
    of_thread = posix_timer(time.pthread_getcpuclockid(idle.ident), Sigevent(9, number, SIGEV_SIGNAL), 6000)
    frozen()
    for name, timer, total in (("first", first, 1000), ("silent", silent, 900), ("boot", boot, 800)):
        at = time.monotonic()
        left, _ = posix_left(timer)
        runs_down(name, left, total, (began, armed), at)
    equal("interval", posix_left(first)[1], 10.0)
    left, interval = posix_left(cpu)
    true(f"cpu: {left} left", 4990 < left <= 5000.1 and interval == 2)
    true("CPU time of a thread", 5990 < posix_left(of_thread)[0] <= 6000)
    true("to a thread", 400 < posix_left(to_thread)[0] < 700)
    info = take({number})
    equal("the pending expiry", info and (info.code, info.pid, info.value), (SI_TIMER, rung, 0xABCD12345678))
    equal("no other", take({number}), None)
    equal("the deleted id", libc.syscall(NR_TIMER_GETTIME, dropped, (ctypes.c_long * 4)()), -1)
    again = posix_timer(1, Sigevent(8, number, SIGEV_THREAD_ID, tid), 0.01)
    info = take({number}, 60)
    equal("a new timer rings", info and (info.code, info.pid, info.value), (SI_TIMER, again, 8))
    true("ids don't collide", again not in (first, silent, boot, cpu, to_thread))


@case
def clocks() -> None:
    """CLOCK_MONOTONIC and BOOTTIME go on without a step back and without a jump; a reader in a busy loop."""
    coarse = 6  # CLOCK_MONOTONIC_COARSE
    watched = [time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME, time.CLOCK_MONOTONIC_RAW, coarse]
    last = {clock: time.clock_gettime(clock) for clock in watched}
    largest = dict.fromkeys(watched, 0.0)
    wall, mono = time.time(), time.monotonic()
    print("READY", flush=True)
    while not os.path.exists("go"):
        for clock in watched:
            now = time.clock_gettime(clock)
            if now < last[clock]:
                bad(f"clock {clock} went back by {last[clock] - now} s")
            largest[clock] = max(largest[clock], now - last[clock])
            last[clock] = now
        time.sleep(0.0005)
    for clock in watched:
        true(f"clock {clock} jumped by {largest[clock]} s", largest[clock] < 10)
    true("the wall clock goes at least as far", time.time() - wall > time.monotonic() - mono - 0.5)


@case
def sleeps() -> None:
    """Sleeping threads wake on time by the monotonic clock: relative, absolute, in a condition, in select."""
    import select

    late: dict[str, float] = {}

    class Timespec(ctypes.Structure):
        """struct timespec."""

        _fields_ = [("sec", ctypes.c_long), ("nsec", ctypes.c_long)]

    def absolute(seconds: float) -> None:
        end = time.monotonic() + seconds
        spec = Timespec(int(end), int(end % 1 * 1e9))
        while libc.clock_nanosleep(1, 1, ctypes.byref(spec), None):
            late["interrupted"] = 1

    ways = {
        "sleep": time.sleep,
        "absolute": absolute,
        "condition": lambda s: threading.Event().wait(s),
        "select": lambda s: select.select([], [], [], s),
        "poll": lambda s: select.poll().poll(s * 1000),
    }

    def measure(name: str) -> None:
        began = time.monotonic()
        ways[name](6)
        late[name] = time.monotonic() - began - 6

    workers = [threading.Thread(target=measure, args=(name,)) for name in ways]
    for worker in workers:
        worker.start()
    frozen()
    for worker in workers:
        worker.join()
    equal("all", sorted(late), sorted(ways))
    for name in ways:
        # a busy machine wakes all of them late; poll(2) starts anew in a branch, with its whole time
        most = late["absolute"] + 3 + (6 if name == "poll" else 0)
        true(f"{name} woke {late[name]} s late, the absolute one {late['absolute']} s", -0.01 < late[name] < most)
    true(f"absolute: {late['absolute']} s late", late["absolute"] < 60)


@case
def signals_under_way() -> None:
    """A child that is sent numbered real-time signals all the time gets each exactly once, in order."""
    number = signal.SIGRTMIN + 1
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})

    def body() -> None:
        wanted = 0
        while True:
            info = take({number}, 90)
            if info is None or info.value != wanted:
                bad(f"signal {wanted}: {info and info.value}")
                return
            wanted += 1
            if info.value == 0 and wanted > 1:
                return
            if os.path.exists("last") and int(Path("last").read_text() or 0) == wanted:
                return

    pid = child(body)
    print("READY", flush=True)
    sent = 0
    while not os.path.exists("go"):
        info = Siginfo(number, 0, SI_QUEUE, 0, os.getpid(), 0, sent)
        assert libc.syscall(NR_RT_SIGQUEUEINFO, pid, number, ctypes.byref(info)) == 0
        sent += 1
        time.sleep(0.001)
    Path("last.new").write_text(str(sent + 1))
    os.rename("last.new", "last")
    info = Siginfo(number, 0, SI_QUEUE, 0, os.getpid(), 0, sent)
    libc.syscall(NR_RT_SIGQUEUEINFO, pid, number, ctypes.byref(info))
    reap(pid)


if __name__ == "__main__":
    main()
