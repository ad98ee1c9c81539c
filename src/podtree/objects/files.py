"""Regular files and directories: by path, or unlinked ones as *ghosts* in the volume's hidden directory.

A ghost is a reflink (FICLONE) of the unlinked file, made while the pod is frozen and before the volume's snapshot, so
it costs O(extents) however large the file is. Files that other names still refer to get a hard link there instead,
which keeps their identity. At restore a ghost is given its old name for the moment of opening it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterable

import msgspec

from podtree.errors import Damaged, RestoreFailed
from podtree.kernel import fdops
from podtree.objects import external
from podtree.objects.context import CollectContext, RestoreContext
from podtree.objects.held import PSEUDO, Held, PodView, former_name, path_bytes, path_text
from podtree.objects.scratch import kept_times, temporary_name

HIDDEN = b".podtree"  # below the volume's root; masked inside of the pod
_HALFWAY = re.compile(r"halfway-([0-9a-f]{32})")  # in there: the note of a link that is made at the top, to be moved
COPY_BLOCK = 1 << 20

#: What open(2) may be given again. O_CREAT, O_EXCL, O_NOCTTY and O_TRUNC never show in F_GETFL.
OPEN_FLAGS = (
    os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK | os.O_SYNC | os.O_DSYNC | os.O_DIRECT
    | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NOATIME | os.O_PATH
)  # fmt: skip


class RegularFile(msgspec.Struct, frozen=True, tag="file"):
    """A file with a name. `external`: on a file system that is not the pod's (a bind mount), so it may change.

    `size` (bytes) and `mtime` (ns) must be the same at restore, unless it is external.
    """

    path: str
    size: int
    mtime: int
    external: bool = False


class Ghost(msgspec.Struct, frozen=True, tag="ghost"):
    """A file whose name `path` is gone; its contents are `name` in the hidden directory.

    `linked`: it has other names, so that is a hard link and not a copy.
    """

    path: str
    name: str
    size: int
    linked: bool = False


class Directory(msgspec.Struct, frozen=True, tag="directory"):
    """A directory; a deleted one is made again and removed. `key` tells deleted ones of the same path apart."""

    path: str
    deleted: bool = False
    key: str = ""
    mode: int = 0o755
    uid: int = 0
    gid: int = 0


class LogFile(msgspec.Struct, frozen=True, tag="log"):
    """The pod's log, which lies beside its root file system."""


class PathNode(msgspec.Struct, frozen=True, tag="path"):
    """An O_PATH descriptor of what is no regular file and no directory. `kind` is its S_IFMT."""

    path: str
    kind: int


FileStates = RegularFile | Ghost | Directory | LogFile | PathNode


# ----------------------------------------------------------------------------------------------- collect


