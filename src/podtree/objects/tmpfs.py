"""Memory file systems inside the pod (tmpfs(5): /dev/shm, /dev): every file with its attributes.

They are no part of the volume, so they are saved as a list of entries; what regular files hold goes through
`contents`. Unlinked files that are still open are `memfd`'s. The restored mount is new and may hold what every pod's
has (the nodes of /dev): entries that fit are kept, others are removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

import msgspec

from podtree.errors import Damaged, RestoreFailed
from podtree.objects import contents
from podtree.objects.contents import KEY_XATTR, Contents
from podtree.objects.context import CollectContext, RestoreContext
from podtree.objects.devices import STATELESS
from podtree.objects.held import TREE_ROOT, path_bytes, path_text, walk

#: Device nodes that may be made again; others could reach hardware: Documentation/admin-guide/devices.txt
NODES = frozenset(STATELESS) | {(5, 0), (5, 1), (5, 2), (0, 0)}


class TmpfsEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One name. `kind` is S_IFMT, `path` is relative to the mount (the mount's own root: "."). Times in ns.

    `key`: of a regular file's contents. `target`: of a symbolic link. `same_as`: the earlier path of which this is
    another name (hard link); nothing else is set then.
    """

    path: str
    kind: int
    mode: int = 0
    uid: int = 0
    gid: int = 0
    atime: int = 0
    mtime: int = 0
    size: int = 0
    key: str = ""
    target: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] = {}
    same_as: str = ""


class TmpfsMount(msgspec.Struct, frozen=True):
    """All entries of the tmpfs at `point`, parents before children, else by name."""

    point: str
    entries: tuple[TmpfsEntry, ...]


# ----------------------------------------------------------------------------------------------- collect


def collect_tmpfs(point: str, dir_fd: int, ctx: CollectContext, saved: Contents) -> TmpfsMount:
    """Everything in the tmpfs whose root is `dir_fd` (opened for reading), while the pod is frozen.

    What is mounted inside of it is not entered.
    """
    entries: list[TmpfsEntry] = []
    names: dict[int, str] = {}
    device = os.fstat(dir_fd).st_dev
    base = b"/proc/self/fd/%d/" % dir_fd
    for path, st in walk(base, device):
        text = path_text(path)
        if st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode):
            if st.st_ino in names:
                entries.append(TmpfsEntry(text, stat.S_IFMT(st.st_mode), same_as=names[st.st_ino]))
                continue
            names[st.st_ino] = text
        try:
            entries.append(_collect_entry(base + path, text, st, saved, not ctx.dry_run))
        except (OSError, ValueError) as error:
            name = os.path.join(os.fsencode(point), path).decode(errors="backslashreplace")
            ctx.refuse(None, f"file {name}", f"can't be saved: {error}")
    return TmpfsMount(point, tuple(entries))


def _collect_entry(
    path: bytes, text: str, st: os.stat_result, saved: Contents, capture: bool
) -> TmpfsEntry:
    kind = stat.S_IFMT(st.st_mode)
    size, key, target, device = 0, "", "", (0, 0)
    if kind == stat.S_IFREG:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NOATIME | os.O_NONBLOCK | os.O_CLOEXEC  # no wait for a lease
        fd = os.open(path, flags)
        try:
            size, key = st.st_size, saved.key_for(fd, "tmpfs")
            if capture:
                saved.capture(key, fd)
        finally:
            os.close(fd)
    elif kind == stat.S_IFLNK:
        target = path_text(os.readlink(path))
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        device = os.major(st.st_rdev), os.minor(st.st_rdev)
        if kind == stat.S_IFBLK or device not in NODES:
            raise ValueError(f"it is a device node ({device[0]}:{device[1]}) that a new pod would not be given")
    return TmpfsEntry(
        path=text, kind=kind, mode=stat.S_IMODE(st.st_mode), uid=st.st_uid, gid=st.st_gid,
        atime=st.st_atime_ns, mtime=st.st_mtime_ns,
        size=size, key=key, target=target, device=device, xattrs=_xattrs(path),
    )  # fmt: skip


def _xattrs(path: bytes) -> dict[str, bytes]:
    names = sorted(n for n in os.listxattr(path, follow_symlinks=False) if n != KEY_XATTR)
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in names}


# ----------------------------------------------------------------------------------------------- restore


