"""The pool's place: PODTREE_HOME, the btrfs file in it, its loop mount, and its growth.

    $HOME/lock        flock: one process at a time makes, mounts, grows or unmounts
    $HOME/pool.img    sparse file with a btrfs file system (absent where $HOME lies on btrfs itself)
    $HOME/pool/       its mount point (or a plain directory on that btrfs)
    $HOME/run/        sockets and other things of running pods; nothing in it survives the machine
    $HOME/locks/      one lock file per pod
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import msgspec

from podtree.errors import Conflict, PodtreeError, Unsupported
from podtree.kernel import btrfs, loop
from podtree.kernel.sys import NR, syscall
from podtree.pool import index, locks

DEFAULT_HOME = "/var/lib/podtree"
MIB = 1 << 20
GIB = 1 << 30

SMALLEST = 256 * MIB  # of a pool file; mkfs.btrfs itself wants 109 MiB
LARGEST_AT_FIRST = 64 * GIB
_OWN = {"lock", "locks", "run", "cache", "pool", "pool.img", "pool.img.new", "lost+found"}
_MS_NOATIME = 1024  # linux/mount.h
_MS_NODEV, _MS_NOSUID = 4, 2


class PoolFile(msgspec.Struct, frozen=True, kw_only=True):
    """The sparse file behind a pool, in bytes."""

    path: str
    size: int
    allocated: int
    growable: int  # how much larger it may get without promising space that the disk hasn't


def default_home() -> Path:
    """PODTREE_HOME, or /var/lib/podtree."""
    return Path(os.environ.get("PODTREE_HOME") or DEFAULT_HOME)


def prepare(home: Path, initial_size: int | None) -> Path:
    """Make and mount whatever is missing; returns the pool's directory. Quick when all is there."""
    root = home / "pool"
    try:
        if is_ready(home):
            return root
        if os.geteuid() == 0:
            _make_home(home)
            with locks.held(str(home / "lock"), what=f"the pool in {home}"):
                if not is_ready(home):
                    _prepare_locked(home, root, initial_size)
            return root
    except OSError as error:
        if os.geteuid() == 0:
            raise _no_place(home, error) from None
    raise Unsupported("podtree needs to be root: it makes namespaces, mounts and snapshots", "try sudo")


def _no_place(home: Path, error: OSError) -> PodtreeError:
    where = f" ({os.fsdecode(error.filename)})" if error.filename else ""
    return PodtreeError(
        f"there can't be a pool in {home}: {os.strerror(error.errno or 0)}{where}",
        "set PODTREE_HOME to a directory that can be written to",
    )


def is_ready(home: Path) -> bool:
    """Whether the pool is made and, if it is a loop file, mounted. A few stats and one statfs."""
    root = home / "pool"
    try:
        if not _is_mounted(home) and (home / "pool.img").exists():
            return False
        return btrfs.is_btrfs(str(root)) and (root / "pods").is_dir()
    except FileNotFoundError:
        return False


def _is_mounted(home: Path) -> bool:
    return os.stat(home / "pool").st_dev != os.stat(home).st_dev