class GhostKeeper:
    """Makes the ghosts of one checkpoint, one per inode, and removes them from the live volume afterwards."""

    def __init__(self, ctx: CollectContext, view: PodView) -> None:
        self.ctx = ctx
        self.view = view
        self.made: dict[tuple[int, int], tuple[str, bool]] = {}  # inode -> name, linked
        self.written: set[tuple[int, int]] = set()  # inodes of regular files that the pod has open for writing

    def save(self, held: Held, *, apart: bool = False) -> Ghost:
        """The ghost of an inode that has no usable name; OSError if it can't be made.

        `apart`: a copy, whatever names the inode has.
        """
        if held.inode not in self.made:
            name = f"g{len(self.made)}"
            linked = held.stat.st_nlink > 0 and not apart
            if not self.ctx.dry_run:
                if not self.made:  # only then: whoever watches / sees us look for them
                    make_hidden_directory(self.ctx.root_fd)
                    sweep(self.ctx.root_fd)
                linked = linked and self._link(held, name.encode())
                if not linked:
                    self._clone(held, name.encode())
            self.made[held.inode] = name, linked
        name, linked = self.made[held.inode]
        return Ghost(path_text(former_name(held.link)), name, held.stat.st_size, linked)

    def _clone(self, held: Held, name: bytes) -> None:
        # Nonblocking: a lease on it (fcntl(2)) isn't waited for.
        source = fdops.reopen(held.fd, os.O_RDONLY | os.O_NOATIME | os.O_NONBLOCK)
        target = os.open(
            HIDDEN + b"/" + name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self.ctx.root_fd
        )
        try:
            try:
                fdops.clone_contents(source, target)
            except OSError as error:
                # A file of the lower layer that was unlinked without ever being written: another file system.
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                copy_sparse(source, target, held.stat.st_size)
            copy_attributes(source, target)
        finally:
            os.close(source)
            os.close(target)

    def _link(self, held: Held, name: bytes) -> bool:
        """link(2) wants both names on one mount, and the hidden directory can't be reached through the pod's.

        So it goes by way of a name that no file of the pod can have, noted beforehand for whoever has to sweep.
        False for a deleted file of the lower layer: its link count, on the other file system, stays above 0.
        """
        token, root = secrets.token_hex(16).encode(), self.ctx.root_fd
        note = HIDDEN + b"/halfway-" + token
        os.close(os.open(note, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=root))
        try:
            with kept_times(b".", root):
                fdops.link_fd(held.fd, self.view.root, os.fsdecode(_halfway_name(token)))
                os.rename(_halfway_name(token), HIDDEN + b"/" + name, src_dir_fd=root, dst_dir_fd=root)
        except FileNotFoundError:
            return False
        finally:
            os.unlink(note, dir_fd=root)
        return True

    def release(self) -> None:
        """After the snapshot: take the ghosts out of the live volume."""
        if self.made and not self.ctx.dry_run:
            sweep(self.ctx.root_fd)
            self.made.clear()


def make_hidden_directory(root_fd: int) -> None:
    """Make upper/.podtree if it is not there."""
    try:
        os.stat(HIDDEN, dir_fd=root_fd, follow_symlinks=False)
    except FileNotFoundError:
        with kept_times(b".", root_fd):
            os.mkdir(HIDDEN, 0o700, dir_fd=root_fd)


def sweep(root_fd: int) -> None:
    """Remove all ghosts, also those that a killed checkpoint left."""
    with contextlib.suppress(FileNotFoundError):
        for name in _names(HIDDEN, root_fd):
            if half := _HALFWAY.fullmatch(name):
                with contextlib.suppress(FileNotFoundError), kept_times(b".", root_fd):
                    os.unlink(_halfway_name(half[1].encode()), dir_fd=root_fd)
            os.unlink(HIDDEN + b"/" + os.fsencode(name), dir_fd=root_fd)


def _halfway_name(token: bytes) -> bytes:
    return b".podtree-" + token


def _names(directory: bytes, dir_fd: int) -> list[str]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        return os.listdir(fd)
    finally:
        os.close(fd)


def copy_sparse(source: int, target: int, size: int) -> None:
    """Copy the data of a file, leaving its holes holes."""
    os.ftruncate(target, size)
    for start, end in fdops.data_extents(source, size):
        while start < end:
            block = os.pread(source, min(COPY_BLOCK, end - start), start)
            if not block:
                return
            os.pwrite(target, block, start)
            start += len(block)


def copy_attributes(source: int, target: int) -> None:
    """Owner, mode, extended attributes (ACLs and file capabilities among them) and times."""
    st = os.fstat(source)
    os.fchown(target, st.st_uid, st.st_gid)
    os.fchmod(target, stat.S_IMODE(st.st_mode))
    for name in os.listxattr(source):
        os.setxattr(target, name, os.getxattr(source, name))
    os.utime(target, ns=(st.st_atime_ns, st.st_mtime_ns))


