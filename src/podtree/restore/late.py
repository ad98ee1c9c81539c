"""Open files that are of tasks, and can only be made when those are there: pidfds, files of /proc.

The pod's first process makes each, once, and puts it into its slot, where the builder has left something else; the
others get theirs from it (pidfd_getfd(2)). All this before any process takes its own descriptor numbers.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from podtree.errors import Damaged
from podtree.kernel import caps, mm
from podtree.kernel.caps import Cap
from podtree.kernel.mount import AT_FDCWD, Resolve
from podtree.kernel.namespaces import Clone
from podtree.kernel.pidfd import PIDFD_THREAD
from podtree.kernel.sys import NR
from podtree.objects import kinds, nsfiles, procfiles
from podtree.objects.descriptors import OpenFile
from podtree.objects.files import OPEN_FLAGS
from podtree.objects.nesting import POD
from podtree.objects.nsfiles import NamespaceFile
from podtree.objects.pidfd import PidFd
from podtree.objects.processes import PR_SET_DUMPABLE, Process
from podtree.objects.procfiles import ProcFile
from podtree.restore.arena import Body
from podtree.restore.tree import Tree


class LateFiles:
    """Those of one image. `capabilities`: the mask of what a pod's own processes may have."""

    def __init__(self, files: Iterable[OpenFile], tree: Tree, slot_base: int, capabilities: int) -> None:
        self.tree = tree
        self.slot_base = slot_base
        self.capabilities = capabilities
        self.files = [file for file in files if isinstance(file.what, kinds.LATE)]

    def make(self, task_exists: Callable[[int], bool]) -> None:
        """Make all, in process 1's slots. `task_exists(id)`: whether a process or thread has that id. Raises
        RestoreFailed or Damaged."""
        ended: dict[Any, list[OpenFile]] = {}
        for file in self.files:
            match file.what:
                case PidFd(pid=0):
                    ended.setdefault(file.what.key, []).append(file)
                case ProcFile(gone=pid) if pid:
                    ended.setdefault(pid, []).append(file)
                case PidFd(pid=pid):
                    if not task_exists(pid):
                        raise Damaged(f"the image has a pidfd of process {pid}, which is not in it")
                    self._make(file, pid)
                case _:
                    self._make(file, 0)
        for group in ended.values():
            what = group[0].what
            status = what.status if isinstance(what, PidFd) else 0
            with self.tree.passing(status, what.gone if isinstance(what, ProcFile) else 0) as pid:
                for file in group:
                    self._make(file, pid)

    def _make(self, file: OpenFile, pid: int) -> None:
        """Make one. `pid`: whose it is, for what tells it by a number that may be another than before."""
        body = self.tree.bodies[1]
        match file.what:
            case PidFd(thread=thread):
                wanted = file.flags & os.O_NONBLOCK | (PIDFD_THREAD if thread else 0)
                fd = body.do(NR.pidfd_open, pid, wanted)
            case ProcFile():
                fd = self._open_proc(body, file, procfiles.path_of(file.what, pid))
            case NamespaceFile():
                fd = body.do(NR.openat, AT_FDCWD, body.put(nsfiles.path_of(file.what) + b"\0"), os.O_RDONLY, 0)
            case _:
                raise AssertionError(file.what)
        self._place(body, file.id, fd)

    def _open_proc(self, body: Body, file: OpenFile, path: bytes) -> int:
        """No link is followed, whatever the image says: those of /proc lead anywhere.

        It is opened with the capabilities of a pod. Many files of /proc look at those of who opened them, then or for
        as long as they are open: /proc/kmsg, kernel addresses in /proc/kallsyms, physical ones in /proc/PID/pagemap.
        CAP_SYS_PTRACE comes in addition, since the tasks themselves still have all.
        """
        how = struct.pack("<QQQ", file.flags & OPEN_FLAGS, 0, Resolve.NO_SYMLINKS)
        with _effective(body, self.capabilities | 1 << Cap.SYS_PTRACE):
            place = body.put(how + path + b"\0")
            fd = body.do(NR.openat2, AT_FDCWD, place + len(how), place, len(how))
        if file.pos:
            body.do(NR.lseek, fd, file.pos, os.SEEK_SET)
        return fd

    def _place(self, body: Body, number: int, fd: int) -> None:
        body.do(NR.dup2, fd, self.slot_base + number)
        body.do(NR.close, fd)

    def change_directory(self, number: int, process: Process, *, root: bool) -> None:
        """Put a process into a directory of /proc whose task has ended: it can be entered only while there is one.

        Such a directory may look at who enters it, so the passing task goes into the process's user namespace first.
        """
        file = next(file for file in self.files if file.id == number)
        nest, body, first = self.tree.nest, self.tree.bodies[process.place.pid], self.tree.bodies[1]
        assert isinstance(file.what, ProcFile)
        with self.tree.passing(0, file.what.gone) as pid:
            self._make(file, pid)
            if process.member.user != POD:
                self.tree.passer.do(NR.setns, nest.slot(process.member.user), Clone.NEWUSER)
                self.tree.passer.do(NR.prctl, PR_SET_DUMPABLE, 1, 0, 0, 0)
            fd = nest.hand_over(first, self.slot_base + number, body) if body is not first else self.slot_base + number
            body.do(NR.fchdir, fd)
            if root:
                body.do(NR.chroot, body.put(b".\0"))
            if body is not first:
                body.do(NR.close, fd)

    def hand_out(self, needed: Iterable[tuple[Body, Collection[int], bool]]) -> None:
        """Give every descriptor table those that it needs, by a task that has it: the ids of OpenFiles.

        The third says whether that task has no rights over process 1.
        """
        late = {file.id for file in self.files}
        for body, ids, apart in needed:
            wanted = late.intersection(ids)
            if body is self.tree.bodies[1] or not wanted:
                continue
            if apart:
                for number in sorted(wanted):
                    fd = self.tree.nest.hand_over(self.tree.bodies[1], self.slot_base + number, body)
                    self._place(body, number, fd)
                continue
            first = body.do(NR.pidfd_open, 1, 0)
            for number in sorted(wanted):
                self._place(body, number, body.do(NR.pidfd_getfd, first, self.slot_base + number, 0))
            body.do(NR.close, first)


@contextlib.contextmanager
def _effective(body: Body, mask: int) -> Iterator[None]:
    """Scope in which a task has no capabilities but these in effect."""
    place = body.put(caps.HEADER + bytes(caps.DATA_SIZE))
    sets = place + len(caps.HEADER)
    body.do(NR.capget, place, sets)
    whole = mm.read_memory(body.tid, sets, caps.DATA_SIZE)
    effective, permitted, inheritable = caps.unpack(whole)
    mm.write_memory(body.tid, sets, caps.pack(effective & mask, permitted, inheritable))
    body.do(NR.capset, place, sets)
    try:
        yield
    finally:
        place = body.put(caps.HEADER + whole)
        body.do(NR.capset, place, place + len(caps.HEADER))
