"""Process trees: pids, parents, sessions, groups, zombies, stopped tasks, orphans, threads, names."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
import time
from pathlib import Path

from inpod import bad, case, child, equal, frozen, main, reap, settle, stat_field, status_field, true, wait_go, within

libc = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_GET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 1, 2, 36, 37
PR_GET_DUMPABLE, PR_SET_DUMPABLE, PR_SET_NAME = 3, 4, 15


def identity() -> tuple[int, ...]:
    """All the numbers by which a process knows itself and its relatives."""
    return os.getpid(), os.getppid(), os.getsid(0), os.getpgrp(), threading.get_native_id()


@case
def tree() -> None:
    """Three levels, 1 + 3 + 9 processes; each finds its pid, parent, session and group as they were."""

    def grow(depth: int) -> None:
        before = identity()
        children = [child(lambda: grow(depth - 1)) for _ in range(3)] if depth else []
        (frozen if os.getpid() == top else wait_go)()
        equal("pid, ppid, sid, pgrp, tid", identity(), before)
        for pid in children:
            equal(f"state of child {pid} is readable", stat_field(pid, 4), str(os.getpid()))
        for pid in children:
            reap(pid)

    top = os.getpid()
    grow(2)


@case
def new_pids_go_on() -> None:
    """Pids with gaps between them; a fork afterwards gets a pid that was never taken."""
    taken = []
    for _ in range(20):
        pid = child(lambda: None)
        reap(pid)
        taken.append(pid)
    kept = [child(wait_go) for _ in range(2)]
    frozen()
    for pid in kept:
        reap(pid)
    fresh = child(lambda: None)
    true(f"pid {fresh} is newer than {max(kept)}", fresh > max(kept))
    reap(fresh)


@case
def sessions() -> None:
    """A session leader with two process groups, and a child in a group of its own in our session."""

    def leader() -> None:
        os.setsid()
        nonlocal first_group
        first_group = os.getpgrp()
        first = child(member)
        os.setpgid(first, first)
        second = child(member)
        os.setpgid(second, first)
        settle()
        before = identity(), os.getpgid(first), os.getpgid(second), os.getsid(second)
        wait_go()
        equal("leader", (identity(), os.getpgid(first), os.getpgid(second), os.getsid(second)), before)
        reap(first)
        reap(second)

    def member() -> None:
        true("set-up: in another group", within(60, lambda: os.getpgrp() != first_group))
        before = identity()
        wait_go()
        equal("member", identity(), before)

    def own_group() -> None:
        os.setpgid(0, 0)
        member()

    first_group = os.getpgrp()
    children = [child(leader), child(own_group)]
    settle()
    before = [(os.getsid(pid), os.getpgid(pid)) for pid in children]
    frozen()
    equal("sid and pgid of children", [(os.getsid(pid), os.getpgid(pid)) for pid in children], before)
    for pid in children:
        reap(pid)


@case
def leaderless() -> None:
    """A process whose session and group leaders have both ended and are gone."""
    read_end, write_end = os.pipe()

    def leader() -> None:
        os.setsid()
        grandchild = child(rest)
        os.write(write_end, str(grandchild).encode())

    def rest() -> None:
        true("set-up: the leader has ended", within(60, lambda: os.getppid() == top))
        before = identity()
        wait_go()
        equal("identity", identity(), before)

    top = os.getpid()
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    reap(child(leader), "leader")
    orphan = int(os.read(read_end, 20))
    settle()
    before = os.getsid(orphan), os.getpgid(orphan)
    frozen()
    equal("sid and pgid of the orphan", (os.getsid(orphan), os.getpgid(orphan)), before)
    reap(orphan, "orphan")


@case
def zombies() -> None:
    """Ended children nobody has waited for: exit codes, a killing signal, one that dumped core."""
    codes = [child(lambda code=code: os._exit(code)) for code in (0, 7, 255)]
    killed = [child(lambda: time.sleep(600)) for _ in range(3)]
    for pid, number in zip(killed, (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV), strict=True):
        os.kill(pid, number)
    pids = codes + killed
    true("set-up: all are zombies", within(60, lambda: {stat_field(pid, 3) for pid in pids} == {"Z"}))
    frozen()
    equal("all are zombies", [stat_field(pid, 3) for pid in pids], ["Z"] * 6)
    found = [os.waitpid(pid, 0)[1] for pid in pids]
    equal("exit codes", [os.waitstatus_to_exitcode(status) for status in found], [0, 7, 255, -9, -15, -11])
    with_none_left = False
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        with_none_left = True
    true("no other child is left", with_none_left)


@case
def zombie_names() -> None:
    """A zombie keeps its name, group and session."""

    def body() -> None:
        os.setsid()
        libc.prctl(PR_SET_NAME, b"undead")
        os._exit(3)

    pid = child(body)
    true("set-up: it is a zombie", within(60, lambda: stat_field(pid, 3) == "Z"))
    before = [stat_field(pid, number) for number in (2, 3, 4, 5, 6)]
    frozen()
    equal("name, state, parent, group, session", [stat_field(pid, number) for number in (2, 3, 4, 5, 6)], before)
    equal("exit code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 3)


@case
def stopped() -> None:
    """A stopped child stays stopped, one stop already reported and one not; SIGCONT sets each going."""

    def counting() -> None:
        wait_go()
        os._exit(9)

    reported, unreported = child(counting), child(counting)
    for pid in (reported, unreported):
        os.kill(pid, signal.SIGSTOP)
    true("set-up: stopped", within(60, lambda: stat_field(reported, 3) + stat_field(unreported, 3) == "TT"))
    _, status = os.waitpid(reported, os.WUNTRACED)
    true("set-up: reported as stopped", os.WIFSTOPPED(status))
    frozen()
    time.sleep(0.2)
    equal("states", [stat_field(pid, 3) for pid in (reported, unreported)], ["T", "T"])
    equal("nothing new of the one already reported", os.waitpid(reported, os.WUNTRACED | os.WNOHANG), (0, 0))
    pid, status = os.waitpid(unreported, os.WUNTRACED | os.WNOHANG)
    true(f"the other one's stop is still to be reported ({pid}, {status:#x})", pid and os.WIFSTOPPED(status))
    for pid in (reported, unreported):
        os.kill(pid, signal.SIGCONT)
        equal("exit code after SIGCONT", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 9)


@case
def stopped_by_tty_signal() -> None:
    """Stopped by SIGTSTP with threads: all of them stay stopped."""

    def body() -> None:
        for _ in range(3):
            threading.Thread(target=wait_go).start()
        wait_go()

    pid = child(body)
    true("set-up: threads", within(60, lambda: len(os.listdir(f"/proc/{pid}/task")) == 4))

    def states() -> set[str]:
        return {stat_field(f"{pid}/task/{tid.name}", 3) for tid in Path(f"/proc/{pid}/task").iterdir()}

    os.kill(pid, signal.SIGTSTP)
    if not within(1, lambda: states() == {"T"}):  # an orphaned process group is not stopped by SIGTSTP
        os.kill(pid, signal.SIGSTOP)
    true("set-up: all are stopped", within(60, lambda: states() == {"T"}))
    frozen()
    equal("states", states(), {"T"})
    os.kill(pid, signal.SIGCONT)
    reap(pid)


@case
def orphans() -> None:
    """Orphans of init and of a subreaper know their new parents; both can still be waited for."""

    def subreaper() -> None:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
        read_end, write_end = os.pipe()

        def middle() -> None:
            os.write(write_end, str(child(orphan)).encode())

        nonlocal adopter
        adopter = os.getpid()
        reap(child(middle), "middle")
        pid = int(os.read(read_end, 20))
        wait_go()
        flag = ctypes.c_int()
        libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(flag))
        equal("child subreaper", flag.value, 1)
        reap(pid, "orphan")

    def orphan() -> None:
        true("set-up: adopted", within(60, lambda: os.getppid() == adopter))
        before = identity()
        wait_go()
        equal("identity", identity(), before)

    adopter = 0
    pid = child(subreaper)
    settle()
    frozen()
    reap(pid, "subreaper")


@case
def wait_relations() -> None:
    """A parent blocked in waitpid for its child, which ends after the checkpoint with its own code."""

    def parent() -> None:
        pid = child(ends)
        _, status = os.waitpid(pid, 0)
        equal("exit code", os.waitstatus_to_exitcode(status), 42)

    def ends() -> None:
        wait_go()
        os._exit(42)

    pid = child(parent)
    frozen()
    reap(pid)


@case
def sigchld_to_the_right_parent() -> None:
    """A child's end raises SIGCHLD in its parent, with the child's pid."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    pid = child(lambda: (wait_go(), os._exit(5)))  # type: ignore[func-returns-value]
    frozen()
    info = signal.sigtimedwait([signal.SIGCHLD], 60)
    equal("SIGCHLD of", info and (info.si_pid, info.si_status), (pid, 5))
    os.waitpid(pid, 0)


