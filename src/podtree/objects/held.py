"""What the descriptor collectors share: one open file description as held during a checkpoint, and the pod's paths.

Paths go into images as text: `path_text` and `path_bytes` convert, also for names that are no UTF-8.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from podtree.errors import Damaged
from podtree.kernel import mount, procfs
from podtree.kernel.fdinfo import FdInfo
from podtree.kernel.mountinfo import Mount, mounts_of
from podtree.objects import external
from podtree.objects.context import CollectContext, FrozenProcess
from podtree.objects.external import Policy

TREE_ROOT = "."  # a tree's own root, where paths are relative to it
DELETED = b" (deleted)"  # what d_path() puts after the name of an unlinked file

#: File systems whose files are views of the kernel: their state is not in any volume.
PSEUDO = frozenset(
    {"proc", "sysfs", "cgroup", "cgroup2", "devpts", "mqueue", "debugfs", "tracefs", "securityfs", "bpf", "configfs"}
    | {"pstore", "efivarfs", "fusectl", "hugetlbfs", "binfmt_misc", "nsfs", "selinuxfs"}
)


_INSIDE = mount.Resolve.IN_ROOT | mount.Resolve.NO_MAGICLINKS


def path_text(path: bytes) -> str:
    """A path as text for the image; one that is no UTF-8 becomes NUL and hex digits (no path has a NUL)."""
    try:
        return path.decode()
    except UnicodeDecodeError:
        return "\0" + path.hex()


def path_bytes(text: str) -> bytes:
    """The inverse of path_text; Damaged if the text can't come from it."""
    try:
        path = bytes.fromhex(text[1:]) if text.startswith("\0") else text.encode()
    except ValueError as error:
        raise Damaged(f"the image has an impossible path: {text!r}") from error
    if b"\0" in path or not path:
        raise Damaged(f"the image has an impossible path: {text!r}")
    return path


#: The memory file systems that a pod has for itself (podtree.pod.containment mounts them), by mount point. Its programs
#: can't mount any; one elsewhere is a directory of the host, shown by -v.
OWN_TMPFS = ("/dev", "/dev/shm")
OWN_MQUEUE = "/dev/mqueue"


def walk(base: bytes, device: int) -> Iterator[tuple[bytes, os.stat_result]]:
    """(relative path, lstat) of a directory and everything below it on the same file system, parents first."""
    yield TREE_ROOT.encode(), os.stat(base)
    pending = [b""]
    while pending:
        directory = pending.pop()
        below = []
        for name in sorted(os.listdir(base + directory)):
            path = os.path.join(directory, name)
            st = os.lstat(base + path)
            if st.st_dev != device:
                continue
            yield path, st
            if stat.S_ISDIR(st.st_mode):
                below.append(path)
        pending += reversed(below)


def open_in(root: int, path: bytes) -> int:
    """An O_PATH descriptor of what `path` names where `root` is "/"; a symbolic link at its end is not followed."""
    resolve = mount.Resolve.IN_ROOT | mount.Resolve.NO_MAGICLINKS
    return mount.openat2(root, os.fsdecode(path.lstrip(b"/") or b"."), os.O_PATH | os.O_NOFOLLOW, resolve)


@dataclass(slots=True, eq=False)
class Held:
    """One open file description of the pod, and the supervisor's duplicate of it."""

    id: int
    fd: int  # the supervisor's duplicate
    link: bytes  # what /proc/PID/fd/N says
    stat: os.stat_result
    info: FdInfo
    flags: int  # F_GETFL
    display: str  # for problems: "fd 7 (/tmp/x)"
    process: FrozenProcess | None  # the first process seen with it
    number: int  # its descriptor number there; -1 for what the engine opened itself
    holders: list[tuple[FrozenProcess, int]] = field(default_factory=list)

    @property
    def inode(self) -> tuple[int, int]:
        return self.stat.st_dev, self.stat.st_ino

    @property
    def kind(self) -> int:
        """S_IFMT of its mode; 0 for anonymous inodes."""
        return stat.S_IFMT(self.stat.st_mode)

    @property
    def access(self) -> int:
        return self.flags & os.O_ACCMODE

    @property
    def readable(self) -> bool:
        return self.access in (os.O_RDONLY, os.O_RDWR) and not self.flags & os.O_PATH

    @property
    def writable(self) -> bool:
        return self.access in (os.O_WRONLY, os.O_RDWR) and not self.flags & os.O_PATH

    def refuse(self, ctx: CollectContext, reason: str, hint: str = "") -> None:
        """Name it as what can't be saved."""
        ctx.refuse(self.process, self.display, reason, hint)

    def external(self, ctx: CollectContext, reason: str, *, keep: str = "", close: str = "") -> Policy:
        """What is done with it, which is shared with the outside of the pod: see external.settle."""
        return external.settle(
            ctx.external, lambda why, hint: self.refuse(ctx, why, hint), reason, keep=keep, close=close
        )