def restore_tmpfs(state: TmpfsMount, ctx: RestoreContext) -> None:
    """Fill the new tmpfs at `state.point`, before any descriptor is opened. For the builder."""
    if not state.entries:
        raise Damaged("the image's list of a tmpfs is empty")
    base = path_bytes(state.point) + b"/"
    device = os.stat(base).st_dev
    _remove_others(base, device, {e.path for e in state.entries})
    made: dict[str, TmpfsEntry] = {}
    for entry in state.entries:
        _check_place(entry, made)
        try:
            _restore_entry(base, entry, made, ctx)
        except OSError as error:
            raise RestoreFailed(f"{state.point}/{entry.path} can't be made again: {error}") from error
        made[entry.path] = entry
    for entry in reversed(state.entries):  # children first: making them changed their directory's times
        if not entry.same_as:
            times = (entry.atime, entry.mtime)
            os.utime(base + path_bytes(entry.path), ns=times, follow_symlinks=False)


def _remove_others(base: bytes, device: int, wanted: set[str]) -> None:
    for path, st in reversed(list(walk(base, device))):
        if path_text(path) in wanted:
            continue
        with contextlib.suppress(OSError):  # a directory with a mount in it stays
            os.rmdir(base + path) if stat.S_ISDIR(st.st_mode) else os.unlink(base + path)


def _check_place(entry: TmpfsEntry, made: dict[str, TmpfsEntry]) -> None:
    """Only below directories of the same list, so that no link leads elsewhere."""
    if not made:
        if entry.path != TREE_ROOT or entry.kind != stat.S_IFDIR:
            raise Damaged("the image's list of a tmpfs does not begin with its root")
        return
    path = path_bytes(entry.path)
    parent, name = os.path.split(path)
    above = made.get(path_text(parent) if parent else TREE_ROOT)
    if entry.path in made or name in (b"", b".", b"..") or above is None or above.kind != stat.S_IFDIR:
        raise Damaged(f"the image's list of a tmpfs has an impossible path: {entry.path!r}")
    first = made.get(entry.same_as) if entry.same_as else None
    if entry.same_as and (first is None or first.kind == stat.S_IFDIR):
        raise Damaged(f"the image's list of a tmpfs has an impossible link: {entry.path!r}")


def _restore_entry(base: bytes, entry: TmpfsEntry, made: dict[str, TmpfsEntry], ctx: RestoreContext) -> None:
    path = base + path_bytes(entry.path)
    if entry.same_as:
        if not _fits(path, made[entry.same_as]):
            os.link(base + path_bytes(entry.same_as), path, follow_symlinks=False)
        return
    if not _fits(path, entry):
        _make(path, entry)
    if entry.kind == stat.S_IFREG:
        fd = os.open(path, os.O_RDWR | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            contents.restore(ctx.image_dir_fd, entry.key, fd, entry.size)
        finally:
            os.close(fd)
    os.chown(path, entry.uid, entry.gid, follow_symlinks=False)
    if entry.kind != stat.S_IFLNK:
        os.chmod(path, entry.mode & 0o7777)
    for name, value in entry.xattrs.items():
        os.setxattr(path, name, value, follow_symlinks=False)


def _fits(path: bytes, entry: TmpfsEntry) -> bool:
    """Whether the new mount has it already; what has the name and is something else is removed."""
    try:
        st = os.lstat(path)
    except FileNotFoundError:
        return False
    same = stat.S_IFMT(st.st_mode) == entry.kind and entry.kind != stat.S_IFREG
    if same and entry.kind == stat.S_IFLNK:
        same = os.readlink(path) == path_bytes(entry.target)
    if same and entry.kind == stat.S_IFCHR:
        same = st.st_rdev == os.makedev(*entry.device)
    if not same:
        if stat.S_ISDIR(st.st_mode):
            raise OSError(errno.EISDIR, "a directory of the new pod is in its place")
        os.unlink(path)
    return same


def _make(path: bytes, entry: TmpfsEntry) -> None:
    match entry.kind:
        case stat.S_IFDIR:
            os.mkdir(path, 0o700)
        case stat.S_IFREG:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        case stat.S_IFLNK:
            os.symlink(path_bytes(entry.target), path)
        case stat.S_IFIFO | stat.S_IFSOCK:
            os.mknod(path, entry.kind | 0o600)
        case stat.S_IFCHR if entry.device in NODES:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(*entry.device))
        case _:
            raise Damaged(f"the image's list of a tmpfs has an impossible kind of file: {entry.path!r}")
