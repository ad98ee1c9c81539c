"""What a pod's program may do: capabilities, seccomp, identity. The same for `run` and `exec`.

capabilities(7); the set is the default of other container tools.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from podtree.kernel import caps
from podtree.kernel.caps import Cap
from podtree.kernel.prctl import Prctl, prctl
from podtree.pod import seccomp
from podtree.pod.users import Identity

DEFAULT_CAPS = frozenset(
    {
        Cap.CHOWN, Cap.DAC_OVERRIDE, Cap.FSETID, Cap.FOWNER, Cap.MKNOD, Cap.NET_RAW, Cap.SETGID, Cap.SETUID,
        Cap.SETFCAP, Cap.SETPCAP, Cap.NET_BIND_SERVICE, Cap.SYS_CHROOT, Cap.KILL, Cap.AUDIT_WRITE,
    }
)  # fmt: skip


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Scope with no more than a pod's capabilities in effect: for looking at paths that the pod has made.

    A link in them may lead to what only we could open: /proc/kmsg, say.
    """
    effective, permitted, inheritable = caps.capget()
    caps.capset(effective & caps.mask(DEFAULT_CAPS), permitted, inheritable)
    try:
        yield
    finally:
        caps.capset(effective, permitted, inheritable)


def drop(identity: Identity, filter_program: bytes) -> None:
    """Become `identity` with the default capabilities and the filter; for good.

    Root keeps the set; anybody else has it only as the bound of what a setuid program can give.
    no_new_privs stays off, so that su and sudo work inside; the filter therefore comes first.
    """
    seccomp.install(filter_program)
    caps.drop_bounding(DEFAULT_CAPS)
    prctl(Prctl.SET_KEEPCAPS, 1)
    os.setgroups(identity.groups)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    os.setresuid(identity.uid, identity.uid, identity.uid)
    prctl(Prctl.SET_KEEPCAPS, 0)
    kept = caps.mask(DEFAULT_CAPS) if identity.uid == 0 else 0
    caps.clear_ambient()
    caps.capset(kept & caps.capget()[1], kept & caps.capget()[1], 0)