def collect_file(held: Held, ctx: CollectContext, view: PodView, ghosts: GhostKeeper) -> FileStates | None:
    """State of a regular file, directory, symbolic link, or anything opened with O_PATH; None when refused."""
    if held.inode == view.log:
        return LogFile()
    where = view.mount_of(held)
    if where is None or (held.inode in ghosts.written and view.shown(where)):
        policy = _sharing(held, where is None, ctx)
        if policy != "keep":
            return _save_ghost(held, ctx, ghosts, apart=True) if policy == "close" else None
    assert where is not None
    if where.fstype in PSEUDO - {"sysfs", "mqueue"} and held.kind != stat.S_IFDIR:
        hint = "close it, or try again if it is only open for a moment"
        held.refuse(ctx, f"an open file of {where.fstype} can't be saved", hint)
        return None
    external = not (view.on_volume(where) or view.on_own_tmpfs(where) or where.fstype in PSEUDO)
    name = view.current_name(held)
    if held.kind == stat.S_IFDIR:
        return _collect_directory(held, name, ctx, external or where.fstype in PSEUDO)
    if name is not None:
        if held.kind != stat.S_IFREG:
            return PathNode(path_text(name), held.kind)
        external = external or where.fstype in PSEUDO
        return RegularFile(path_text(name), held.stat.st_size, held.stat.st_mtime_ns, external)
    if held.kind != stat.S_IFREG:
        held.refuse(ctx, "an O_PATH descriptor of something that has no name any more")
        return None
    if held.stat.st_nlink and not view.on_volume(where):
        held.refuse(ctx, "the name it was opened by is gone, and its other names are unknown", "close it")
        return None
    return _save_ghost(held, ctx, ghosts)


def _sharing(held: Held, strange: bool, ctx: CollectContext) -> external.Policy:
    """What is done with a file of the host's: `strange` to the pod's mounts, or open for writing where -v shows it."""
    regular = held.kind == stat.S_IFREG and not held.flags & os.O_PATH
    copy = "a branch has a copy of it, as it is now" if regular else ""
    if strange:
        return held.external(ctx, "it was opened outside of the pod's mounts", close=copy)
    reason = "a file on a writable directory of the host (-v) is open for writing: a branch would write to it, too"
    return held.external(ctx, reason, close=copy, keep="a branch opens the same file, as it is then")


def _save_ghost(held: Held, ctx: CollectContext, ghosts: GhostKeeper, *, apart: bool = False) -> Ghost | None:
    try:
        return ghosts.save(held, apart=apart)
    except OSError as error:
        held.refuse(ctx, f"the file can't be copied: {error}", "see that the pool has space")
        return None


def _collect_directory(held: Held, name: bytes | None, ctx: CollectContext, foreign: bool) -> Directory | None:
    if name is not None:
        return Directory(path_text(name))
    if foreign or not held.link.endswith(b" (deleted)"):
        held.refuse(ctx, "a directory that can't be reached by its path", "a mount may lie over it")
        return None
    return Directory(
        path_text(former_name(held.link)),
        deleted=True,
        key=f"{held.stat.st_dev:x}:{held.stat.st_ino}",
        mode=stat.S_IMODE(held.stat.st_mode),
        uid=held.stat.st_uid,
        gid=held.stat.st_gid,
    )


# ----------------------------------------------------------------------------------------------- restore


def open_kind(path: bytes, flags: int, kind: int) -> int:
    """Open what must be of type `kind` (S_IFMT) there; nothing else is ever opened, only looked at."""
    probe = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(probe)
        if stat.S_IFMT(found.st_mode) != kind:
            raise RestoreFailed(
                f"{os.fsdecode(path)} is of another type than at the checkpoint",
                "the files below the pod, or of its bind mounts, have changed",
            )
        if flags & (os.O_PATH | os.O_NOFOLLOW):
            fd = os.open(path, flags & OPEN_FLAGS | os.O_CLOEXEC)
        else:
            fd = fdops.reopen(probe, flags & OPEN_FLAGS)
    finally:
        os.close(probe)
    return fd


