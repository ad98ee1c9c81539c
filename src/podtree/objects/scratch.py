"""Names for files that are unlinked again at once: what has no name in the pod is given one to be opened by."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator

from podtree.errors import RestoreFailed


@contextlib.contextmanager
def kept_times(directory: bytes, dir_fd: int | None = None) -> Iterator[None]:
    """Give a directory its access and modification times back after names in it came and went."""
    st = os.stat(directory, dir_fd=dir_fd)
    try:
        yield
    finally:
        os.utime(directory, ns=(st.st_atime_ns, st.st_mtime_ns), dir_fd=dir_fd)


@contextlib.contextmanager
def temporary_name(
    path: bytes, make: Callable[[bytes], object], remove: Callable[[bytes], object]
) -> Iterator[bytes]:
    """A name that exists inside the `with`: `path` itself, or if that is taken or its directory is gone, another.

    `make` and `remove` get the name; the directory's times are as before afterwards. With its old name, a file looks
    the same in /proc/PID/fd as it did. Raises RestoreFailed if no name can be had.
    """
    error: OSError | None = None
    for name in (path, b"/.podtree-" + secrets.token_hex(16).encode()):
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(kept_times(os.path.dirname(name)))
                make(name)
            except OSError as reason:
                error = reason
                continue
            stack.callback(remove, name)
            yield name
            return
    raise RestoreFailed(f"can't make {os.fsdecode(path)} again: {error}") from error
