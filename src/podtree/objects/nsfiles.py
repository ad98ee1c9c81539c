"""Descriptors of namespaces (/proc/PID/ns, namespaces(7)): of the pod's own."""

from __future__ import annotations

import contextlib
import os
import re

import msgspec

from podtree.errors import Damaged
from podtree.objects.context import CollectContext
from podtree.objects.held import Held

NAMES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
_LINK = re.compile(rb"(\w+):\[\d+\]")


class NamespaceFile(msgspec.Struct, frozen=True, tag="namespace"):
    """`name` as in /proc/PID/ns."""

    name: str


def is_one(held: Held) -> bool:
    """Whether it is a namespace."""
    return bool(_LINK.fullmatch(held.link))


def collect(held: Held, ctx: CollectContext) -> NamespaceFile | None:
    """State of a namespace's descriptor; None when refused."""
    first = next(p.living for p in ctx.processes if not p.zombie)
    for name in NAMES:
        with contextlib.suppress(FileNotFoundError):  # a kernel without that kind
            found = os.stat(f"/proc/{first}/ns/{name}")
            if (found.st_dev, found.st_ino) == held.inode:
                return NamespaceFile(name)
    held.refuse(ctx, "it is a namespace that is not the pod's", "close it")
    return None


def path_of(state: NamespaceFile) -> bytes:
    """Where the pod's first process finds it. Raises Damaged."""
    if state.name not in NAMES:
        raise Damaged(f"the image has an impossible namespace: {state.name!r}")
    return f"/proc/self/ns/{state.name}".encode()