def restore_file(state: RegularFile | LogFile | PathNode, flags: int, ctx: RestoreContext) -> int:
    """Open it again by its path, and see that it is what it was."""
    if isinstance(state, LogFile):
        return fdops.reopen(ctx.log_path_fd, flags & OPEN_FLAGS & ~os.O_NOFOLLOW)
    path = path_bytes(state.path)
    if isinstance(state, PathNode):
        return open_kind(path, flags | os.O_PATH | os.O_NOFOLLOW, state.kind)
    fd = open_kind(path, flags, stat.S_IFREG)
    if not state.external:
        st = os.fstat(fd)
        if (st.st_size, st.st_mtime_ns) != (state.size, state.mtime):
            os.close(fd)
            raise RestoreFailed(
                f"{state.path} has changed since the checkpoint "
                f"(size {state.size}, now {st.st_size}; modified {state.mtime} ns, now {st.st_mtime_ns} ns)",
                "a file of the root file system below the pod was replaced (an upgrade?); put the old one back",
            )
    return fd


def restore_ghosts(entries: list[tuple[int, int, Ghost]], ctx: RestoreContext) -> dict[int, int]:
    """Open all ghosts and remove them from the volume. `entries`: (OpenFile id, flags, state).

    Those of one name are opened by one dentry: when the last user of an unlinked one is gone the kernel takes the
    inode for deleted, and tells its watchers (fs/dcache.c, dentry_unlink_inode(), Linux 6.18).
    """
    result = {}
    root = ctx.root_fd
    groups: dict[Ghost, list[tuple[int, int]]] = {}
    for number, flags, state in entries:
        groups.setdefault(state, []).append((number, flags))
    for state, opened in groups.items():
        if not state.name.isalnum():
            raise Damaged(f"the image has an impossible ghost name: {state.name!r}")
        hidden = HIDDEN + b"/" + state.name.encode()
        try:
            st = os.stat(hidden, dir_fd=root, follow_symlinks=False)
        except FileNotFoundError as error:
            raise Damaged(f"the contents of the unlinked file {state.path} are missing in the volume") from error
        if not stat.S_ISREG(st.st_mode) or (not state.linked and st.st_size != state.size):
            raise Damaged(f"the contents of the unlinked file {state.path} are not what was saved")
        result.update(_open_ghost(hidden, st, state, opened, root))
    sweep(root)
    return result


def _open_ghost(
    hidden: bytes, st: os.stat_result, state: Ghost, opened: list[tuple[int, int]], root: int
) -> dict[int, int]:
    """Descriptors by OpenFile id; `opened`: (id, flags)."""

    def make(name: bytes) -> None:
        os.link(hidden, name.lstrip(b"/"), src_dir_fd=root, dst_dir_fd=root, follow_symlinks=False)

    def remove(name: bytes) -> None:
        os.unlink(name.lstrip(b"/"), dir_fd=root)

    path = path_bytes(state.path)
    for candidate in (path, b"/" + HIDDEN + b"-lost"):  # the second: where a mount lies over the first's directory
        with temporary_name(candidate, make, remove) as name:
            try:
                found = os.lstat(name)
            except FileNotFoundError:
                continue
            if (found.st_dev, found.st_ino) == (st.st_dev, st.st_ino):
                return {number: open_kind(name, flags, stat.S_IFREG) for number, flags in opened}
    raise RestoreFailed(f"can't give the unlinked file {state.path} a name to open it by")


def restore_directories(entries: Iterable[tuple[int, int, Directory]]) -> dict[int, int]:
    """Open directories; deleted ones are made, opened as often as needed, and removed."""
    result = {}
    deleted: dict[str, list[tuple[int, int, Directory]]] = {}
    for number, flags, state in entries:
        if state.deleted:
            deleted.setdefault(state.key, []).append((number, flags, state))
        else:
            result[number] = open_kind(path_bytes(state.path), flags, stat.S_IFDIR)
    for group in deleted.values():
        state = group[0][2]
        with temporary_name(path_bytes(state.path), lambda p: os.mkdir(p, 0o700), os.rmdir) as name:
            os.chown(name, state.uid, state.gid)
            os.chmod(name, state.mode & 0o7777)
            for number, flags, _ in group:
                result[number] = open_kind(name, flags, stat.S_IFDIR)
    return result
