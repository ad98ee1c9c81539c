"""File handles: open_by_handle_at(2), and what overlayfs puts into its own (fs/overlayfs/overlayfs.h, Linux 6.18)."""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass

from podtree.kernel.fdops import working_directory
from podtree.kernel.mount import AT_FDCWD
from podtree.kernel.sys import NR, syscall

OVL_FILEID_V1 = 0xF8
OVL_MAGIC = 0xFB
OVL_FH_FLAG_PATH_UPPER = 1 << 2
_OVL_HEAD = struct.Struct("3xBBBBB16x")  # struct ovl_fh: version, magic, length, flags, type, uuid


@dataclass(frozen=True, slots=True)
class FileHandle:
    """struct file_handle: what a file system calls an inode."""

    type: int
    data: bytes


def open_by_handle(directory: int, handle: FileHandle, flags: int) -> int:
    """Open an inode of the file system that `directory` is on; close-on-exec. OSError (ESTALE) if it isn't there.

    `directory` may be O_PATH: it becomes the working directory for a moment, where the call would refuse it.
    """
    raw = struct.pack("Ii", len(handle.data), handle.type) + handle.data
    buffer = ctypes.create_string_buffer(raw, len(raw))
    with working_directory(directory):
        return syscall(NR.open_by_handle_at, AT_FDCWD, buffer, flags | os.O_CLOEXEC)


def below_overlay(handle: FileHandle) -> tuple[bool, FileHandle] | None:
    """Which inode an overlay's inode stands for: (whether of the upper layer, its handle there); None if unknown."""
    if handle.type != OVL_FILEID_V1 or len(handle.data) < _OVL_HEAD.size:
        return None
    version, magic, length, flags, kind = _OVL_HEAD.unpack_from(handle.data)
    if version or magic != OVL_MAGIC:
        return None
    return bool(flags & OVL_FH_FLAG_PATH_UPPER), FileHandle(kind, handle.data[_OVL_HEAD.size : 3 + length])
