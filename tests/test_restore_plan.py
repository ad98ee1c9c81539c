"""The order in which process trees are grown: simulated by the kernel's rules, without a process."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podtree.errors import RestoreFailed
from podtree.objects.processes import Place
from podtree.restore.plan import EndHelper, JoinGroup, NewSession, Spawn, Step, describe, plan_tree


def place(pid: int, ppid: int, sid: int, pgid: int | None = None) -> Place:
    return Place(pid=pid, ppid=ppid, pgid=sid if pgid is None else pgid, sid=sid, exit_signal=17)


class Kernel:
    """What fork, setsid, setpgid and exit do to a process tree (credentials(7), setpgid(2))."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}
        self.sid: dict[int, int] = {}
        self.pgid: dict[int, int] = {}
        self.subreapers: set[int] = set()

    def above(self, pid: int) -> list[int]:
        """The ancestors of a process inside of the pod, the nearest first."""
        found = []
        while pid := self.parent[pid]:
            found.append(pid)
        return found

    def reaper(self, pid: int) -> int:
        """Who adopts the children of a process that ends."""
        return next((one for one in self.above(pid) if one in self.subreapers), 1)

    def used(self) -> set[int]:
        return set(self.parent) | set(self.sid.values()) | set(self.pgid.values())

    def run(self, step: Step) -> None:
        match step:
            case Spawn(parent, pid, _):
                assert pid not in self.used() - {0}, f"pid {pid} is taken"
                self.parent[pid] = parent
                self.sid[pid], self.pgid[pid] = self.sid.get(parent, 0), self.pgid.get(parent, 0)
            case NewSession(pid):
                assert pid not in self.pgid.values(), "setsid by a group leader"
                self.sid[pid] = self.pgid[pid] = pid
            case JoinGroup(pid, group):
                assert self.sid[pid] != pid or group == pid, "a session leader stays in its group"
                if group != pid:
                    members = [p for p, g in self.pgid.items() if g == group]
                    assert any(self.sid[p] == self.sid[pid] for p in members), "no such group in the session"
                self.pgid[pid] = group
            case EndHelper(pid, parent, reaper):
                assert self.parent[pid] == parent
                assert reaper in (1, *self.above(pid)), "who adopts is above"
                self.subreapers.discard(pid)
                del self.parent[pid], self.sid[pid], self.pgid[pid]
                for child, its in self.parent.items():
                    if its == pid:
                        self.parent[child] = reaper


def grow(places: list[Place]) -> None:
    kernel = Kernel()
    for step in plan_tree(places):
        kernel.run(step)
    for p in places:
        assert (kernel.parent[p.pid], kernel.sid[p.pid], kernel.pgid[p.pid]) == (p.ppid, p.sid, p.pgid), p
    assert set(kernel.parent) == {p.pid for p in places}


def test_shell_with_a_pipeline() -> None:
    grow([place(1, 0, 1), place(5, 1, 1, 5), place(6, 1, 1, 5), place(7, 1, 1, 5)])


def test_daemon_whose_session_leader_is_gone() -> None:
    grow([place(1, 0, 1), place(5, 1, 4)])


def test_two_orphans_of_one_dead_session_in_different_groups() -> None:
    grow([place(1, 0, 1), place(5, 1, 4), place(6, 1, 4, 6), place(8, 1, 4, 7), place(9, 8, 4, 7)])


def test_orphan_in_a_living_foreign_session() -> None:
    grow([place(1, 0, 1), place(3, 1, 3), place(7, 1, 3)])


def test_child_born_before_its_parents_setsid() -> None:
    grow([place(1, 0, 1), place(3, 1, 3), place(4, 3, 1)])


def test_group_whose_leader_is_gone() -> None:
    grow([place(1, 0, 1), place(6, 1, 1, 5), place(7, 1, 1, 5)])


def test_group_whose_leader_lives_in_another_group() -> None:
    grow([place(1, 0, 1), place(2, 1, 1), place(9, 2, 1, 2)])
    grow([place(1, 0, 1), place(2, 1, 1, 3), place(3, 1, 1, 2)])


