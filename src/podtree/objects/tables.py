"""Tables that tasks can have in common: address space, descriptors, directories, signal actions, SEM_UNDO.

Threads have all of them in common as a rule, but may have descriptors, directories and SEM_UNDO for themselves. A
process can have any of them in common with the one that made it (clone(2): CLONE_VM and so on). Each is an object of
its own: it is saved once, with its owner, the first that had it. kcmp(2) tells which are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from podtree.kernel import kcmp, procfs
from podtree.kernel.sys import NR
from podtree.script.task import Script

if TYPE_CHECKING:
    from podtree.objects.context import CollectContext, FrozenProcess, FrozenTask

#: By field of SharedTables: what kcmp(2) calls it, the flag of clone(2), and its name for people.
KINDS = {
    "memory": (kcmp.KCMP_VM, 0x100, "address space (CLONE_VM)"),
    "files": (kcmp.KCMP_FILES, 0x400, "descriptor table (CLONE_FILES)"),
    "directories": (kcmp.KCMP_FS, 0x200, "working directory and root (CLONE_FS)"),
    "actions": (kcmp.KCMP_SIGHAND, 0x800, "signal actions (CLONE_SIGHAND)"),
    "undo": (kcmp.KCMP_SYSVSEM, 0x40000, "adjustments of semaphores (CLONE_SYSVSEM)"),
}
OF_THREADS = ("files", "directories", "undo")  # threads of one process may differ in these


class SharedTables(msgspec.Struct, frozen=True, kw_only=True):
    """The tables that a process has in common with others, each by its owner's pid; 0: it is the owner itself."""

    memory: int = 0
    files: int = 0
    directories: int = 0
    actions: int = 0
    undo: int = 0


class Directories(msgspec.Struct, frozen=True, kw_only=True):
    """Working directory and root (OpenFile ids; root -1: the pod's own), umask."""

    cwd: int
    root: int
    umask: int


@dataclass(slots=True)
class Sharing:
    """Of a frozen pod. `shared`: by pid, only processes that share. `own`: by inner tid, which tables (of OF_THREADS)
    a thread has for itself.
    """

    shared: dict[int, SharedTables] = field(default_factory=dict)
    own: dict[int, set[str]] = field(default_factory=dict)

    def of(self, pid: int) -> SharedTables:
        """What a process has in common with others."""
        return self.shared.get(pid, SharedTables())


_Holder: TypeAlias = "tuple[FrozenProcess, FrozenTask]"


def collect(processes: list[FrozenProcess], ctx: CollectContext) -> Sharing:
    """Who shares what; what can't be made so again goes to `ctx`."""
    living = [process for process in processes if not process.zombie]
    sharing = Sharing()
    for name, (kind, _, title) in KINDS.items():
        holders: list[_Holder] = [(process, process.first) for process in living]
        for process, task in _own_tables(living, kind) if name in OF_THREADS else ():
            sharing.own.setdefault(task.inner_tid, set()).add(name)
            holders.append((process, task))
        if name == "undo":
            holders = [(p, t) for p, t in holders if kcmp.has_undo_list(t.tid)]
        for group in _groups(holders, kind):
            _note_group(group, name, title, sharing, ctx)
    return sharing


def _own_tables(living: list[FrozenProcess], kind: int) -> Iterator[_Holder]:
    for process in living:
        for task in process.tasks[1:]:
            if kcmp.compare_tasks(process.living, task.tid, kind) != 0:
                yield process, task


def _groups(holders: list[_Holder], kind: int) -> Iterator[list[_Holder]]:
    """Those that have the same table: sort by kcmp(2)'s order, then compare neighbours."""

    def order(a: _Holder, b: _Holder) -> int:
        return kcmp.compare_tasks(a[1].tid, b[1].tid, kind)

    group: list[_Holder] = []
    for holder in sorted(holders, key=functools.cmp_to_key(order)):
        if group and order(group[0], holder) != 0:
            if len(group) > 1:
                yield group
            group = []
        group.append(holder)
    if len(group) > 1:
        yield group


def _note_group(group: list[_Holder], name: str, title: str, sharing: Sharing, ctx: CollectContext) -> None:
    group.sort(key=lambda holder: (holder[0].pid, holder[1].inner_tid))
    threads = [(p, t) for p, t in group if t is not p.first]
    if threads:
        (process, task), other = threads[0], next(t for _, t in group if t is not threads[0][1])
        reason = f"is shared with thread {other.inner_tid}, but not with the other threads of the process"
        ctx.refuse(process, f"{title} of thread {task.inner_tid}", reason)
        return
    members = {process.host_pid: process for process, _ in group}
    made_by = {process.host_pid: members.get(procfs.stat(process.host_pid).ppid) for process, _ in group}
    owners = [members[host] for host, parent in made_by.items() if parent is None]
    for stranger in owners[1:]:
        ctx.refuse(stranger, title, f"is shared with process {owners[0].pid}, which isn't its parent")
    for process, _ in group:
        if process is not owners[0]:
            known = sharing.of(process.pid)
            sharing.shared[process.pid] = msgspec.structs.replace(known, **{name: owners[0].pid})


def clone_flags(shared: SharedTables) -> int:
    """The flags of clone(2) by which its parent makes a process that shares so."""
    return sum(flag for name, (_, flag, _) in KINDS.items() if getattr(shared, name))


def thread_flags(own: set[str]) -> int:
    """The flags of clone(2) that a thread is made without if it has tables for itself."""
    return sum(KINDS[name][1] for name in own)


def restore_directories(
    state: Directories, script: Script, slot_base: int, settled: Collection[int] = ()
) -> None:
    """Add the calls by which a task goes where it was; `settled`: directories (OpenFile.id) that it is in already."""
    if state.root >= 0 and state.root not in settled:
        script.add(NR.fchdir, slot_base + state.root, name="fchdir to the root")
        script.add(NR.chroot, script.put(b".\0"), name="chroot")
    if state.cwd not in settled:
        script.add(NR.fchdir, slot_base + state.cwd, name="fchdir")
    script.add(NR.umask, state.umask)