@case
def threads() -> None:
    """Ten threads: tids, names, and a lock, a condition and a queue between them that go on working."""
    lock, condition = threading.Lock(), threading.Condition()
    facts: dict[int, bool] = {}
    turns: list[int] = []
    held = threading.Event()

    def work(number: int) -> None:
        libc.prctl(PR_SET_NAME, f"worker-{number}".encode())
        tid = threading.get_native_id()
        with condition:
            while not turns or turns[-1] != number - 1:
                condition.wait()
            turns.append(number)
            condition.notify_all()
        same = threading.get_native_id() == tid
        name = Path(f"/proc/self/task/{tid}/comm").read_text().strip()
        with lock:
            facts[number] = same and name == f"worker-{number}"

    lock.acquire()
    workers = [threading.Thread(target=work, args=(number,)) for number in range(10)]
    for worker in workers:
        worker.start()
    time.sleep(0.3)
    before = sorted(os.listdir("/proc/self/task"))
    holder = threading.Thread(target=held.wait)
    holder.start()
    frozen()
    equal("tids", [tid for tid in sorted(os.listdir("/proc/self/task")) if tid in before], before)
    held.set()
    holder.join()
    lock.release()
    with condition:
        turns.append(-1)
        condition.notify_all()
    for worker in workers:
        worker.join(90)
    equal("turns", turns, list(range(-1, 10)))
    equal("all threads kept tid and name", facts, dict.fromkeys(range(10), True))


