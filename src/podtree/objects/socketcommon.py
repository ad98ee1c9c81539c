"""What the collectors and restorers of all socket families share."""

from __future__ import annotations

import dataclasses
import os
import socket
import stat

import msgspec

from podtree.kernel.sock import Peeked
from podtree.kernel.sockdiag import NetworkNamespace
from podtree.objects.context import CollectContext, FrozenProcess
from podtree.objects.sockopts import Defaults, Options, apply_options

RETRY = "it passes by itself: try again"


class SocketBase(msgspec.Struct, frozen=True, kw_only=True):
    """What every socket has. `options`: those that differ from a fresh socket's, as getsockopt(2) gives them."""

    socktype: int  # SOCK_STREAM, ...
    uid: int  # owner as fstat(2) shows, and as the kernel charges it
    gid: int
    mode: int = 0o777
    options: Options = {}


@dataclasses.dataclass(slots=True)
class Entry:
    """One socket of the pod (one open file description) while the pod is frozen; `sock` is a duplicate."""

    file_id: int
    process: FrozenProcess
    display: str
    sock: socket.socket
    family: int
    type: int
    protocol: int
    ino: int
    uid: int
    gid: int
    mode: int
    #: Of a unix socket: what waits in its queue, with the file ids of the descriptors on their way.
    peeked: list[tuple[Peeked, tuple[int, ...]]] = dataclasses.field(default_factory=list)

    def base(self, around: Surroundings, connected: bool = False) -> dict[str, object]:
        """The fields of SocketBase."""
        options = around.defaults.changed(self.sock, self.family, self.type, self.protocol, connected)
        return {"socktype": self.type, "uid": self.uid, "gid": self.gid, "mode": self.mode, "options": options}


@dataclasses.dataclass(slots=True)
class Surroundings:
    """What a collector knows besides the socket at hand."""

    ctx: CollectContext
    namespace: NetworkNamespace
    defaults: Defaults
    by_ino: dict[int, Entry] = dataclasses.field(default_factory=dict)

    def refuse(self, entry: Entry, reason: str, hint: str = "") -> None:
        """Note that this socket can't be saved."""
        self.ctx.refuse(entry.process, entry.display, reason, hint)


def make_entry(file_id: int, process: FrozenProcess, display: str, local_fd: int) -> Entry:
    """Look at the socket behind `local_fd`; the entry holds a duplicate, closed by `entry.sock.close()`."""
    sock = socket.socket(fileno=os.dup(local_fd))
    os.set_inheritable(sock.fileno(), False)
    info = os.fstat(local_fd)
    return Entry(
        file_id=file_id,
        process=process,
        display=display,
        sock=sock,
        family=int(sock.family),
        type=int(sock.type),
        protocol=sock.proto,
        ino=info.st_ino,
        uid=info.st_uid,
        gid=info.st_gid,
        mode=stat.S_IMODE(info.st_mode),
    )


def new_socket(family: int, kind: int, protocol: int = 0) -> socket.socket:
    """A fresh non-blocking close-on-exec socket: nothing in a restore may wait for ever."""
    sock = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
    sock.setblocking(False)
    return sock


def finish(sock: socket.socket, state: SocketBase, what: str) -> None:
    """Give a restored socket its owner and options; the last thing that happens to it."""
    os.fchown(sock.fileno(), state.uid, state.gid)
    if state.mode != 0o777:
        os.fchmod(sock.fileno(), state.mode)
    apply_options(sock, state.options, what)
