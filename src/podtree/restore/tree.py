"""Growing the process tree: every process with its pid, parent, session, group and terminal.

All are copies of the stem, traced from birth, and act on themselves through the arena.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
import termios
import time
from collections.abc import Callable, Iterator

from podtree.errors import RestoreFailed
from podtree.kernel import procfs, ptrace
from podtree.kernel.sys import NR
from podtree.objects.processes import PR_SET_CHILD_SUBREAPER, Place, Zombie
from podtree.restore.arena import Body
from podtree.restore.nest import Nest, write_last_pid
from podtree.restore.plan import FIRST_HELPER_PID, EndHelper, JoinGroup, NewSession, Spawn, Step
from podtree.script.task import TaskLost

PTS_MAJOR = 136  # Documentation/admin-guide/devices.txt: 136-143 are pty slaves
WALL = 0x40000000
DEATH_PATIENCE_S = 10.0


class Tree:
    """The bodies of a pod under construction, by inner pid."""

    def __init__(self, arena: int, root_body: Callable[[int], Body], nest: Nest) -> None:
        self.arena = arena
        self.nest = nest
        self.bodies: dict[int, Body] = {}
        self.passer: Body  # of `passing`
        self._root_body = root_body  # makes process N from outside of the pod (its parent is 0 inside)

    def grow(self, steps: list[Step], places: list[Place]) -> None:
        """Carry out a plan. A session's leader takes its terminal before it has children: they inherit it."""
        terminals = {place.pid: place.tty for place in places if place.tty and place.sid == place.pid}
        for step in steps:
            match step:
                case Spawn(0, pid, _):
                    self.bodies[pid] = self._root_body(pid)
                case Spawn(parent, pid, exit_signal, flags):
                    child = self.nest.spawn(self.bodies, parent, pid, exit_signal, flags)
                    self.bodies[pid] = Body(child, self.arena, self.bodies[parent].family)
                case NewSession(pid):
                    self.bodies[pid].do(NR.setsid)
                    if pid in terminals:
                        self._take_terminal(pid, terminals[pid])
                case JoinGroup(pid, group):
                    self.bodies[pid].do(NR.setpgid, 0, self.nest.number(pid, group))
                case EndHelper(pid, parent, reaper):
                    self._make_subreaper(reaper, 1)
                    self._end(pid)
                    self.bodies[parent].do(NR.wait4, self.nest.number(parent, pid), 0, WALL, 0)
                    self._make_subreaper(reaper, 0)

    def verify(self, places: list[Place]) -> None:
        """See that the kernel made of the plan what was wanted. Raises RestoreFailed."""
        for place in places:
            stat = procfs.stat(self.bodies[place.pid].tid)
            parent = self.bodies[place.ppid].tid if place.ppid in self.bodies else stat.ppid
            if stat.ppid != parent:
                raise RestoreFailed(f"process {place.pid} did not become a child of {place.ppid}")

    def _make_subreaper(self, pid: int, whether: int) -> None:
        """Whether process `pid` adopts orphans below it; what it is to be in the end is set later (processes)."""
        self.bodies[pid].do(NR.prctl, PR_SET_CHILD_SUBREAPER, whether, 0, 0, 0)

    def _end(self, pid: int) -> None:
        """Have a helper exit; its parent can wait for it afterwards."""
        body = self.bodies.pop(pid)
        try:
            body.remote.call(NR.exit_group, 0)
        except TaskLost:
            ptrace.reap(body.tid)
            return
        raise RestoreFailed(f"helper process {pid} did not end")

    def settle_terminals(self, places: list[Place]) -> None:
        """Who is in the foreground, and who has given the terminal of its session up. Raises RestoreFailed."""
        leaders = {place.pid: place for place in places if place.tty and place.sid == place.pid}
        for place in places:
            if place.sid in leaders and not place.tty:
                self._on_terminal(place.pid, "/dev/tty", termios.TIOCNOTTY)
        for place in leaders.values():
            if place.foreground > 0:
                group = self.nest.number(place.pid, place.foreground)
                self._on_terminal(place.pid, "/dev/tty", termios.TIOCSPGRP, struct.pack("<q", group))
        for place in places if leaders else ():
            if procfs.stat(self.bodies[place.pid].tid).tty_nr != place.tty:
                raise RestoreFailed(f"process {place.pid} did not get its controlling terminal")

    def _take_terminal(self, pid: int, device: int) -> None:
        major, minor = os.major(device), os.minor(device)
        if not PTS_MAJOR <= major < PTS_MAJOR + 8:
            raise RestoreFailed(f"process {pid} has a terminal that is no pty ({major}:{minor})")
        number = (major - PTS_MAJOR) * 256 + minor
        self._on_terminal(pid, f"/dev/pts/{number}", termios.TIOCSCTTY)

    def _on_terminal(self, pid: int, path: str, request: int, argument: bytes = bytes(8)) -> None:
        """One ioctl_tty(2) of a process on a terminal that it opens for it; zero stands for no argument."""
        body = self.bodies[pid]
        address = body.put(argument + path.encode() + b"\0")
        fd = body.do(NR.openat, -100, address + len(argument), os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC, 0)
        body.do(NR.ioctl, fd, request, address if any(argument) else 0)
        body.do(NR.close, fd)

    def make_zombies(self, zombies: list[Zombie]) -> None:
        """End the processes that were zombies, each with the status it had."""
        for zombie in zombies:
            body = self.bodies.pop(zombie.place.pid)
            name = body.put(zombie.comm[:15] + b"\0")
            body.do(NR.prctl, 15, name, 0, 0, 0)
            _die(body, zombie.status)

    @contextlib.contextmanager
    def passing(self, status: int, wanted: int = 0) -> Iterator[int]:
        """The pid of a child of process 1 that afterwards has ended with a wait status, and has been waited for.

        It is `wanted` if that is free: threads must be there already, or could find theirs taken.
        """
        free = (pid for pid in itertools.count(FIRST_HELPER_PID) if pid not in self.bodies)
        pid = wanted if wanted > 1 and not self._is_taken(wanted) else next(free)
        first = self.bodies[1]
        self.passer = Body(first.clone(0, 0, pid), self.arena, first.family)
        yield pid
        _die(self.passer, status)
        first.do(NR.wait4, pid, 0, WALL, 0)

    def _is_taken(self, pid: int) -> bool:
        """Whether a process, thread, group or session has that number."""
        for body in self.bodies.values():
            status = procfs.status(body.tid)
            if pid in (procfs.pod_id(status, key) for key in ("NSpid", "NSpgid", "NSsid")):
                return True
            if any(procfs.pod_id(procfs.status(body.tid, tid)) == pid for tid in procfs.threads(body.tid)):
                return True
        return False

    def set_last_pid(self, last_pid: int, proc_fd: int) -> None:
        """New processes get numbers above `last_pid` again. `proc_fd`: as write_last_pid wants it."""
        write_last_pid(self.bodies[1], proc_fd, last_pid)


