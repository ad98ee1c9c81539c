"""The mount API: file system contexts, detached mounts, attributes, pivot_root.

Source: fsopen(2), fsconfig(2), fsmount(2), move_mount(2), open_tree(2), mount_setattr(2), mount(2),
umount2(2), pivot_root(2), openat2(2); include/uapi/linux/mount.h and openat2.h (Linux 6.18).
"""

from __future__ import annotations

import enum
import os
import struct
from typing import NamedTuple

from podtree.kernel.sys import NR, syscall

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
AT_SYMLINK_NOFOLLOW = 0x100

FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_EMPTY_PATH = 0x40

MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MNT_DETACH = 2


class FsConfig(enum.IntEnum):
    """Commands of fsconfig(2)."""

    SET_FLAG = 0
    SET_STRING = 1
    CMD_CREATE = 6


class MountAttr(enum.IntFlag):
    """MOUNT_ATTR_*: what a mount (not its file system) allows."""

    NONE = 0
    RDONLY = 0x1
    NOSUID = 0x2
    NODEV = 0x4
    NOEXEC = 0x8


class Resolve(enum.IntFlag):
    """RESOLVE_*: how openat2(2) walks a path that somebody else controls."""

    NO_XDEV = 0x01
    NO_MAGICLINKS = 0x02
    NO_SYMLINKS = 0x04
    BENEATH = 0x08
    IN_ROOT = 0x10


def _c(text: str | os.PathLike[str]) -> bytes:
    return os.fsencode(text) + b"\0"


def fsopen(fstype: str) -> int:
    """A new context for mounting `fstype`; close it when the mount is made."""
    return syscall(NR.fsopen, _c(fstype), FSOPEN_CLOEXEC)


def fsconfig_string(fd: int, key: str, value: str) -> None:
    """Set a `key=value` option."""
    syscall(NR.fsconfig, fd, FsConfig.SET_STRING, _c(key), _c(value), 0)


def fsconfig_flag(fd: int, key: str) -> None:
    """Set an option that has no value."""
    syscall(NR.fsconfig, fd, FsConfig.SET_FLAG, _c(key), None, 0)


def fsconfig_create(fd: int) -> None:
    """Create the superblock."""
    syscall(NR.fsconfig, fd, FsConfig.CMD_CREATE, None, None, 0)


def fsmount(fd: int, attrs: MountAttr = MountAttr.NONE) -> int:
    """A descriptor of a new mount that is attached nowhere yet."""
    return syscall(NR.fsmount, fd, FSMOUNT_CLOEXEC, attrs)


def context_messages(fd: int) -> str:
    """What the kernel had to say about a context: fsopen(2), "the log"."""
    lines = []
    while True:
        try:
            lines.append(os.read(fd, 8192).decode(errors="replace").strip())
        except OSError:  # ENODATA: no more
            return "; ".join(lines)


def make_mount(fstype: str, options: dict[str, str | None], attrs: MountAttr = MountAttr.NONE) -> int:
    """A detached mount of a new file system; a None option is a flag.

    Raises OSError whose text has the option list and the kernel's own explanation.
    """
    context = fsopen(fstype)
    try:
        for key, value in options.items():
            if value is None:
                fsconfig_flag(context, key)
            else:
                fsconfig_string(context, key, value)
        fsconfig_create(context)
        return fsmount(context, attrs)
    except OSError as error:
        said = context_messages(context)
        shown = ",".join(k if v is None else f"{k}={v}" for k, v in options.items())
        raise OSError(error.errno, f"mounting {fstype} ({shown}): {error.strerror} {said}".strip()) from error
    finally:
        os.close(context)


def clone_tree(path: str, dir_fd: int = AT_FDCWD, *, recursive: bool = False) -> int:
    """A detached copy of the mount (or, with a file's path, of that file) at `path`."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (AT_RECURSIVE if recursive else 0)
    return syscall(NR.open_tree, dir_fd, _c(path), flags | (AT_EMPTY_PATH if not path else 0))


def attach(mount_fd: int, target_fd: int) -> None:
    """Attach a detached mount on top of what `target_fd` (O_PATH) refers to."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    syscall(NR.move_mount, mount_fd, b"\0", target_fd, b"\0", flags)


def set_attributes(fd: int, attrs: MountAttr, *, recursive: bool = False) -> None:
    """Add attributes to the mount that `fd` stands on."""
    raw = struct.pack("QQQQ", attrs, 0, 0, 0)
    syscall(NR.mount_setattr, fd, b"\0", AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0), raw, len(raw))


def make_private(path: str = "/") -> None:
    """Cut the whole mount tree from propagation, in both directions."""
    syscall(NR.mount, None, _c(path), None, MS_REC | MS_PRIVATE, None)


def detach(path: str) -> None:
    """Lazy unmount."""
    syscall(NR.umount2, _c(path), MNT_DETACH)


def pivot_into(root_fd: int) -> None:
    """Make the attached mount at `root_fd` the root of this mount namespace; the old root is let go.

    pivot_root(2), NOTES: with "." for both, the old root ends on top of the new one, and is detached.
    """
    os.fchdir(root_fd)
    syscall(NR.pivot_root, b".\0", b".\0")
    detach(".")
    os.chdir("/")


def openat2(dir_fd: int, path: str, flags: int, resolve: Resolve, mode: int = 0) -> int:
    """Open `path` below `dir_fd` under the given rules; close-on-exec is always set."""
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, mode, resolve)
    return syscall(NR.openat2, dir_fd, _c(path), how, len(how))


class Mount(NamedTuple):
    """One line of mountinfo."""

    point: str
    fstype: str
    source: str
    options: tuple[str, ...]  # of the superblock


def mountinfo() -> list[Mount]:
    """The mounts of this namespace in the order they were made: proc_pid_mountinfo(5)."""
    result = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            left, _, right = line.rstrip("\n").partition(" - ")
            fstype, source, options = right.split(" ", 2)
            point = _unescape(left.split()[4])
            result.append(Mount(point, fstype, _unescape(source), tuple(options.split(","))))
    return result


def _unescape(text: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text