@case
def many_threads_in_a_child() -> None:
    """Threads in a forked child, each sleeping in the kernel, one spinning."""

    def body() -> None:
        tids: dict[int, int] = {}
        spun = [0]

        def sleeper(number: int) -> None:
            tids[number] = threading.get_native_id()
            wait_go()
            equal("tid", threading.get_native_id(), tids[number])

        def spinner() -> None:
            stop = time.monotonic() + 600
            while not done and time.monotonic() < stop:
                spun[0] += 1

        done: list[int] = []
        workers = [threading.Thread(target=sleeper, args=(number,)) for number in range(20)]
        spin = threading.Thread(target=spinner)
        for worker in [*workers, spin]:
            worker.start()
        wait_go()
        at = spun[0]
        for worker in workers:
            worker.join()
        true("the spinning thread goes on", within(60, lambda: spun[0] > at))
        done.append(1)
        spin.join()

    pid = child(body)
    time.sleep(0.5)
    frozen()
    reap(pid)


@case
def names() -> None:
    """comm, cmdline, environ, exe, auxv, dumpable, subreaper, parent-death signal."""

    def facts() -> dict[str, object]:
        files = {name: Path(f"/proc/self/{name}").read_bytes() for name in ("comm", "cmdline", "environ", "auxv")}
        flag, number = ctypes.c_int(), ctypes.c_int()
        libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(flag))
        libc.prctl(PR_GET_PDEATHSIG, ctypes.byref(number))
        return {
            **files,
            "exe": os.readlink("/proc/self/exe"),
            "dumpable": libc.prctl(PR_GET_DUMPABLE),
            "subreaper": flag.value,
            "pdeathsig": number.value,
            "personality": Path("/proc/self/personality").read_text(),
            "timerslack": libc.prctl(30),
            "thp": libc.prctl(42, 0, 0, 0, 0),
        }

    def body() -> None:
        libc.prctl(PR_SET_NAME, b"a name, 15 byte")
        libc.prctl(PR_SET_DUMPABLE, 0)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
        libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGUSR2))
        libc.prctl(29, 123456)  # PR_SET_TIMERSLACK, ns
        libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
        before = facts()
        wait_go()
        after = facts()
        for key, value in before.items():
            equal(key, after[key], value)

    pid = child(body)
    time.sleep(0.3)
    frozen()
    reap(pid)


@case
def parent_death_signal() -> None:
    """The parent-death signal still comes when the parent dies."""
    read_end, write_end = os.pipe()

    def parent() -> None:
        child(orphan)
        wait_go()
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    def orphan() -> None:
        libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGUSR2))
        signal.signal(signal.SIGUSR2, lambda *_: os.write(write_end, b"told"))
        time.sleep(0.1)
        while True:
            time.sleep(0.1)
            if os.getppid() == 1 and told():
                return

    def told() -> bool:
        return bool(select.select([read_end], [], [], 0)[0])

    pid = child(parent)
    time.sleep(0.3)
    frozen()
    os.waitpid(pid, 0)
    if not select.select([read_end], [], [], 60)[0]:
        bad("no parent-death signal")


@case
def vfork_like_execs() -> None:
    """Children that have exec'ed other programs, one of them through a script."""
    Path("script.sh").write_text("#!/bin/sh\nwhile [ ! -e finish ]; do sleep 0.1; done\nexit 4\n")
    os.chmod("script.sh", 0o755)
    script = os.spawnv(os.P_NOWAIT, "./script.sh", ["./script.sh", "with", "arguments"])
    program = os.spawnvp(os.P_NOWAIT, "sleep", ["sleep", "600"])
    time.sleep(0.3)

    def facts(pid: int) -> tuple[object, ...]:
        proc = Path(f"/proc/{pid}")
        return (proc / "cmdline").read_bytes(), (proc / "comm").read_text(), os.readlink(proc / "exe")

    before = facts(script), facts(program)
    frozen()
    equal("facts", (facts(script), facts(program)), before)
    Path("finish").touch()
    equal("the script's exit code", os.waitstatus_to_exitcode(os.waitpid(script, 0)[1]), 4)
    equal("uid of sleep", status_field(program, "Uid").split()[0], str(os.getuid()))
    os.kill(program, signal.SIGTERM)
    equal("the end of sleep", os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]), -15)


if __name__ == "__main__":
    main()
