"""In which order a process tree is grown so that parents, sessions and groups come out right.

A process gets its session from the one that creates it, at that moment; only setsid(2) changes it. So a
child in the session that its parent left must be born before the parent's setsid; an orphan in a foreign
session must be born there, by a process that then ends, so that the orphan falls to its reaper: process 1, or the
nearest subreaper above it (PR_SET_CHILD_SUBREAPER), which the wanted one is for that moment.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from podtree.errors import RestoreFailed
from podtree.image.manifest import Manifest
from podtree.objects.processes import Place
from podtree.objects.tables import clone_flags

INIT = 1
FIRST_HELPER_PID = 30_000


@dataclass(frozen=True, slots=True)
class Spawn:
    """`parent` creates `pid`, with `flags` of clone(2). Parent 0: started from outside of the pod."""

    parent: int
    pid: int
    exit_signal: int
    flags: int = 0


@dataclass(frozen=True, slots=True)
class NewSession:
    """`pid` calls setsid(2)."""

    pid: int


@dataclass(frozen=True, slots=True)
class JoinGroup:
    """`pid` calls setpgid(0, group)."""

    pid: int
    group: int


@dataclass(frozen=True, slots=True)
class EndHelper:
    """The temporary process `pid` ends; `parent` waits for it, its children fall to `reaper`, which is above it."""

    pid: int
    parent: int
    reaper: int = INIT


Step = Spawn | NewSession | JoinGroup | EndHelper


@dataclass(slots=True)
class _Planner:
    places: dict[int, Place]
    used: set[int]
    flags: Mapping[int, int] = field(default_factory=dict)  # by pid: how it is made, if not just so
    steps: list[Step] = field(default_factory=list)
    session: dict[int, int] = field(default_factory=dict)  # pid -> session at this point of the plan
    group: dict[int, int] = field(default_factory=dict)
    children: dict[int, list[Place]] = field(default_factory=dict)
    orphans: list[Place] = field(default_factory=list)
    _births: dict[int, int | None] = field(default_factory=dict)

    def spawn(self, parent: int, pid: int, exit_signal: int) -> None:
        flags = self.flags.get(pid, 0)
        if flags and parent != self.places[pid].ppid:
            raise RestoreFailed(f"no way found to have process {pid} share with its parent {self.places[pid].ppid}")
        self.steps.append(Spawn(parent, pid, exit_signal, flags))
        self.session[pid] = self.session.get(parent, 0)
        self.group[pid] = self.group.get(parent, 0)

    def new_session(self, pid: int) -> None:
        self.steps.append(NewSession(pid))
        self.session[pid] = self.group[pid] = pid

    def join(self, pid: int, group: int) -> None:
        self.steps.append(JoinGroup(pid, group))
        self.group[pid] = group

    def helper_pid(self) -> int:
        pid = FIRST_HELPER_PID
        while pid in self.used:
            pid += 1
        self.used.add(pid)
        return pid

    def birth(self, place: Place) -> int | None:
        """The session that a process has to be born in; None if any will do.

        A session leader may have been anything before its setsid; but children in a third session can only
        have been born before that, so it was born in theirs. For the first of a pid namespace such are orphans.
        """
        if place.sid != place.pid:
            return place.sid
        if place.pid not in self._births:
            wanted = {self.birth(c) for c in self.children.get(place.pid, [])} - {None, place.sid}
            early = min((w for w in wanted if w is not None), default=None)
            self._births[place.pid] = None if _is_first(place) else early
        return self._births[place.pid]

    def create(self, place: Place, creator: int) -> None:
        """`creator` makes the process, then its children are made, the early ones before its setsid."""
        self.spawn(creator, place.pid, place.exit_signal)
        inherited = self.session[place.pid]
        waiting = self.children.get(place.pid, [])
        if place.sid == place.pid:
            for child in [c for c in waiting if self.birth(c) == inherited != place.sid]:
                self.create(child, place.pid)
            self.new_session(place.pid)
        elif place.sid != inherited:
            raise RestoreFailed(f"no way found to put process {place.pid} into session {place.sid}")
        for child in waiting:
            if child.pid in self.session:
                continue
            if self.birth(child) in (place.sid, None):
                self.create(child, place.pid)
            else:
                self.orphans.append(child)

    def adopt(self) -> None:
        """Create the orphans: each in its session, through a helper that ends."""
        postponed = 0
        while self.orphans:
            orphan = self.orphans.pop(0)
            session = self.birth(orphan) or 0
            members = [pid for pid, its in self.session.items() if its == session and pid in self.places]
            if not members and session in self.places:  # its leader is an orphan itself, still to come
                postponed += 1
                if postponed > len(self.orphans) + 1:
                    raise RestoreFailed(f"no way found to put process {orphan.pid} into session {session}")
                self.orphans.append(orphan)
                continue
            postponed = 0
            same = [orphan] + [o for o in self.orphans if self.birth(o) == session]
            if members:
                same = [o for o in same if o.ppid == orphan.ppid]
                members = [m for m in members if self.places[m].space == orphan.space]
                host = next((m for m in members if self._is_above(orphan.ppid, m)), None)
                if host is None:
                    raise RestoreFailed(f"no way found to make process {orphan.pid} a child of {orphan.ppid}")
                self._bear(host, self.helper_pid(), same)
            else:
                self._found(session, same)
            self.orphans = [o for o in self.orphans if o not in same]

    def _bear(self, host: int, helper: int, orphans: list[Place]) -> None:
        """`host` makes a helper, that the orphans, which fall to their common reaper."""
        self.spawn(host, helper, 0)
        for one in orphans:
            self.create(one, helper)
        self.steps.append(EndHelper(helper, host, orphans[0].ppid))

    def _found(self, session: int, orphans: list[Place]) -> None:
        """A session of which only orphans are left: a helper leads it, below all their reapers."""
        reapers = sorted({o.ppid for o in orphans}, key=self._depth)
        lowest = reapers.pop()
        self.spawn(lowest, session, 0)
        self.new_session(session)
        for reaper in reapers:
            if not self._is_above(reaper, lowest):
                raise RestoreFailed(f"session {session} has orphans of processes {reaper} and {lowest}")
            self._bear(session, self.helper_pid(), [o for o in orphans if o.ppid == reaper])
        for one in orphans:
            if one.ppid == lowest:
                self.create(one, session)
        self.steps.append(EndHelper(session, lowest, lowest))

    def _is_above(self, ancestor: int, pid: int) -> bool:
        """Whether `pid` is `ancestor` or descends from it; process 1 takes in those from outside, too."""
        while pid not in (ancestor, 0) and ancestor != INIT:
            pid = self.places[pid].ppid
        return pid == ancestor or ancestor == INIT

    def _depth(self, pid: int) -> int:
        depth = 0
        while pid in self.places and depth <= len(self.places):
            pid, depth = self.places[pid].ppid, depth + 1
        return depth

    def groups(self) -> None:
        """Process groups: leaders first. A group without its leader needs somebody to found it and to stay in it
        until all have joined: a helper with the number, or the leader itself, if it lives in another group now."""
        for pid, place in self.places.items():
            if place.pgid == pid and self.group[pid] != pid:
                self.join(pid, pid)
        existing = {self.group[pid] for pid in self.places}
        missing = {p.pgid: p for p in self.places.values() if p.pgid and p.pgid not in existing}
        keepers: list[tuple[int, int]] = []
        for group, member in missing.items():
            creator = self._member_of_session(member.sid, member.space)
            if group in self.places:
                keepers.append(self._keeper(group))  # of the group that the leader leaves for a moment
                self.join(group, group)
                keepers.append(self._keeper(group))
            else:
                self.spawn(creator, group, 0)
                self.join(group, group)
                keepers.append((group, creator))
        for pid, place in self.places.items():
            if place.pgid and self.group[pid] != place.pgid:
                self.join(pid, place.pgid)
        for helper, creator in keepers:
            self.steps.append(EndHelper(helper, creator))

    def _keeper(self, creator: int) -> tuple[int, int]:
        """A helper in the process group that `creator` is in."""
        helper = self.helper_pid()
        self.spawn(creator, helper, 0)
        return helper, creator

    def _member_of_session(self, sid: int, space: int) -> int:
        """One of the session, in the pid namespace in which the group has a number."""
        for pid, place in self.places.items():
            if place.sid == sid and place.space == space:
                return pid
        raise RestoreFailed(f"no process of session {sid}")


def _is_first(place: Place) -> bool:
    """Whether orphans of a pid namespace fall to it."""
    return place.pid == INIT or (bool(place.inner) and place.inner[-1].pid == INIT)


@contextlib.contextmanager
def _room_to_recurse(depth: int) -> Iterator[None]:
    """A tree may be a chain of as many generations as there are processes."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, 1000 + 8 * depth))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def plan_image(manifest: Manifest) -> list[Step]:
    """Steps that grow the tree of an image, zombies included. Raises as `plan_tree`."""
    places = [p.place for p in manifest.processes] + [z.place for z in manifest.zombies]
    return plan_tree(places, {p.place.pid: clone_flags(p.shared) for p in manifest.processes})