class PodView:
    """The pod's mounts and paths, seen from outside while it is frozen."""

    def __init__(self, ctx: CollectContext) -> None:
        first = next(p.living for p in ctx.processes if not p.zombie)
        self.mounts = mounts_of(first)
        self.volume_device = os.fstat(ctx.root_fd).st_dev
        self._shown = ctx.shown
        self.root = os.open(f"/proc/{first}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._found: dict[bytes, os.stat_result | None] = {}  # nothing moves while the pod is frozen
        self._tmpfs_names: dict[int, dict[int, bytes]] = {}  # device -> inode -> a path
        self.log: tuple[int, int] | None = None
        with contextlib.suppress(FileNotFoundError):
            log = ctx.log_path.stat()
            self.log = log.st_dev, log.st_ino

    def close(self) -> None:
        """Let go of the pod's root. May be called again."""
        if self.root >= 0:
            os.close(self.root)
            self.root = -1

    def mount_of(self, held: Held) -> Mount | None:
        """The mount that it was opened through; None when that is not in the pod's mount namespace."""
        return self.mounts.get(held.info.mount_id)

    def on_volume(self, where: Mount | None) -> bool:
        return where is not None and where.device == self.volume_device

    def on_own_tmpfs(self, where: Mount | None) -> bool:
        """A tmpfs that is the pod's alone, not one of the host that is shown by -v."""
        return where is not None and where.fstype == "tmpfs" and os.fsdecode(where.point) in OWN_TMPFS

    def shown(self, where: Mount | None) -> bool:
        """A place of the host's that `-v` shows."""
        return where is not None and any(where.point == p or where.point.startswith(p + b"/") for p in self._shown)

    def lookup(self, path: bytes) -> os.stat_result | None:
        """What is at an absolute path of the pod now; a symbolic link at its end is not followed."""
        if path not in self._found:
            self._found[path] = self._lookup(path)
        return self._found[path]

    def open(self, path: bytes) -> int:
        """An O_PATH descriptor of what is there now; likewise. OSError if nothing is."""
        return open_in(self.root, path)

    def _lookup(self, path: bytes) -> os.stat_result | None:
        try:
            fd = self.open(path)
        except OSError:
            return None
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def current_name(self, held: Held) -> bytes | None:
        """The path under which its inode can be opened again; None when its name is gone or taken by another."""
        names = [held.link]
        if held.link.endswith(DELETED):  # a file may also really be called so
            names.append(held.link[: -len(DELETED)])
        for name in names:
            found = self.lookup(name) if name.startswith(b"/") else None
            if found and (found.st_dev, found.st_ino) == held.inode:
                return name
        return self._other_name(held) if held.stat.st_nlink and held.link.endswith(DELETED) else None

    def _other_name(self, held: Held) -> bytes | None:
        """A name, in a tmpfs of the pod, of what is known under a name that is gone.

        sem_open(3) makes a semaphore under a passing name, and then links it to its own.
        """
        device = held.stat.st_dev
        if device not in self._tmpfs_names:
            self._tmpfs_names[device] = {}
            for where in self.mounts.values():
                if where.device == device and where.root == b"/" and self.on_own_tmpfs(where):
                    self._tmpfs_names[device] = self._names_in(where)
        name = self._tmpfs_names[device].get(held.stat.st_ino)
        found = self.lookup(name) if name else None
        return name if found and (found.st_dev, found.st_ino) == held.inode else None

    def _names_in(self, where: Mount) -> dict[int, bytes]:
        top = mount.openat2(self.root, os.fsdecode(where.point.lstrip(b"/")), os.O_RDONLY | os.O_DIRECTORY, _INSIDE)
        try:
            if os.fstat(top).st_dev != where.device:
                return {}
            return {st.st_ino: where.point + b"/" + path for path, st in walk(b"/proc/self/fd/%d/" % top, where.device)}
        finally:
            os.close(top)


def former_name(link: bytes) -> bytes:
    """The name that an unlinked file had."""
    return link.removesuffix(DELETED)


def pod_id(ctx: CollectContext, host: int) -> int:
    """The pod's number of a process, thread, group or session that is `host` here; 0 if it is none of the pod's.

    A group may outlive its leader: then no process has that number, but its members know it.
    """
    for process in ctx.processes:
        if process.host_pid == host:
            return process.pid
    for process in ctx.processes:
        status = procfs.status(process.host_pid)
        for key in ("NSpgid", "NSsid"):
            if int(status.get(key, "0").split()[0]) == host:
                return procfs.pod_id(status, key)
        if os.path.exists(f"/proc/{process.host_pid}/task/{host}"):
            return procfs.pod_id(procfs.status(process.host_pid, host))
    return 0
