"""btrfs by ioctl: subvolumes, snapshots, deletion, transactions, resize.

Numbers and structures: include/uapi/linux/btrfs.h and btrfs_tree.h (Linux 6.18); man btrfs-ioctl(3).
Nothing here needs btrfs-progs. All functions take paths, work on the parent directory's descriptor,
and raise OSError with the path in it.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

from podtree.kernel.sys import NR, syscall

SUPER_MAGIC = 0x9123683E  # linux/magic.h BTRFS_SUPER_MAGIC
FIRST_FREE_OBJECTID = 256  # inode number of every subvolume's root directory
VOL_NAME_MAX = 255

_MAGIC = 0x94
_READ, _WRITE = 2, 1  # asm-generic/ioctl.h _IOC_READ, _IOC_WRITE


def _ioc(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | _MAGIC << 8 | number


_VOL_ARGS = struct.Struct("=q4088s")  # struct btrfs_ioctl_vol_args
_VOL_ARGS_V2 = struct.Struct("=qQQ32x4040s")  # struct btrfs_ioctl_vol_args_v2
_SEARCH_KEY = struct.Struct("=7Q4I4Q")  # struct btrfs_ioctl_search_key
_SEARCH_HEADER = struct.Struct("=QQQII")  # struct btrfs_ioctl_search_header

_SUBVOL_INFO_CTRANSID = 8 + 256 + 4 * 8 + 3 * 16  # in struct btrfs_ioctl_get_subvol_info_args; otransid is next

SUBVOL_RDONLY = 1 << 1

IOC_RESIZE = _ioc(_WRITE, 3, _VOL_ARGS.size)
IOC_SYNC = _ioc(0, 8, 0)
IOC_SNAP_DESTROY = _ioc(_WRITE, 15, _VOL_ARGS.size)
IOC_TREE_SEARCH = _ioc(_READ | _WRITE, 17, 4096)
IOC_SNAP_CREATE_V2 = _ioc(_WRITE, 23, _VOL_ARGS_V2.size)
IOC_SUBVOL_CREATE_V2 = _ioc(_WRITE, 24, _VOL_ARGS_V2.size)
IOC_SUBVOL_GETFLAGS = _ioc(_READ, 25, 8)
IOC_SUBVOL_SETFLAGS = _ioc(_WRITE, 26, 8)
IOC_GET_SUBVOL_INFO = _ioc(_READ, 60, 504)
FS_IOC_GETFSLABEL = _ioc(_READ, 49, 256)  # linux/fs.h
FS_IOC_SETFSLABEL = _ioc(_WRITE, 50, 256)

_ROOT_TREE_OBJECTID = 1
_ORPHAN_OBJECTID = (1 << 64) - 5
_ORPHAN_ITEM_KEY = 48
_U64_MAX = (1 << 64) - 1


@contextmanager
def _opened(path: str, flags: int = os.O_RDONLY | os.O_DIRECTORY) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _ioctl(fd: int, number: int, arg: bytes, what: str, path: str) -> bytes:
    buffer = bytearray(arg)
    try:
        syscall(NR.ioctl, fd, number, buffer)  # fcntl.ioctl keeps all other threads waiting for one above 1024 bytes
    except OSError as error:
        raise OSError(error.errno, f"{what}: {os.strerror(error.errno or 0)}", path) from None
    return bytes(buffer)


def _split(path: str) -> tuple[str, bytes]:
    parent, name = os.path.split(path)
    raw = os.fsencode(name)
    if not raw or len(raw) > VOL_NAME_MAX:
        raise ValueError(f"not a usable subvolume name: {path!r}")
    return parent or ".", raw


def is_btrfs(path: str) -> bool:
    """Whether `path` lies on a btrfs file system (statfs(2) f_type)."""
    buffer = ctypes.create_string_buffer(120)  # struct statfs, x86_64
    syscall(NR.statfs, os.fsencode(path) + b"\0", buffer)
    return int.from_bytes(buffer.raw[:8], "little") == SUPER_MAGIC


def is_subvolume(path: str) -> bool:
    """Whether `path` is the root directory of a subvolume."""
    try:
        return os.lstat(path).st_ino == FIRST_FREE_OBJECTID and is_btrfs(path)
    except FileNotFoundError:
        return False


def create(path: str) -> None:
    """Make an empty subvolume at `path` (BTRFS_IOC_SUBVOL_CREATE_V2)."""
    parent, name = _split(path)
    with _opened(parent) as fd:
        _ioctl(fd, IOC_SUBVOL_CREATE_V2, _VOL_ARGS_V2.pack(0, 0, 0, name), "make subvolume", path)


def snapshot(source: str, path: str, *, readonly: bool) -> None:
    """Make `path` a snapshot of the subvolume `source` (BTRFS_IOC_SNAP_CREATE_V2).

    The kernel flushes the dirty data of `source` first and commits the transaction, so on return
    the snapshot and all its data are on stable storage.
    """
    parent, name = _split(path)
    flags = SUBVOL_RDONLY if readonly else 0
    with _opened(parent) as fd, _opened(source) as source_fd:
        args = _VOL_ARGS_V2.pack(source_fd, 0, flags, name)
        _ioctl(fd, IOC_SNAP_CREATE_V2, args, f"snapshot {source}", path)


def snapshot_at(source_fd: int, parent_fd: int, name: str, *, readonly: bool) -> None:
    """As `snapshot`, on descriptors opened before: a single system call."""
    flags = SUBVOL_RDONLY if readonly else 0
    args = _VOL_ARGS_V2.pack(source_fd, 0, flags, os.fsencode(name))
    _ioctl(parent_fd, IOC_SNAP_CREATE_V2, args, "snapshot", name)


def destroy(path: str) -> None:
    """Delete the subvolume at `path`, read-only or not (BTRFS_IOC_SNAP_DESTROY).

    Its name is gone on return; its space is freed later by the kernel (see `deleted_subvolumes`).
    """
    parent, name = _split(path)
    with _opened(parent) as fd:
        _ioctl(fd, IOC_SNAP_DESTROY, _VOL_ARGS.pack(0, name), "delete subvolume", path)


def is_readonly(path: str) -> bool:
    """Whether the subvolume has the read-only flag (BTRFS_IOC_SUBVOL_GETFLAGS)."""
    with _opened(path) as fd:
        raw = _ioctl(fd, IOC_SUBVOL_GETFLAGS, bytes(8), "read subvolume flags", path)
    return bool(struct.unpack("=Q", raw)[0] & SUBVOL_RDONLY)


def was_changed(path: str) -> bool:
    """Whether anything in the subvolume was changed since it was made as a snapshot (BTRFS_IOC_GET_SUBVOL_INFO).

    Every change of an inode notes its transaction in the root item (fs/btrfs/root-tree.c, btrfs_update_root_times),
    that of its data when they are written out. Its being read-only or not is no change, nor is a snapshot made of it.
    """
    with _opened(path) as fd:
        raw = _ioctl(fd, IOC_GET_SUBVOL_INFO, bytes(504), "read subvolume information", path)
    changed, made = struct.unpack_from("=QQ", raw, _SUBVOL_INFO_CTRANSID)
    return bool(changed > made)


def set_readonly(path: str, readonly: bool) -> None:
    """Set or clear the subvolume's read-only flag (BTRFS_IOC_SUBVOL_SETFLAGS)."""
    with _opened(path) as fd:
        value = struct.pack("=Q", SUBVOL_RDONLY if readonly else 0)
        _ioctl(fd, IOC_SUBVOL_SETFLAGS, value, "set subvolume flags", path)