def test_orphan_of_a_subreaper_in_an_ended_session() -> None:
    grow([place(1, 0, 1), place(2, 1, 1), place(5, 2, 4)])


def test_orphans_of_one_ended_session_with_different_reapers() -> None:
    grow([place(1, 0, 1), place(2, 1, 1), place(3, 2, 1), place(5, 2, 4), place(6, 3, 4), place(7, 1, 4)])


def test_process_from_outside() -> None:
    grow([place(1, 0, 1), place(9, 0, 9), place(10, 9, 9)])


@pytest.mark.parametrize(
    "places",
    [
        [],
        [place(2, 0, 2)],
        [place(1, 0, 1), place(3, 99, 1)],
        [place(1, 0, 1), place(3, 4, 1), place(4, 3, 1)],
    ],
)
def test_impossible_trees_are_refused(places: list[Place]) -> None:
    with pytest.raises(RestoreFailed):
        plan_tree(places)


def test_a_plan_can_be_read() -> None:
    lines = list(describe(plan_tree([place(1, 0, 1), place(5, 1, 4)])))
    assert lines[0] == "outside creates 1"
    assert "4 becomes a session leader" in lines


def test_a_chain_of_many_generations() -> None:
    """Deeper than Python recurses by default."""
    chain = [place(1, 0, 1), *(place(pid, pid - 1, 1) for pid in range(2, 5001))]
    assert len(plan_tree(chain)) == 5001
    assert len(plan_tree([place(1, 0, 1), *(place(pid, pid - 1, pid) for pid in range(2, 5001))])) == 2 * 5000


@st.composite
def histories(draw: st.DrawFn) -> list[Place]:
    """A tree as a random run of fork, setsid, setpgid and exit leaves it."""
    kernel = Kernel()
    kernel.run(Spawn(0, 1, 17))
    kernel.run(NewSession(1))
    following = 2
    for _ in range(draw(st.integers(0, 30))):
        pid = draw(st.sampled_from(sorted(kernel.parent)))
        action = draw(st.sampled_from(["fork", "fork", "fork", "setsid", "group", "exit", "subreaper"]))
        if action == "fork":
            kernel.run(Spawn(pid, following, 17))
            following += 1
        elif action == "setsid" and pid not in kernel.pgid.values():
            kernel.run(NewSession(pid))
        elif action == "group" and kernel.sid[pid] != pid:
            groups = {g for p, g in kernel.pgid.items() if kernel.sid[p] == kernel.sid[pid]} | {pid}
            group = draw(st.sampled_from(sorted(groups)))
            if group != pid or pid not in kernel.pgid.values():
                kernel.run(JoinGroup(pid, group))
        elif action == "exit" and pid != 1:
            kernel.run(EndHelper(pid, kernel.parent[pid], kernel.reaper(pid)))
        elif action == "subreaper":
            kernel.subreapers.add(pid)
    return [
        Place(pid=p, ppid=kernel.parent[p], pgid=kernel.pgid[p], sid=kernel.sid[p], exit_signal=17)
        for p in kernel.parent
    ]


@settings(max_examples=400, deadline=None)
@given(histories())
def test_whatever_history_leaves_can_be_grown(places: list[Place]) -> None:
    grow(places)


def test_sharing_with_the_parent() -> None:
    """Who shares with its parent is made by it, by the flags of clone(2); where that can't be, the plan is refused."""
    steps = plan_tree([place(1, 0, 1), place(5, 1, 5), place(6, 5, 5)], {6: 0x100})
    assert [step for step in steps if isinstance(step, Spawn) and step.pid == 6] == [Spawn(5, 6, 17, 0x100)]
    with pytest.raises(RestoreFailed, match="share"):  # an orphan in a foreign session, made by a helper
        plan_tree([place(1, 0, 1), place(5, 1, 5), place(6, 1, 5)], {6: 0x400})
