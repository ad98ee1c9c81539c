"""Namespaces that programs of the pod had made, made again, and the processes put into them.

Namespaces are made by *holders*: processes of ours that leave for a new namespace and stay until the restore is over.
Each process under construction has descriptors of all of them behind its slots.

Who is in a user namespace of its own has no rights over the pod's pid namespace any more, and can't choose pids there
(clone3(2), set_tid). So processes are grown before they enter theirs. But the first process of a pid namespace makes
it, and so has to be born by one who is in the user namespace that it is to belong to. That, its offspring and all
threads get their pids by ns_last_pid (pid_namespaces(7)), set just before by a *setter*: a process of ours in that pid
namespace (podtree.restore.holders).
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from podtree.errors import RestoreFailed
from podtree.kernel import mm, procfs, ptrace
from podtree.kernel.namespaces import Clone
from podtree.kernel.sys import NR
from podtree.objects import nesting
from podtree.objects.credentials import (
    PR_SET_SECUREBITS,
    SECBIT_NO_SETUID_FIXUP,
    Credentials,
    Seen,
)
from podtree.objects.nesting import POD, Membership, Nesting, Ranges, Space, UserNamespace
from podtree.objects.processes import PR_SET_DUMPABLE, Place, Process, Zombie
from podtree.objects.threads import Thread
from podtree.restore.arena import Body
from podtree.restore.holders import SPACE_FLAGS, Setter
from podtree.restore.plan import FIRST_HELPER_PID, INIT
from podtree.script.task import Script, TaskLost

WALL = 0x40000000
LEAVE = 0xFFFFFFFF  # (uid_t)-1: setresuid(2) leaves that one as it is


@dataclass(slots=True)
class Nest:
    """What the restore knows of the namespaces of one image, and of how far the bodies have got."""

    nesting: Nesting
    processes: dict[int, Process]
    places: dict[int, Place]  # zombies' too
    proc_slot: int = 0  # the host's /proc, in all bodies; the namespaces' descriptors follow
    holders: dict[int, int] = field(default_factory=dict)  # id of a user namespace or space -> host pid in it
    now: dict[int, Membership] = field(default_factory=dict)  # where a body is meanwhile, by the pod's pid
    groups: dict[int, tuple[int, ...]] = field(default_factory=dict)  # of those in user namespaces: what they have
    numbers: dict[int, dict[int, int]] = field(default_factory=dict)  # pid namespace -> the pod's number -> its own
    lent: dict[int, set[int]] = field(default_factory=dict)  # pid namespace -> numbers that our own processes have
    setters: dict[int, Setter] = field(default_factory=dict)  # by pid namespace

    @property
    def slots(self) -> int:
        """How many numbers behind `proc_slot` bodies need: namespaces, the two ends of a socket, two passing ones."""
        ids = [one.id for one in self._all()]
        return max(ids) + 4 if ids else 0

    @property
    def end(self) -> int:
        """First descriptor number above those that bodies need."""
        return self.proc_slot + 1 + self.slots

    def networks(self) -> dict[int, int]:
        """A holder of each net namespace, by its id."""
        return {space.id: self.holders[space.id] for space in self.nesting.spaces if space.kind == "net"}

    def _all(self) -> Iterable[UserNamespace | Space]:
        return (*self.nesting.users, *self.nesting.spaces)

    def user(self, number: int) -> UserNamespace | None:
        return next((u for u in self.nesting.users if u.id == number), None)

    def member(self, pid: int) -> Membership:
        process = self.processes.get(pid)
        return process.member if process else Membership()

    def is_nested(self, pid: int) -> bool:
        """Whether a process has no rights over what is the pod's."""
        return self.member(pid).user != POD

    def is_apart(self, pid: int) -> bool:
        """Whether a body is where it has no rights over process 1."""
        return pid in self.now and self.now[pid].user != POD

    def slot(self, number: int) -> int:
        return self.proc_slot + number

    # --- numbers

    def note_numbers(self) -> None:
        """Learn what every pid namespace calls its processes, groups, sessions and threads."""
        for place in self.places.values():
            for space, inner in zip(self.nesting.chain(place.space), place.inner, strict=True):
                known = self.numbers.setdefault(space, {})
                for outer, own in ((place.pid, inner.pid), (place.pgid, inner.pgid), (place.sid, inner.sid)):
                    if outer and own:
                        known[outer] = own
        for process in self.processes.values():
            for thread in process.threads:
                for space, number in zip(self.nesting.chain(process.place.space), thread.inner_tids, strict=True):
                    self.numbers[space][thread.tid] = number

    def number(self, viewer: int, pid: int) -> int:
        """What the process `viewer` calls the process, group, session or thread that is `pid` in the pod."""
        return self._number_in(self.now[viewer].pid if viewer in self.now else POD, pid, viewer)

    def _number_in(self, space: int, pid: int, viewer: int = 0) -> int:
        if space == POD:
            return pid
        known = self.numbers.setdefault(space, {})
        if pid not in known:
            if pid < FIRST_HELPER_PID:
                raise RestoreFailed(f"process {viewer} can't see {pid}, which it has to do with")
            known[pid] = next(n for n in range(FIRST_HELPER_PID, 1 << 22) if n not in known.values())
        return known[pid]

    def _numbers_of(self, space: int, pid: int) -> list[int]:
        """The pod's number of a process and those in the namespaces down to `space`, the outermost first."""
        return [pid, *(self._number_in(one, pid) for one in self.nesting.chain(space))]

    def _lend(self, space: int) -> int:
        """A number for one of our own that nobody has or will have; the plan's helpers have theirs above."""
        taken = set(self.numbers.get(space, {}).values()) | self.lent.setdefault(space, set())
        if space == POD:
            taken |= {i for p in self.places.values() for i in (p.pid, p.pgid, p.sid)}
            taken |= {thread.tid for process in self.processes.values() for thread in process.threads}
        number = next(n for n in range(FIRST_HELPER_PID - 1, 1, -1) if n not in taken)
        self.lent[space].add(number)
        return number

    def _lend_all(self, space: int) -> list[int]:
        return [self._lend(one) for one in (POD, *self.nesting.chain(space))]

    def close(self) -> None:
        """End the setters. May be called again."""
        while self.setters:
            self.setters.popitem()[1].close()

    # --- growing

    def open_all(self, body: Body) -> None:
        """Give a body that came from outside what all others will have from their parents."""
        for one in self._all():
            kind = one.kind if isinstance(one, Space) else "user"
            self._open(body, f"{self.holders[one.id]}/ns/{kind}", self.slot(one.id))

    def open_channel(self, body: Body) -> None:
        """A pair of sockets, by which process 1 can hand descriptors to those that have no rights over it."""
        if self.slots:
            place = body.put(bytes(8))
            body.do(NR.socketpair, socket.AF_UNIX, socket.SOCK_DGRAM, 0, place)
            for fd, slot in zip(struct.unpack("ii", mm.read_memory(body.tid, place, 8)), self._channel, strict=True):
                body.do(NR.dup2, fd, slot)
                body.do(NR.close, fd)

    @property
    def _channel(self) -> tuple[int, int]:
        return self.end - 4, self.end - 3

    def hand_over(self, giver: Body, fd: int, taker: Body) -> int:
        """Give a copy of a descriptor (SCM_RIGHTS, unix(7)); its number there."""
        out, back = self._channel
        place = giver.put(_message(giver.put(b""), fd))
        giver.do(NR.sendmsg, out, place, 0)
        place = taker.put(_message(taker.put(b""), 0))
        taker.do(NR.recvmsg, back, place, 0)
        (number,) = struct.unpack("i", mm.read_memory(taker.tid, place + _MESSAGE_FD, 4))
        return int(number)

    def _open(self, body: Body, path: str, slot: int) -> None:
        """Open what is below the host's /proc, at a certain number."""
        fd = body.do(NR.openat, self.proc_slot, body.put(path.encode() + b"\0"), os.O_RDONLY, 0)
        body.do(NR.dup2, fd, slot)
        body.do(NR.close, fd)

    def spawn(self, bodies: dict[int, Body], parent: int, pid: int, exit_signal: int, flags: int) -> int:
        """`parent` creates `pid`, in its pid namespace; returns the host's number.

        `flags` of clone(2): what is shared with the parent; with none of those that are in namespaces made inside.
        """
        place = self.places.get(pid)
        now = self.now.get(parent, Membership())
        space = place.space if place else now.pid
        if space == now.pid == POD and now.user == POD:
            return bodies[parent].clone(flags, exit_signal, pid)
        self.now[pid] = now if space == now.pid else msgspec.structs.replace(now, pid=space, children=space)
        if parent in self.groups:
            self.groups[pid] = self.groups[parent]
        if space == now.pid:
            return self._clone(bodies, bodies[parent], now, self._numbers_of(space, pid), 0, exit_signal)
        if place is None or not place.inner:
            raise RestoreFailed(f"process {pid} has no number in its pid namespace")
        if place.inner[-1].pid == 1:
            return self._bear_first(bodies, parent, place)
        return self._clone_into(bodies, parent, place)

    def _clone(
        self, bodies: dict[int, Body], body: Body, now: Membership, numbers: list[int], flags: int, exit_signal: int
    ) -> int:
        """One with these numbers, the pod's first."""
        if now.user == POD:
            return body.clone_numbered(flags, exit_signal, tuple(reversed(numbers)))
        for space, number in zip((POD, *self.nesting.chain(now.children)), numbers, strict=False):
            self._setter(bodies, space).set_last(number - 1)
        return body.clone_numbered(flags, exit_signal, ())

    def _setter(self, bodies: dict[int, Body], space: int) -> Setter:
        if space not in self.setters:
            first = next((p.first for p in self.nesting.pids if p.id == space), INIT)
            self.setters[space] = Setter(bodies[first].tid, tuple(reversed(self._lend_all(space))))
        return self.setters[space]

    def _clone_into(self, bodies: dict[int, Body], parent: int, place: Place) -> int:
        """By one who stays in its pid namespace, but whose children are to be in another."""
        body = bodies[parent]
        own = self.end - 2
        self._open(body, f"{body.tid}/ns/pid", own)
        self._turn_to(body, bodies, place.space)
        now = msgspec.structs.replace(self.now.get(parent, Membership()), children=place.space)
        child = self._clone(bodies, body, now, self._numbers_of(place.space, place.pid), 0, place.exit_signal)
        body.do(NR.setns, own, Clone.NEWPID)
        body.do(NR.close, own)
        return child

    def _turn_to(self, body: Body, bodies: dict[int, Body], space: int) -> None:
        """Have the body's children be in a pid namespace that has its first process."""
        first = next(p.first for p in self.nesting.pids if p.id == space)
        self._open(body, f"{bodies[first].tid}/ns/pid", self.end - 1)
        body.do(NR.setns, self.end - 1, Clone.NEWPID)
        body.do(NR.close, self.end - 1)

    def _bear_first(self, bodies: dict[int, Body], parent: int, place: Place) -> int:
        """The first process of a pid namespace, by a helper that ends at once: its brother (CLONE_PARENT)."""
        one = next((p for p in self.nesting.pids if p.id == place.space), None)
        process = self.processes.get(place.pid)
        if one is None or process is None or one.first != place.pid:
            raise RestoreFailed(f"the image has no pid namespace for process {place.pid} to be the first of")
        body, now = bodies[parent], self.now.get(parent, Membership())
        numbers = self._lend_all(now.pid)
        helper = Body(self._clone(bodies, body, now, numbers, 0, place.exit_signal), body.arena, body.family)
        creds = process.threads[0].credentials
        wanted = msgspec.structs.replace(process.member, user=one.user, pid=now.pid, children=now.pid)
        self._enter(helper, now, wanted, creds)
        self.now[place.pid] = msgspec.structs.replace(wanted, pid=place.space, children=place.space)
        self.groups[place.pid] = creds.groups
        outer = self._numbers_of(one.parent, place.pid)
        child = self._clone(bodies, helper, wanted, outer, Clone.NEWPID | Clone.PARENT, 0)
        try:
            helper.remote.call(NR.exit_group, 0)
        except TaskLost:
            ptrace.reap(helper.tid)
        body.do(NR.wait4, numbers[-1], 0, WALL, 0)
        if place.exit_signal:
            mask = body.put(struct.pack("<QQQ", 1 << (place.exit_signal - 1), 0, 0))
            body.remote.call(NR.rt_sigtimedwait, mask, 0, mask + 8, 8)
        return child

    def clone_thread(self, bodies: dict[int, Body], pid: int, flags: int, thread: Thread) -> int:
        """A thread of process `pid`; returns the host's number."""
        now = self.now.get(pid, Membership())
        if now.user == POD and now.pid == POD:
            return bodies[pid].clone(flags, 0, thread.tid)
        now = msgspec.structs.replace(now, children=now.pid)
        return self._clone(bodies, bodies[pid], now, [thread.tid, *thread.inner_tids], flags, 0)

    # --- entering

    def enter(self, bodies: dict[int, Body], process: Process) -> None:
        """Put a grown process, which has no threads yet, where it belongs."""
        pid, wanted = process.place.pid, process.member
        now = self.now.get(pid, Membership())
        if wanted == now:
            return
        body, creds = bodies[pid], process.threads[0].credentials
        if wanted.children not in (now.children, wanted.pid):
            self._turn_to(body, bodies, wanted.children)
        self._enter(body, now, wanted, creds)
        self.now[pid] = wanted
        if wanted.user != now.user:
            self.groups[pid] = creds.groups

    def _enter(self, body: Body, now: Membership, wanted: Membership, creds: Credentials) -> None:
        script = body.script()
        target = self.user(wanted.user)
        if wanted.user != now.user and target is not None:
            _bring_ids(script, self.user(now.user), target, creds)
        for kind, flag in SPACE_FLAGS.items():
            number = getattr(wanted, kind)
            if number != getattr(now, kind):
                if number == POD:
                    raise RestoreFailed(f"a process of another user namespace is in the pod's {kind} namespace again")
                script.add(NR.setns, self.slot(number), flag, name=f"setns {kind}")
        if wanted.user != now.user:
            script.add(NR.setns, self.slot(wanted.user), Clone.NEWUSER, name="setns user")
            script.add(NR.prctl, PR_SET_DUMPABLE, 1, 0, 0, 0, name="PR_SET_DUMPABLE")  # as bodies are; till the end
        body.run(script)

    def seen(self, pid: int) -> Seen | None:
        """How a process sees ids of users; None: as the pod."""
        user = self.user(self.member(pid).user)
        return Seen(user.uids, user.gids, self.groups.get(pid, ())) if user else None

    def settle(self, bodies: dict[int, Body]) -> None:
        """New processes of each pid namespace get numbers above those that were given. Its processes are all there."""
        for one in self.nesting.pids:
            if one.last_pid:
                self._setter(bodies, one.id).set_last(one.last_pid)

    def verify(self, bodies: dict[int, Body]) -> None:
        """See that all have the numbers and are where they were. Raises RestoreFailed."""
        for process in self.processes.values():
            place, body = process.place, bodies[process.place.pid]
            status = procfs.status(body.tid)
            if procfs.ns_pids(status)[1:] != [place.pid, *(inner.pid for inner in place.inner)]:
                raise RestoreFailed(f"process {place.pid} became {status['NSpid']}")
            for kind in ("user", *SPACE_FLAGS):
                number = getattr(process.member, kind)
                if number != POD and _link(body.tid, kind) != _link(self.holders[number], kind):
                    raise RestoreFailed(f"process {place.pid} is in another {kind} namespace than it was")


