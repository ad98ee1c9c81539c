"""Loop devices: a file as a block device.

Numbers and structures: include/uapi/linux/loop.h (Linux 6.18); man loop(4).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator

LOOP_CLR_FD = 0x4C01
LOOP_GET_STATUS64 = 0x4C05
LOOP_SET_CAPACITY = 0x4C07
LOOP_SET_DIRECT_IO = 0x4C08
LOOP_CONFIGURE = 0x4C0A
LOOP_CTL_GET_FREE = 0x4C82
FITRIM = 3 << 30 | 24 << 16 | ord("X") << 8 | 121

LO_FLAGS_AUTOCLEAR = 4
LO_FLAGS_DIRECT_IO = 16

_MAJOR = 7  # Documentation/admin-guide/devices.txt
_INFO64 = struct.Struct("=5Q4I64s64s32s2Q")  # struct loop_info64
_CONFIG = struct.Struct(f"=II{_INFO64.size}s64x")  # struct loop_config


def _open_device(number: int) -> int:
    path = f"/dev/loop{number}"
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:  # no udev or devtmpfs here: make the node as it would
        os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(_MAJOR, number))
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def attached(path: str) -> Iterator[int]:
    """Numbers of the loop devices that are backed by the file at `path`."""
    target = os.stat(path)
    for entry in os.scandir("/sys/block"):
        if not entry.name.startswith("loop") or not os.path.exists(f"{entry.path}/loop"):
            continue
        number = int(entry.name[4:])
        try:
            fd = _open_device(number)
        except OSError:
            continue
        try:
            if backing(fd) == (target.st_dev, target.st_ino):
                yield number
        finally:
            os.close(fd)


def backing(device_fd: int) -> tuple[int, int] | None:
    """(device, inode) of the file behind an open loop device, None when it has none."""
    buffer = bytearray(_INFO64.size)
    try:
        fcntl.ioctl(device_fd, LOOP_GET_STATUS64, buffer)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise
    device, inode, *_rest = _INFO64.unpack(buffer)
    return device, inode


def attach(path: str, *, block_size: int = 4096, direct_io: bool = True) -> tuple[int, str]:
    """Put the file behind a free loop device that clears itself when its last user (a mount) is gone.

    Returns (descriptor of the device, its path): keep the descriptor until the device is mounted,
    closing it earlier clears the device. Direct I/O, where the file's file system has it, saves
    the second copy in the page cache. LOOP_CONFIGURE exists since Linux 5.8.
    """
    backing_fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        while True:
            number = _get_free()
            device_fd = _open_device(number)
            try:
                _configure(device_fd, backing_fd, os.fsencode(path), block_size, direct_io)
                return device_fd, f"/dev/loop{number}"
            except OSError as error:
                os.close(device_fd)
                if error.errno != errno.EBUSY:  # EBUSY: another process took this one; try the next
                    raise OSError(error.errno, f"attach to /dev/loop{number}: {error.strerror}", path) from None
    finally:
        os.close(backing_fd)


def _get_free() -> int:
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(control, LOOP_CTL_GET_FREE)
    finally:
        os.close(control)


def _configure(device_fd: int, backing_fd: int, name: bytes, block_size: int, direct_io: bool) -> None:
    for flags in [LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO, LO_FLAGS_AUTOCLEAR][not direct_io :]:
        info = _INFO64.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, name[:63], b"", b"", 0, 0)
        try:
            fcntl.ioctl(device_fd, LOOP_CONFIGURE, bytearray(_CONFIG.pack(backing_fd, block_size, info)))
            return
        except OSError as error:
            if error.errno != errno.EINVAL or not flags & LO_FLAGS_DIRECT_IO:
                raise


def open_attached(number: int, path: str) -> int | None:
    """Open loop device `number` if it is (still) backed by the file at `path`."""
    target = os.stat(path)
    fd = _open_device(number)
    if backing(fd) == (target.st_dev, target.st_ino):
        return fd
    os.close(fd)
    return None


def update_capacity(device_fd: int) -> None:
    """Let the device take over the grown size of its file (LOOP_SET_CAPACITY)."""
    fcntl.ioctl(device_fd, LOOP_SET_CAPACITY)


def trim(mounted_at: str) -> int:
    """Tell the device below a mounted file system what is free: holes in a loop device's file.

    Returns the bytes that were discarded (FITRIM, linux/fs.h struct fstrim_range; fstrim(8)).
    """
    wanted = bytearray(struct.pack("=QQQ", 0, (1 << 64) - 1, 0))
    fd = os.open(mounted_at, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, FITRIM, wanted)
    finally:
        os.close(fd)
    discarded: int = struct.unpack("=QQQ", wanted)[1]
    return discarded