def sync(path: str) -> None:
    """Write out all dirty data of the whole file system and commit (BTRFS_IOC_SYNC)."""
    with _opened(path) as fd:
        _ioctl(fd, IOC_SYNC, b"", "sync", path)


def commit_transaction(path: str) -> None:
    """Commit the running transaction: names, snapshots and all metadata become durable.

    Unlike `sync` it writes no other file's dirty data. It gives the file system the label that it has, which
    commits in the caller's own context (fs/btrfs/ioctl.c, btrfs_ioctl_set_fslabel). BTRFS_IOC_START_SYNC and
    _WAIT_SYNC leave it to a kernel thread, whose wake-up is lost when it is just about to sleep
    (fs/btrfs/disk-io.c, transaction_kthread): the next comes with the commit interval, 30 s later. With three
    processes at once that befell every twelfth call.
    """
    with _opened(path) as fd:
        label = _ioctl(fd, FS_IOC_GETFSLABEL, bytes(256), "read the label", path)
        _ioctl(fd, FS_IOC_SETFSLABEL, label, "commit", path)


def resize(path: str, amount: str = "max") -> None:
    """Resize the file system mounted at `path`; `amount` as in btrfs-filesystem(8) (BTRFS_IOC_RESIZE)."""
    with _opened(path) as fd:
        _ioctl(fd, IOC_RESIZE, _VOL_ARGS.pack(0, amount.encode()), f"resize to {amount}", path)


def deleted_subvolumes(path: str) -> list[int]:
    """Ids of the subvolumes that are deleted but whose space is not freed yet.

    Each has an orphan item in the root tree until the cleaner is done with it
    (BTRFS_IOC_TREE_SEARCH; fs/btrfs/root-tree.c, btrfs_find_orphan_roots).
    """
    found: list[int] = []
    start = 0
    with _opened(path) as fd:
        while True:
            key = _SEARCH_KEY.pack(
                _ROOT_TREE_OBJECTID, _ORPHAN_OBJECTID, _ORPHAN_OBJECTID, start, _U64_MAX, 0, _U64_MAX,
                _ORPHAN_ITEM_KEY, _ORPHAN_ITEM_KEY, 4096, 0, 0, 0, 0, 0,
            )  # fmt: skip
            raw = _ioctl(fd, IOC_TREE_SEARCH, key.ljust(4096, b"\0"), "search the root tree", path)
            count = struct.unpack_from("=I", raw, 64)[0]
            if count == 0:
                return found
            at = _SEARCH_KEY.size
            for _ in range(count):
                _transid, _objectid, offset, _type, length = _SEARCH_HEADER.unpack_from(raw, at)
                at += _SEARCH_HEADER.size + length
                found.append(offset)
            start = found[-1] + 1


def wait_deleted(path: str, timeout: float) -> bool:
    """Wait until the space of all deleted subvolumes is freed; False when `timeout` seconds pass first."""
    deadline = time.monotonic() + timeout
    pause = 0.01
    sync(path)  # the cleaner starts on a subvolume once its deletion is committed, and of all commits this one wakes it
    while deleted_subvolumes(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
        sync(path)
    commit_transaction(path)  # blocks that the cleaner gave back are free after the next commit
    return True
