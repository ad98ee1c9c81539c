"""Walking paths that a pod controls: everything is resolved inside a given root, never on the host."""

from __future__ import annotations

import errno
import os
import stat

from podtree.errors import PodtreeError
from podtree.kernel.mount import Resolve, openat2


def open_in(root_fd: int, path: str, flags: int = os.O_PATH, *, symlinks: bool = True, mode: int = 0) -> int:
    """Open `path` as a process with its root at `root_fd` would, without /proc's magic links.

    With `symlinks=False` any symbolic link on the way is ELOOP.
    """
    rules = Resolve.IN_ROOT | Resolve.NO_MAGICLINKS | (Resolve(0) if symlinks else Resolve.NO_SYMLINKS)
    return openat2(root_fd, path.lstrip("/") or ".", flags, rules, mode)


def make_in(root_fd: int, path: str, *, directory: bool, symlinks: bool = True) -> int:
    """An O_PATH descriptor of `path`, which is made, with its parents, where it is missing."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    parent = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root_fd)
    for position, name in enumerate(parts, start=1):
        last = position == len(parts)
        try:
            fd = open_in(root_fd, "/".join(parts[:position]), symlinks=symlinks)
        except FileNotFoundError:
            fd = _make(parent, name, directory or not last, path)
        except OSError as error:
            os.close(parent)
            if error.errno == errno.ELOOP:
                raise PodtreeError(f"{path} in the pod's root is, or lies behind, a symbolic link") from error
            raise
        os.close(parent)
        parent = fd
    if stat.S_ISDIR(os.fstat(parent).st_mode) != directory:
        os.close(parent)
        kind = "a directory" if directory else "something else than a directory"
        raise PodtreeError(f"{path} in the pod's root has to be {kind}")
    return parent


def _make(parent: int, name: str, directory: bool, path: str) -> int:
    try:
        if directory:
            os.mkdir(name, 0o755, dir_fd=parent)
        else:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(name, flags, 0o644, dir_fd=parent))
    except FileExistsError:  # a dangling symbolic link
        raise PodtreeError(f"{path} can't be made in the pod's root: {name} is a dangling link") from None
    return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