def _make_home(home: Path) -> None:
    """The pool's place, for root alone. One that holds other things keeps its mode: all that is ours in it is private.

    Raises Conflict where others may write (/tmp): they could put their own files in the place of ours.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    foreign = set(os.listdir(home)) - _OWN
    if not foreign:
        os.chmod(home, 0o700)
    elif os.stat(home).st_mode & 0o022:
        raise Conflict(
            f"{home} holds other things, and others than root may write there",
            f"set PODTREE_HOME to a directory of its own, such as {home / 'podtree'}",
        )


def _make_directory(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chmod(path, 0o700)


def _prepare_locked(home: Path, root: Path, initial_size: int | None) -> None:
    for directory in (root, home / "run", home / "locks"):
        _make_directory(directory)
    image = home / "pool.img"
    if image.exists() or not btrfs.is_btrfs(str(root)):
        if not image.exists():
            _make_image(image, initial_size)
        if not _is_mounted(home):
            _mount(image, root)
    os.chmod(root, 0o700)
    # "pods" comes last: it is the sign that the rest is there, or was: an index that is lost isn't replaced.
    if not (root / "pods").exists():
        index.create(str(root / "index.sqlite"))
    for name in ("ckpts", "drafts", "trash", "pods"):
        _make_directory(root / name)
    btrfs.commit_transaction(str(root))


def _make_image(image: Path, initial_size: int | None) -> None:
    import shutil  # these two are slow to load, and needed once
    import subprocess

    tool = shutil.which("mkfs.btrfs", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if tool is None:
        raise Unsupported(
            "mkfs.btrfs is missing, it is needed once, to make the pool",
            "install Debian's or Ubuntu's package btrfs-progs, or set PODTREE_HOME to a directory on btrfs",
        )
    size = initial_size or _initial_size(image.parent)
    draft = image.with_name("pool.img.new")
    draft.unlink(missing_ok=True)
    fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size)
        # Metadata twice: a damaged block then costs at most a checkpoint, never the pool (0.3 ms a snapshot).
        command = [tool, "-q", "-K", "-L", "podtree", "-m", "dup", "-d", "single", str(draft)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise PodtreeError(f"mkfs.btrfs failed on {draft}: {done.stderr.strip()}")
        os.fsync(fd)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    os.rename(draft, image)
    _fsync_directory(image.parent)


def _initial_size(home: Path) -> int:
    stat = os.statvfs(home)
    free = stat.f_bavail * stat.f_frsize
    if free < 2 * SMALLEST:
        raise PodtreeError(
            f"only {free // MIB} MiB are free in {home}, a pool needs at least {2 * SMALLEST // MIB} MiB",
            "free some space, or set PODTREE_HOME to another place",
        )
    return max(SMALLEST, min(LARGEST_AT_FIRST, free // 2)) // MIB * MIB


def _fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _open_loop(image: Path) -> tuple[int, str]:
    """A loop device of the pool file. Never a second one: two mounts through two devices would destroy it.

    (The file may be attached already, mounted in a mount namespace that isn't ours.)
    """
    for number in loop.attached(str(image)):
        fd = loop.open_attached(number, str(image))
        if fd is not None:
            return fd, f"/dev/loop{number}"
    return loop.attach(str(image))


def _mount(image: Path, root: Path) -> None:
    fd, device = _open_loop(image)
    try:
        # discard=async: what btrfs frees becomes a hole in the file again.
        syscall(
            NR.mount,
            device.encode() + b"\0",
            os.fsencode(root) + b"\0",
            b"btrfs\0",
            _MS_NOATIME | _MS_NODEV | _MS_NOSUID,
            b"discard=async\0",
        )
    except OSError as error:
        raise PodtreeError(
            f"can't mount the pool {image} on {root}: {os.strerror(error.errno or 0)}",
            "the kernel's log (dmesg) says why; is btrfs in this kernel? see `podtree doctor`",
        ) from None
    finally:
        os.close(fd)


def unmount(home: Path, timeout: float = 5.0) -> bool:
    """Unmount the pool and wait until its loop device is free. False when it wasn't mounted.

    Raises Conflict when something still uses it.
    """
    root, image = home / "pool", home / "pool.img"
    if not image.exists():
        return False
    with locks.held(str(home / "lock"), what=f"the pool in {home}"):
        if not root.exists() or not _is_mounted(home):
            return False
        deadline = time.monotonic() + timeout
        while True:
            try:
                syscall(NR.umount2, os.fsencode(root) + b"\0", 0)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise Conflict(
                        f"the pool {root} is in use", "stop the pods in it first: podtree ps, podtree stop"
                    ) from None
                time.sleep(0.02)
        while any(loop.attached(str(image))) and time.monotonic() < deadline:
            time.sleep(0.01)
    return True


def pool_file(home: Path) -> PoolFile | None:
    """The sparse file's numbers; None where the pool is a directory on btrfs."""
    image = home / "pool.img"
    try:
        stat = image.stat()
    except FileNotFoundError:
        return None
    below = os.statvfs(home)
    reserve = max(SMALLEST, below.f_blocks * below.f_frsize // 50)
    promised = stat.st_size - stat.st_blocks * 512
    growable = below.f_bavail * below.f_frsize - reserve - promised
    return PoolFile(
        path=str(image), size=stat.st_size, allocated=stat.st_blocks * 512, growable=max(0, growable)
    )


def disk_free(home: Path) -> int:
    """Bytes free on the file system that PODTREE_HOME lies on."""
    stat = os.statvfs(home)
    return stat.f_bavail * stat.f_frsize


def grow(home: Path, by: int) -> int:
    """Enlarge the pool by up to `by` bytes, as far as the disk allows; returns by how much.

    Order: file, device, file system; a death in between leaves a larger file, which the next growth uses.
    """
    with locks.held(str(home / "lock"), what=f"the pool in {home}"):
        now = pool_file(home)
        if now is None:
            return 0
        step = min(by, now.growable) // MIB * MIB
        if step <= 0:
            return 0
        fd = os.open(now.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.ftruncate(fd, now.size + step)
            os.fsync(fd)
        finally:
            os.close(fd)
        for number in loop.attached(now.path):
            device = loop.open_attached(number, now.path)
            if device is not None:
                loop.update_capacity(device)
                os.close(device)
        btrfs.resize(str(home / "pool"), "max")
        return step


def give_back(home: Path) -> None:
    """Make holes in the pool's file where the pool has free space, now and not when the kernel comes to it."""
    if (home / "pool.img").exists():
        with contextlib.suppress(OSError):  # a file system below that can't make holes
            loop.trim(str(home / "pool"))
