"""Character devices without state of their own: null, zero, full, random, urandom (null(4), full(4), random(4))."""

from __future__ import annotations

import os
import stat

import msgspec

from podtree.errors import RestoreFailed
from podtree.kernel import fdops
from podtree.objects.context import CollectContext
from podtree.objects.files import OPEN_FLAGS
from podtree.objects.held import Held, PodView, path_bytes, path_text

#: (major, minor) -> usual path: Documentation/admin-guide/devices.txt
STATELESS = {
    (1, 3): "/dev/null",
    (1, 5): "/dev/zero",
    (1, 7): "/dev/full",
    (1, 8): "/dev/random",
    (1, 9): "/dev/urandom",
}


class Device(msgspec.Struct, frozen=True, tag="device"):
    """One of STATELESS; `path` is where it was opened, or its usual path where that is not the pod's."""

    path: str
    major: int
    minor: int


def collect(held: Held, ctx: CollectContext, view: PodView) -> Device | None:
    """State of a character device; None when refused."""
    number = os.major(held.stat.st_rdev), os.minor(held.stat.st_rdev)
    if held.kind != stat.S_IFCHR or number not in STATELESS:
        held.refuse(
            ctx,
            f"{'block' if held.kind == stat.S_IFBLK else 'character'} device {number[0]}:{number[1]} "
            "has state in the kernel or hardware",
            "close it before the checkpoint",
        )
        return None
    # Whatever /dev/null it is, the pod's own is as good: also when it was passed in from outside.
    name = view.current_name(held) if view.mount_of(held) else None
    return Device(path_text(name) if name else STATELESS[number], *number)


def restore(state: Device, flags: int) -> int:
    """Open it again; only a device of that very number is ever opened."""
    wanted = STATELESS.get((state.major, state.minor))
    if wanted is None:
        raise RestoreFailed(f"the image wants device {state.major}:{state.minor} opened, which is not allowed")
    for path in (path_bytes(state.path), wanted.encode()):
        try:
            probe = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            found = os.fstat(probe)
            if stat.S_ISCHR(found.st_mode) and found.st_rdev == os.makedev(state.major, state.minor):
                return fdops.reopen(probe, flags & OPEN_FLAGS & ~os.O_DIRECTORY)
        finally:
            os.close(probe)
    raise RestoreFailed(f"the pod has no device {wanted} ({state.major}:{state.minor})")