_MESSAGE_FD = 56 + 16 + 16  # where _message has the descriptor


def _message(address: int, fd: int) -> bytes:
    """struct msghdr, at `address`, of one byte and one descriptor; behind it iovec, cmsghdr, the byte."""
    control, byte = address + 56 + 16, address + 56 + 16 + 24 + 8
    header = struct.pack("<QQQQQQQ", 0, 0, address + 56, 1, control, 24, 0)
    iovec = struct.pack("<QQ", byte, 1)
    return header + iovec + struct.pack("<QiiQ", 20, socket.SOL_SOCKET, socket.SCM_RIGHTS, fd) + bytes(16)


def _link(pid: int, kind: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/{kind}")


def write_last_pid(body: Body, proc_slot: int, last_pid: int) -> None:
    """Have new processes of the body's pid namespace get numbers above `last_pid`.

    `proc_slot`: a /proc in the body's descriptors that isn't mounted read-only; which pid namespace is meant is told
    by who writes.
    """
    path = body.put(b"sys/kernel/ns_last_pid\0")
    fd = body.do(NR.openat, proc_slot, path, os.O_WRONLY | os.O_CLOEXEC, 0)
    text = str(last_pid).encode()
    body.do(NR.write, fd, body.put(text), len(text))
    body.do(NR.close, fd)


def _bring_ids(script: Script, now: UserNamespace | None, target: UserNamespace, creds: Credentials) -> None:
    """Before a user namespace is entered: groups, which it may not allow to set, and ids that it has no number for."""
    def translated(ranges: Ranges | None, ids: Iterable[int]) -> list[int]:
        found = [i if ranges is None else nesting.inside(ranges, i) for i in ids]
        if None in found:
            raise RestoreFailed("a process has ids that its user namespace can't have")
        return [i for i in found if i is not None]

    groups = translated(now.gids if now else None, creds.groups)
    if now is None or now.setgroups:
        place = script.put(struct.pack(f"<{len(groups)}I", *groups)) if groups else 0
        script.add(NR.setgroups, len(groups), place, name="setgroups")
    strange_users = any(nesting.inside(target.uids, i) is None for i in creds.uid)
    strange_groups = any(nesting.inside(target.gids, i) is None for i in creds.gid)
    script.add(NR.prctl, PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0, name="PR_SET_SECUREBITS")
    if strange_groups:
        script.add(NR.setresgid, *translated(now.gids if now else None, creds.gid[:3]), name="setresgid")
    if strange_users:
        script.add(NR.setresuid, *translated(now.uids if now else None, creds.uid[:3]), name="setresuid")


def nest_of(nesting_: Nesting, processes: Iterable[Process], zombies: Iterable[Zombie]) -> Nest:
    """The beginning: nothing is made, nobody is grown."""
    by_pid = {process.place.pid: process for process in processes}
    places = {pid: process.place for pid, process in by_pid.items()} | {z.place.pid: z.place for z in zombies}
    nest = Nest(nesting_, by_pid, places)
    nest.note_numbers()
    return nest
