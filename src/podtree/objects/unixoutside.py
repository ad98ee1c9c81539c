"""Unix sockets whose other end is outside of the pod, as of a server's socket that `-v` shows.

Cut off, it is as if the other end had gone. Kept, a branch connects anew to the server's name: as whoever uses the
socket now, and without what was under way, so there may be nothing.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
from pathlib import PurePosixPath

from podtree.errors import RestoreFailed
from podtree.kernel import sock as ksock
from podtree.kernel.sockdiag import NetworkNamespace, UnixDiag
from podtree.objects import external
from podtree.objects.held import open_in, path_bytes, path_text
from podtree.objects.impersonate import Credentials, run_as
from podtree.objects.socketcommon import Entry, Surroundings

BOTH = 3  # shut down for receiving and sending


def settle_strange(entry: Entry, around: Surroundings) -> external.Policy:
    """What is done with a socket of a network namespace that is not the pod's.

    That is also the one that accept(2) gives for a client outside: it is of the client's namespace.
    """
    return external.settle(
        around.ctx.external,
        lambda reason, hint: around.refuse(entry, reason, hint or "start it inside the pod"),
        "made in a network namespace that is not the pod's",
        close="a branch has it in its own, with no other end" if entry.family == socket.AF_UNIX else "",
    )


def of_strangers(entries: list[Entry], known: dict[int, UnixDiag]) -> dict[int, UnixDiag]:
    """What the kernel tells of those that aren't `known` since they are of other network namespaces."""
    found: dict[int, UnixDiag] = {}
    for entry in entries:
        if entry.ino not in known and entry.ino not in found:
            namespace = NetworkNamespace(entry.sock)
            found |= namespace.diag.unix()
            namespace.close()
    return {entry.ino: found[entry.ino] for entry in entries if entry.ino in found}


def is_outside(entry: Entry, diag: UnixDiag, around: Surroundings) -> bool:
    """Whether somebody outside of the pod has the other end of a connected socket, or has yet to accept it.

    An end without a number is gone, or has not been accepted. The first shuts a connection down at both ends
    (net/unix/af_unix.c, unix_release_sock(), Linux 6.18); of a datagram socket it is gone.
    """
    if diag.peer:
        return diag.peer not in around.by_ino
    return entry.type != socket.SOCK_DGRAM and diag.shutdown != BOTH


def settle(entry: Entry, diag: UnixDiag, around: Surroundings) -> tuple[external.Policy, str]:
    """What is done with such a socket, and by which name a branch can connect again."""
    name = "" if _is_busy(entry, diag) else _name_inside(entry, around)
    policy = external.settle(
        around.ctx.external,
        lambda reason, hint: around.refuse(entry, reason, hint),
        "its other end is not held by any process of the pod",
        close="a branch finds it closed",
        keep=f"a branch connects anew to {os.fsdecode(path_bytes(name))}" if name else "",
    )
    return policy, name


def _is_busy(entry: Entry, diag: UnixDiag) -> bool:
    """Whether something is under way, or it is half closed: a new connection would be another one."""
    fd = entry.sock.fileno()
    return bool(diag.shutdown or ksock.events(fd) & select.POLLIN or ksock.unsent(fd))


def _name_inside(entry: Entry, around: Surroundings) -> str:
    """The path in the pod of the server's socket, whose name is one of the host; "" if there is none."""
    peer = entry.sock.getpeername()
    name = os.fsencode(peer) if isinstance(peer, str) else peer
    if not name.startswith(b"/"):
        return ""
    with contextlib.suppress(OSError):
        wanted = os.stat(name)
        root = os.open(f"/proc/{entry.process.host_pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for path in _candidates(name, around.ctx.shown):
                if _is_socket(root, path, wanted):
                    return path_text(path)
        finally:
            os.close(root)
    return ""


def _candidates(name: bytes, shown: tuple[bytes, ...]) -> list[bytes]:
    parts = PurePosixPath(os.fsdecode(name)).parts[1:]
    ends = [os.fsencode(os.path.join(*parts[at:])) for at in range(len(parts))]
    return [path for point in shown for path in (point, *(point + b"/" + end for end in ends))]


def _is_socket(root: int, path: bytes, wanted: os.stat_result) -> bool:
    try:
        fd = open_in(root, path)
    except OSError:
        return False
    try:
        found = os.fstat(fd)
        return stat.S_ISSOCK(found.st_mode) and (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)
    finally:
        os.close(fd)


def connect(sock: socket.socket, path: str, who: Credentials | None) -> None:
    """Connect a branch's socket to the server that is at `path` now, as `who`."""
    address = path_bytes(path)

    def work() -> list[int]:
        sock.connect(address)
        return []

    try:
        run_as(who, work)
    except (OSError, RestoreFailed) as error:
        raise RestoreFailed(
            f"a socket of the pod was connected to {os.fsdecode(address)}, outside of it: {error}",
            "start the server again, or take the checkpoint with --external close",
        ) from error
