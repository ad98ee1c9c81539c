"""Open files and directories of /proc: of the pod's tasks, of ended ones (which give ESRCH), of the system.

They are views of the kernel, so what is saved is which one, and how far it has been read. They are opened again when
the tasks are there (see podtree.restore.late), by the pod's first process. proc(5).
"""

from __future__ import annotations

import os
import re
import stat

import msgspec

from podtree.errors import Damaged
from podtree.objects.context import CollectContext
from podtree.objects.held import Held, PodView, former_name, path_bytes, path_text

_OF_TASK = re.compile(rb"/proc/(\d+)(/.*)?", re.DOTALL)
_TASK = re.compile(rb"^/task/\d+")


class ProcFile(msgspec.Struct, frozen=True, tag="proc"):
    """`path` of the pod; `kind` is its S_IFMT. `gone`: the number of the process in it, which has ended."""

    path: str
    kind: int
    gone: int = 0


def collect(held: Held, ctx: CollectContext, view: PodView) -> ProcFile | None:
    """State of what was opened in the pod's /proc; None when refused."""
    name = view.current_name(held)
    if name is not None:
        return ProcFile(path_text(name), held.kind)
    name = former_name(held.link)
    match = _OF_TASK.fullmatch(name)
    if not match:
        held.refuse(ctx, "it can't be reached by its path", "a mount may lie over it")
        return None
    inner = match[2] or b""
    if inner.startswith(b"/net/"):  # of the network namespace, whoever it was opened by
        return ProcFile(path_text(b"/proc/1" + inner), held.kind)
    return ProcFile(path_text(name), held.kind, gone=int(match[1]))


def path_of(state: ProcFile, pid: int = 0) -> bytes:
    """The path to open it by; of what has gone, as a file of process `pid`. Raises Damaged."""
    path = path_bytes(state.path)
    if path != b"/proc" and not path.startswith(b"/proc/"):
        raise Damaged(f"the image has an impossible path in /proc: {state.path!r}")
    if not state.gone:
        return path
    match = _OF_TASK.fullmatch(path)
    if not match:
        raise Damaged(f"the image has an impossible path of a process: {state.path!r}")
    return b"/proc/%d" % pid + _TASK.sub(b"/task/%d" % pid, match[2] or b"")


def restore(flags: int) -> int:
    """What keeps the slot until the tasks are there: opened for the same, reading or writing or both."""
    return os.open("/dev/null", flags & os.O_ACCMODE | os.O_CLOEXEC)


def is_one(held: Held, view: PodView) -> bool:
    """Whether it is of a mount of /proc in the pod."""
    where = view.mount_of(held)
    return where is not None and where.fstype == "proc" and held.kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)
