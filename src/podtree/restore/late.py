"""Open files that are of tasks, and can only be made when those are there.

The pod's first process makes each, once, and puts it into its slot, where the builder has left something else; the
others get theirs from it (pidfd_getfd(2)). All this before any process takes its own descriptor numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from podtree.errors import Damaged
from podtree.kernel.pidfd import PIDFD_THREAD
from podtree.kernel.sys import NR
from podtree.objects.descriptors import OpenFile
from podtree.objects.pidfd import PidFd
from podtree.restore.arena import Body
from podtree.restore.tree import Tree

NONBLOCK = 0o4000  # PIDFD_NONBLOCK is O_NONBLOCK


class LateFiles:
    """Those of one image."""

    def __init__(self, files: Iterable[OpenFile], tree: Tree, slot_base: int) -> None:
        self.tree = tree
        self.slot_base = slot_base
        self.pidfds = [(file.id, file.flags, file.what) for file in files if isinstance(file.what, PidFd)]

    def make(self, task_exists: Callable[[int], bool]) -> None:
        """Make all, in process 1's slots. `task_exists(id)`: whether a process or thread has that id. Raises
        RestoreFailed or Damaged."""
        ended: dict[str, list[tuple[int, int, PidFd]]] = {}
        for number, flags, state in self.pidfds:
            if not state.pid:
                ended.setdefault(state.key, []).append((number, flags, state))
            elif task_exists(state.pid):
                self._make_pidfd(number, flags, state, state.pid)
            else:
                raise Damaged(f"the image has a pidfd of process {state.pid}, which is not in it")
        for group in ended.values():
            with self.tree.passing(group[0][2].status) as pid:
                for number, flags, state in group:
                    self._make_pidfd(number, flags, state, pid)

    def _make_pidfd(self, number: int, flags: int, state: PidFd, pid: int) -> None:
        wanted = flags & NONBLOCK | (PIDFD_THREAD if state.thread else 0)
        body = self.tree.bodies[1]
        self._place(body, number, body.do(NR.pidfd_open, pid, wanted))

    def _place(self, body: Body, number: int, fd: int) -> None:
        body.do(NR.dup2, fd, self.slot_base + number)
        body.do(NR.close, fd)

    def hand_out(self, needed: Callable[[int], Collection[int]]) -> None:
        """Give every process those that it needs: `needed(pid)` are the ids of OpenFiles."""
        late = {number for number, _, _ in self.pidfds}
        for pid, body in self.tree.bodies.items():
            wanted = late & set(needed(pid))
            if pid == 1 or not wanted:
                continue
            first = body.do(NR.pidfd_open, 1, 0)
            for number in sorted(wanted):
                self._place(body, number, body.do(NR.pidfd_getfd, first, self.slot_base + number, 0))
            body.do(NR.close, first)
