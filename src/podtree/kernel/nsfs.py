"""Namespaces as open files: what ioctl_nsfs(2) tells of them. include/uapi/linux/nsfs.h."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

NS_GET_USERNS, NS_GET_PARENT, NS_GET_OWNER_UID = 0xB701, 0xB702, 0xB704


def identity(fd: int) -> tuple[int, int]:
    """What two descriptors of one namespace have in common: device and inode."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def owner_of(fd: int) -> int:
    """A new descriptor of the user namespace that a namespace belongs to; of a user namespace: its parent.

    OSError EPERM where that isn't the caller's own, nor below it.
    """
    return _get(fd, NS_GET_USERNS)


def parent_of(fd: int) -> int:
    """A new descriptor of the parent of a pid or user namespace; -1 where the caller may not see it (it is above)."""
    try:
        return _get(fd, NS_GET_PARENT)
    except PermissionError:
        return -1


def _get(fd: int, request: int) -> int:
    try:
        return fcntl.ioctl(fd, request)
    except OSError as error:
        if error.errno == errno.ENOTTY:
            raise OSError(error.errno, "no namespace") from error
        raise


def owner_uid(fd: int) -> int:
    """The user (as the caller's user namespace numbers them) that made a user namespace."""
    (uid,) = struct.unpack("I", fcntl.ioctl(fd, NS_GET_OWNER_UID, bytes(4)))
    return int(uid)