def end_thread(body: Body, status: int) -> None:
    """Let a thread group's leader end by exit(2) while other threads live on. Raises RestoreFailed.

    It must not be traced then: a tracer can't wait for such a leader, and the process's parent would not be told of
    the process's end. What it runs is one instruction of the arena, with all signals blocked.
    """
    body.remote.leave_by(NR.exit, status >> 8)
    deadline = time.monotonic() + DEATH_PATIENCE_S
    while procfs.stat(body.tid, body.tid).state != "Z":
        if time.monotonic() > deadline:
            raise RestoreFailed(f"thread {body.tid} did not end")
        time.sleep(0.0002)


def _die(body: Body, status: int) -> None:
    """Let a task end with a wait status: by exit, or by a signal at its default action (no core file)."""
    ended_by = status & 0x7F
    if not ended_by:
        try:
            body.remote.call(NR.exit_group, status >> 8)
        except TaskLost:
            ptrace.reap(body.tid)
            return
        raise RestoreFailed(f"task {body.tid} did not end")
    body.do(NR.prctl, 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE 0: leaves no core
    ptrace.set_sigmask(body.tid, 0)
    os.kill(body.tid, ended_by)
    try:
        ptrace.detach(body.tid)
    except ProcessLookupError:  # SIGKILL doesn't wait for us, but its tracer has to take notice
        ptrace.wait(body.tid)
        ptrace.reap(body.tid)
    deadline = time.monotonic() + DEATH_PATIENCE_S
    while procfs.stat(body.tid).state != "Z":
        if time.monotonic() > deadline:
            raise RestoreFailed(f"task {body.tid} did not die of signal {ended_by}")
        time.sleep(0.0002)
