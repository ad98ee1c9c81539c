"""Memory files: memfd_create(2), shared anonymous memory, unlinked files of the pod's own tmpfs.

All three are shmem inodes without a name. Contents go through `contents`; this module has what makes the file.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from enum import Enum

import msgspec

from podtree.errors import RestoreFailed
from podtree.kernel import fdops
from podtree.kernel.sys import PAGE_SIZE
from podtree.objects import contents
from podtree.objects.contents import Contents
from podtree.objects.context import CollectContext, RestoreContext
from podtree.objects.files import open_kind
from podtree.objects.held import Held, PodView, former_name, path_bytes, path_text
from podtree.objects.scratch import temporary_name

F_SEAL_SEAL = 1
MFD_ALLOW_SEALING = 2
MFD_NOEXEC_SEAL = 8
F_SEAL_EXEC = 0x20
SHARED_LINK = b"/dev/zero (deleted)"  # what mmap(2) of MAP_SHARED|MAP_ANONYMOUS makes: mm/shmem.c, shmem_zero_setup()
SHARED_NAME = b"podtree-shared"  # a memfd that stands for such memory
MEMFD_PREFIX = b"/memfd:"
HUGE, HUGE_HINT = "memory in huge pages (MFD_HUGETLB, MAP_HUGETLB) can't be saved", "use ordinary pages"


class MemoryKind(Enum):
    """What the file was made by."""

    MEMFD = "memfd"
    SHARED = "shared"
    TMPFS = "tmpfs"


class MemoryFile(msgspec.Struct, frozen=True, tag="memory"):
    """A shmem inode without a name. `name`: of the memfd; of a tmpfs file the path it had. `key`: of its contents."""

    kind: MemoryKind
    key: str
    name: str
    size: int
    mode: int
    uid: int
    gid: int
    mtime: int = 0  # ns
    seals: int = 0


def classify(held: Held, view: PodView) -> MemoryKind | None:
    """Which kind of unnamed memory file it is; None for something else."""
    if held.kind != stat.S_IFREG:
        return None
    if held.link == SHARED_LINK or held.link == MEMFD_PREFIX + SHARED_NAME + b" (deleted)":
        return MemoryKind.SHARED if held.stat.st_nlink == 0 else None
    where = view.mount_of(held)
    if where is None:
        return MemoryKind.MEMFD if held.link.startswith(MEMFD_PREFIX) else None
    if view.on_own_tmpfs(where) and held.stat.st_nlink == 0:
        return MemoryKind.TMPFS
    return None


def collect(held: Held, kind: MemoryKind, ctx: CollectContext, saved: Contents) -> MemoryFile | None:
    """State of a memory file; its contents are captured. None when refused."""
    if os.fstatvfs(held.fd).f_bsize != PAGE_SIZE:
        held.refuse(ctx, HUGE, HUGE_HINT)
        return None
    readable = held.fd if held.process and held.readable else fdops.reopen(held.fd, os.O_RDONLY | os.O_NONBLOCK)
    try:
        seals = _seals(readable, kind)
        key = saved.key_for(readable, kind.value)
        if not ctx.dry_run:
            saved.capture(key, readable)
    finally:
        if readable != held.fd:
            os.close(readable)
    name = b"" if kind is MemoryKind.SHARED else former_name(held.link)
    return MemoryFile(
        kind=kind,
        key=key,
        name=path_text(name.removeprefix(MEMFD_PREFIX) if kind is MemoryKind.MEMFD else name),
        size=held.stat.st_size,
        mode=stat.S_IMODE(held.stat.st_mode),
        uid=held.stat.st_uid,
        gid=held.stat.st_gid,
        mtime=held.stat.st_mtime_ns,
        seals=seals,
    )


def _seals(fd: int, kind: MemoryKind) -> int:
    try:
        return int(fcntl.fcntl(fd, fdops.F_GET_SEALS))
    except OSError as error:
        if error.errno != errno.EINVAL or kind is MemoryKind.MEMFD:
            raise
        return 0


# ----------------------------------------------------------------------------------------------- restore


def restore_memory_files(entries: list[tuple[int, int, MemoryFile]], ctx: RestoreContext) -> dict[int, int]:
    """Make each inode, fill it, open it as often as it was. `entries`: (OpenFile id, flags, state)."""
    groups: dict[str, list[tuple[int, int, MemoryFile]]] = {}
    for number, flags, state in entries:
        groups.setdefault(state.key, []).append((number, flags, state))
    result = {}
    for group in groups.values():
        state = group[0][2]
        original = _make(state)
        contents.restore(ctx.image_dir_fd, state.key, original, state.size)
        os.fchown(original, state.uid, state.gid)
        os.fchmod(original, state.mode & 0o7777)
        os.utime(original, ns=(state.mtime, state.mtime))
        for number, flags, _ in group:
            result[number] = fdops.reopen(original, flags & _OPEN)
        if state.kind is MemoryKind.MEMFD and state.seals:
            _seal(original, state)
        os.close(original)
    return result


_OPEN = os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK | os.O_NOATIME | os.O_PATH | os.O_SYNC | os.O_DSYNC | os.O_DIRECT


def _make(state: MemoryFile) -> int:
    if state.kind is MemoryKind.MEMFD:
        flags = MFD_ALLOW_SEALING | (MFD_NOEXEC_SEAL if state.seals & F_SEAL_EXEC else 0)
        name = b"" if not state.name else path_bytes(state.name)
        return os.memfd_create(os.fsdecode(name), flags | os.MFD_CLOEXEC)
    if state.kind is MemoryKind.SHARED:
        return shared_memory(state.size)
    with temporary_name(path_bytes(state.name), _create, os.unlink) as name:
        return open_kind(name, os.O_RDWR, stat.S_IFREG)


def _create(path: bytes) -> None:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))


def _seal(fd: int, state: MemoryFile) -> None:
    """Seals come last: they would keep the contents out. A writable mapping would be in the way of F_SEAL_WRITE."""
    try:
        fcntl.fcntl(fd, fdops.F_ADD_SEALS, state.seals)
    except OSError as error:
        raise RestoreFailed(f"can't seal the memfd {state.name!r}: {error}") from error


def shared_memory(size: int) -> int:
    """A descriptor of new shared anonymous memory: the very thing that mmap(2) makes, opened through map_files.

    Mapped again, it looks in /proc/PID/maps as it did ("/dev/zero (deleted)").
    """
    length = max(-(-size // PAGE_SIZE), 1) * PAGE_SIZE
    with mmap.mmap(-1, length, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS) as memory:
        address = contents.address_of(memory)
        name = f"self/map_files/{address:x}-{address + length:x}"
        return os.open(name, os.O_RDWR | os.O_CLOEXEC, dir_fd=fdops.proc_fd())