def plan_tree(places: Iterable[Place], flags: Mapping[int, int] | None = None) -> list[Step]:
    """Steps that grow the whole tree. `flags`: of clone(2), by which its parent makes a process, if there are any.

    Raises RestoreFailed for a tree that can't exist.
    Places come from an image, which may be hostile: cycles and missing parents are found here.
    """
    by_pid = {p.pid: p for p in sorted(places, key=lambda p: p.pid)}
    if 1 not in by_pid:
        raise RestoreFailed("the image has no process 1")
    used = set(by_pid) | {p.sid for p in by_pid.values()} | {p.pgid for p in by_pid.values()}
    planner = _Planner(by_pid, used, flags or {})
    for place in by_pid.values():
        if place.ppid and place.ppid not in by_pid:
            raise RestoreFailed(f"process {place.pid} has a parent {place.ppid} that is not in the image")
        planner.children.setdefault(place.ppid, []).append(place)
    with _room_to_recurse(len(by_pid)):
        for root in planner.children.get(0, []):
            planner.create(root, 0)
        planner.adopt()
    if set(by_pid) - set(planner.session):
        raise RestoreFailed("the process tree of the image has a cycle")
    planner.groups()
    return planner.steps


def describe(steps: Iterable[Step]) -> Iterator[str]:
    """One line per step, for people."""
    for step in steps:
        match step:
            case Spawn(parent, pid, _, flags):
                yield f"{parent or 'outside'} creates {pid}" + (f", sharing tables ({flags:#x})" if flags else "")
            case NewSession(pid):
                yield f"{pid} becomes a session leader"
            case JoinGroup(pid, group):
                yield f"{pid} joins process group {group}"
            case EndHelper(pid, parent, reaper):
                yield f"helper {pid} ends, {parent} reaps it, {reaper} adopts its children"
