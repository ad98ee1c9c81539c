"""Finding an inode of the pod by what inotify tells of it: device, number, file handle.

A watched inode needs no name to be watched, but one to be watched again. The kernel keeps the way to it in its
caches: a watch pins an overlay's inode, and that the real file below, which its handle leads to, name and all.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator

from podtree.kernel.fdinfo import read_fdinfo
from podtree.kernel.fhandle import FileHandle, below_overlay, open_by_handle
from podtree.kernel.mountinfo import Mount
from podtree.objects.context import CollectContext
from podtree.objects.held import Held, PodView

UPPER, LAYERS = b"upper", b"mounts"  # in a volume: the writes to /, and for other file systems of the host

DEVPTS_FIRST = 3  # the inode number of /dev/pts/0: fs/devpts/inode.c, devpts_pty_new()


class InodeFinder:
    """Opens inodes of the pod while it is frozen. `everything`: the pod's open file descriptions, as they come to be
    known."""

    def __init__(self, ctx: CollectContext, view: PodView, everything: list[Held]) -> None:
        self.view = view
        self.volume = os.fsencode(ctx.log_path.parent)
        self.everything = everything
        self._seen = 0
        self._held: dict[tuple[int, int], Held] = {}  # (superblock's device, inode number)

    def open(self, device: int, ino: int, handle: FileHandle | None) -> int | None:
        """An O_PATH descriptor; None if there is no way to it. `device` is the superblock's."""
        fd = self._open_held(device, ino)
        return self._open_named(device, ino, handle) if fd is None else fd

    def _open_held(self, device: int, ino: int) -> int | None:
        """Some process has it open: the only way to what has no name any more."""
        for held in self.everything[self._seen :]:
            where = self.view.mount_of(held)
            if where:
                self._held.setdefault((where.device, held.stat.st_ino), held)
        self._seen = len(self.everything)
        found = self._held.get((device, ino))
        return os.open(f"/proc/self/fd/{found.fd}", os.O_PATH | os.O_CLOEXEC) if found else None

    def _open_named(self, device: int, ino: int, handle: FileHandle | None) -> int | None:
        mounts = [mount for mount in self.view.mounts.values() if mount.device == device]
        likely = [mount.point for mount in mounts]
        likely += [b"%s/%d" % (m.point, ino - DEVPTS_FIRST) for m in mounts if m.fstype == "devpts"]
        ways = [self._paths(mount, handle) for mount in mounts] if handle else []
        for path in itertools.chain(*ways, likely, *(self._upper_names(mount) for mount in mounts)):
            fd = self._open_if(path, device, ino)
            if fd is not None:
                return fd
        return None

    def _open_if(self, path: bytes, device: int, ino: int) -> int | None:
        """`path` of the pod, if that inode is there now."""
        try:
            fd = self.view.open(path)
        except OSError:
            return None
        st = os.fstat(fd)
        if st.st_ino == ino and (st.st_dev == device or self._superblock(fd) == device):
            return fd
        os.close(fd)
        return None

    def _superblock(self, fd: int) -> int:
        """Its device, which st_dev is not everywhere (btrfs)."""
        where = self.view.mounts.get(read_fdinfo("self", fd).mount_id)
        return where.device if where else -1

    def _paths(self, mount: Mount, handle: FileHandle) -> Iterator[bytes]:
        """Where a handle says that the inode is."""
        if mount.fstype != "overlay":
            with contextlib.suppress(OSError):
                yield from _decoded(self.view.open(mount.point), handle)
            return
        below = below_overlay(handle)
        layer = (self.volume if below[0] else _lower(mount)) if below else None
        if below and layer is not None:
            for path in _decoded(os.open(layer, os.O_PATH | os.O_CLOEXEC), below[1]):
                inner = os.path.relpath(path, os.path.join(layer, _upper_of(mount)) if below[0] else layer)
                yield os.path.normpath(os.path.join(mount.point, inner))

    def _upper_names(self, mount: Mount) -> Iterator[bytes]:
        """Everything that the pod has written: what was renamed since it was copied up is not where it was below."""
        if mount.fstype != "overlay":
            return
        top = os.path.join(self.volume, _upper_of(mount))
        for directory, below, files in os.walk(top):
            for name in below + files:
                yield os.path.normpath(os.path.join(mount.point, os.path.relpath(directory, top), name))


def _decoded(place: int, handle: FileHandle) -> Iterator[bytes]:
    """The name that the kernel has for what `handle` is on the file system of descriptor `place`, which is closed."""
    with contextlib.suppress(OSError):
        try:
            fd = open_by_handle(place, handle, os.O_PATH)
        finally:
            os.close(place)
        try:
            yield os.readlink(b"/proc/self/fd/%d" % fd)
        finally:
            os.close(fd)


def _lower(mount: Mount) -> bytes | None:
    """The host's directory below an overlay."""
    for setting in mount.settings.split(b","):
        if setting.startswith(b"lowerdir="):
            last = re.split(rb"(?<!\\):", setting.removeprefix(b"lowerdir="))[-1]
            return re.sub(rb"\\(.)", rb"\1", last)
    return None


def _upper_of(mount: Mount) -> bytes:
    """The upper directory of a pod's overlay, in the volume: see containment.HostOverlay."""
    if mount.point == b"/":
        return UPPER
    return os.path.join(LAYERS, mount.point.replace(b"/", b"%2F"), UPPER)
