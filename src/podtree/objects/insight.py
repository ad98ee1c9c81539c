"""Kernel memory for the collectors: opened once a supervisor's life, and only if a pod holds what is seen nowhere else.

Opening reads the kernel's type information, a tenth of a second during which nobody is to be kept stopped. So a
collector that would need it is told that it isn't there yet and refuses, the pod runs on, `prepare` opens it, and
the next attempt has it.

PODTREE_KERNEL_MEMORY=off in the environment that a pod is started in does without: for who doesn't want it read.
"""

from __future__ import annotations

import os

from podtree.kernel.kmem import KernelMemory
from podtree.kernel.sockmem import SocketMemory

SWITCH = "PODTREE_KERNEL_MEMORY"
_sockets: SocketMemory | None = None
_wanted = False
_failed = ""


def sockets() -> SocketMemory | None:
    """Sockets in kernel memory; None while it isn't open, or if it can't be (`why_not`)."""
    global _wanted
    _wanted = True
    return _sockets


def memory() -> KernelMemory | None:
    """Kernel memory; None while it isn't open, or if it can't be."""
    found = sockets()
    return found.memory if found else None


def untried() -> bool:
    """Whether it may be there at the next attempt."""
    return _sockets is None and not _failed


def why_not() -> str:
    """Why there is none: for refusals."""
    return f"kernel memory can't be read here: {_failed}" if _failed else ""


def prepare() -> bool:
    """Open it if a collector asked for it; True if that was tried now: then all may look otherwise.

    Nobody should be stopped meanwhile.
    """
    global _sockets, _failed
    if not _wanted or _sockets is not None or _failed:
        return False
    if os.environ.get(SWITCH) == "off":
        _failed = f"{SWITCH} is off"
        return True
    try:
        _sockets = SocketMemory(KernelMemory())
    except (OSError, KeyError, ValueError) as error:  # no BTF, locked down, another layout: then without
        _failed = str(error) or type(error).__name__
    return True


def forget() -> None:
    """Close it (the pod ended, or this process was forked)."""
    global _sockets, _wanted, _failed
    if _sockets is not None:
        _sockets.memory.close()
    _sockets, _wanted, _failed = None, False, ""
