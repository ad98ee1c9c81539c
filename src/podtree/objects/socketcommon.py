"""What the collectors and restorers of all socket families share."""

from __future__ import annotations

import dataclasses
import os
import socket
import stat

import msgspec

from podtree.kernel import sock as ksock
from podtree.kernel.sock import Peeked
from podtree.kernel.sockdiag import NetworkNamespace
from podtree.objects import insight
from podtree.objects.context import CollectContext, FrozenProcess
from podtree.objects.multicast import Groups
from podtree.objects.sockopts import SO_LOCK_FILTER, Defaults, Options, apply_options, read_filter

RETRY = "it passes by itself: try again"


class SocketBase(msgspec.Struct, frozen=True, kw_only=True):
    """What every socket has. `options`: those that differ from a fresh socket's, as getsockopt(2) gives them."""

    socktype: int  # SOCK_STREAM, ...
    uid: int  # owner as fstat(2) shows, and as the kernel charges it
    gid: int
    mode: int = 0o777
    options: Options = {}
    filter: bytes = b""  # SO_ATTACH_FILTER: an array of struct sock_filter
    filter_locked: bool = False  # SO_LOCK_FILTER
    group_index: int = 0  # its place in its SO_REUSEPORT group
    steering: bytes = b""  # SO_ATTACH_REUSEPORT_CBPF: what chooses in that group
    space: int = 0  # id of its net namespace, if that isn't the pod's


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
        program = read_filter(self.sock)
        if program is None:
            around.refuse(self, "has an eBPF program attached (SO_ATTACH_BPF), which can't be read back")
        index, steering = self._group(around)
        return {
            "group_index": index,
            "steering": steering,
            "socktype": self.type,
            "uid": self.uid,
            "gid": self.gid,
            "mode": self.mode,
            "options": around.defaults.changed(self.sock, self.family, self.type, self.protocol, connected),
            "filter": program or b"",
            "filter_locked": bool(program) and bool(self.sock.getsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER)),
        }

    def _group(self, around: Surroundings) -> tuple[int, bytes]:
        """Its place in a group of one address, and the program that chooses there: only kernel memory shows them."""
        if self.family not in (socket.AF_INET, socket.AF_INET6) or self.type == socket.SOCK_RAW:
            return 0, b""
        if not self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT):
            return 0, b""
        memory = insight.sockets()
        if memory is None:
            if insight.untried():
                around.refuse(self, "is one of several at an address, and only kernel memory shows which", RETRY)
            return 0, b""
        group = memory.group(self.sock.fileno())
        if group is not None and group.program is None:
            reason = "an eBPF program chooses in its group (SO_ATTACH_REUSEPORT_EBPF), which can't be read back"
            around.refuse(self, reason)
        return (group.index, group.program or b"") if group else (0, b"")


@dataclasses.dataclass(slots=True)
class Surroundings:
    """What a collector knows besides the socket at hand."""

    ctx: CollectContext
    namespace: NetworkNamespace
    defaults: Defaults
    groups: Groups
    by_ino: dict[int, Entry] = dataclasses.field(default_factory=dict)

    def refuse(self, entry: Entry, reason: str, hint: str = "") -> None:
        """Note that this socket can't be saved."""
        self.ctx.refuse(entry.process, entry.display, reason, hint)


def make_entry(file_id: int, process: FrozenProcess, display: str, local_fd: int) -> Entry:
    """Look at the socket behind `local_fd`; the entry holds a duplicate, closed by `entry.sock.close()`."""
    sock = ksock.adopt(os.dup(local_fd))
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


def steer(sock: socket.socket, state: SocketBase) -> None:
    """Let the program choose again in the socket's group, whose members are all there."""
    if state.steering:
        ksock.attach_program(sock, ksock.SO_ATTACH_REUSEPORT_CBPF, state.steering)


def new_socket(family: int, kind: int, protocol: int = 0) -> socket.socket:
    """A fresh non-blocking close-on-exec socket: nothing in a restore may wait for ever."""
    sock = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
    sock.setblocking(False)
    return sock


def finish(sock: socket.socket, state: SocketBase, what: str) -> None:
    """Give a restored socket its owner, options and filter; the last thing that happens to it."""
    os.fchown(sock.fileno(), state.uid, state.gid)
    if state.mode != 0o777:
        os.fchmod(sock.fileno(), state.mode)
    apply_options(sock, state.options, what)
    if state.filter:
        ksock.attach_program(sock, ksock.SO_ATTACH_FILTER, state.filter)
    if state.filter_locked:
        sock.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)
