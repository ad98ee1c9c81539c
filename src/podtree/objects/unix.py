"""Unix sockets: pairs, listeners, connections, datagrams; what is queued in them, and their names.

Source: unix(7), sock_diag(7); net/unix/af_unix.c (Linux 6.18).

A connection has no life outside of its two ends, so it is made anew: by socketpair(2), or, where one end
got its name from a listener, through a listener of that name; then what was queued is sent again. Nothing
of this can be told from the original: not the names, not who the other end was (SO_PEERCRED), not the
order or the bounds of what is queued. The restoring half is in podtree.objects.unixrestore.
"""

from __future__ import annotations

import os
import socket
import struct

import msgspec

from podtree.kernel import procfs
from podtree.kernel import sock as ksock
from podtree.kernel.sock import Peeked, TcpState
from podtree.kernel.sockdiag import UnixDiag
from podtree.kernel.sockmem import Sender, SocketMemory, UnixEmbryo
from podtree.objects import external, insight, unixoutside
from podtree.objects.held import DELETED, path_text
from podtree.objects.impersonate import Credentials, peer_pids
from podtree.objects.socketcommon import RETRY, Entry, SocketBase, Surroundings

MESSAGES = (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)
OVERFLOW_ID = 65534
SO_COOKIE, SO_PASSPIDFD = 57, 76  # asm-generic/socket.h; a cookie is a number that no other socket ever has
_known_peers: dict[bytes, int] = {}


class SocketFile(msgspec.Struct, frozen=True):
    """The file that a socket is bound to, where it still has a name; times in ns."""

    path: str
    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int


class UnixMessage(msgspec.Struct, frozen=True):
    """What one send(2) put into the queue; of a stream, one run of bytes with the same credentials."""

    data: bytes
    sender: bytes = b""  # name of the socket that sent it, as in sun_path
    sender_id: int | None = None  # file id of that socket, where it is still there
    credentials: Credentials | None = None  # as SCM_CREDENTIALS shows
    files: tuple[int, ...] = ()  # file ids of descriptors sent along (SCM_RIGHTS)


class UnixWaiting(msgspec.Struct, frozen=True):
    """A connection that a listener has yet to accept."""

    client: int | None  # file id of the other end; None: it is gone
    name: bytes = b""  # of an end that is gone
    credentials: Credentials | None = None  # who connected
    queue: tuple[UnixMessage, ...] = ()  # what was sent already


class UnixSocket(SocketBase, frozen=True, kw_only=True, tag="unix"):
    """One unix socket. Names are as in sun_path: b"" unnamed, a leading NUL for an abstract name."""

    name: bytes = b""
    file: SocketFile | None = None
    listening: bool = False
    backlog: int = 0
    waiting: tuple[UnixWaiting, ...] = ()  # of a listener: first come first
    connected: bool = False
    peer: int | None = None  # file id; None while connected: the other end is gone
    lost_name: bytes = b""  # name of an other end that is gone
    accepted: bool = False  # got its name from a listener, by accept(2)
    shutdown: int = 0  # 1 receiving, 2 sending
    reset: bool = False  # the other end went without having read everything: ECONNRESET is pending
    credentials: Credentials | None = None  # SO_PEERCRED
    queue: tuple[UnixMessage, ...] = ()
    outside: str = ""  # a server's socket that isn't the pod's, to be connected to anew
    user: Credentials | None = None  # as whom


# --- collect -----------------------------------------------------------------------------------------

POLLIN, POLLPRI, POLLERR = 0x1, 0x2, 0x8


def peek(entry: Entry) -> list[Peeked]:
    """What waits in a socket's queue, nothing consumed. Nothing if a look would consume something else.

    Descriptors on their way are duplicated into this process; they are the caller's to close.
    """
    sock, fd = entry.sock, entry.sock.fileno()
    events = ksock.events(fd)
    if not events & POLLIN or events & POLLPRI or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return []
    if entry.type == socket.SOCK_STREAM:
        return ksock.peek_stream(sock)
    if events & POLLERR or sock.getsockopt(socket.SOL_SOCKET, ksock.SO_PEEK_OFF) >= 0:
        return []  # a datagram receive reports the error first
    closing = entry.type == socket.SOCK_SEQPACKET and events & ksock.POLLRDHUP
    return ksock.peek_messages(sock, ksock.queued(fd) if closing else None)


class _Collector:
    def __init__(self, entries: list[Entry], around: Surroundings) -> None:
        self.around = around
        self.entries = entries
        self.diag = around.namespace.diag.unix()
        self.diag |= unixoutside.of_strangers(entries, self.diag)
        self.pod_pids = {process.host_pid: process.pid for process in around.ctx.processes}
        #: client's inode -> listener, of connections not accepted yet
        self.waiting = {ino: diag.ino for diag in self.diag.values() for ino in diag.pending if ino}
        self.by_name: dict[tuple[int, bytes], Entry] = {}
        for entry in entries:
            diag = self.diag.get(entry.ino)
            if diag and diag.name and diag.state != TcpState.ESTABLISHED:
                self.by_name[entry.type, diag.name] = entry
        for entry in entries:  # connected datagram sockets hold their names, too
            diag = self.diag.get(entry.ino)
            if diag and diag.name and entry.type == socket.SOCK_DGRAM:
                self.by_name[entry.type, diag.name] = entry
        self.listener_names = {(d.type, d.name) for d in self.diag.values() if d.state == TcpState.LISTEN}
        self.mounts: dict[str, str] = {}
        self.gone: dict[int, int] | None = None
        self.pid_level = -1

    def collect(self, entry: Entry) -> UnixSocket | None:
        diag = self.diag.get(entry.ino)
        if diag is None:
            self.around.refuse(entry, "a unix socket that the kernel's socket diagnosis does not list")
            return None
        events = ksock.events(entry.sock.fileno())
        before = len(self.around.ctx.problems)
        fields = entry.base(self.around)
        fields |= {"name": diag.name, "shutdown": diag.shutdown}
        if len(diag.name) > 107:
            self.around.refuse(entry, "bound to a name of 108 bytes, which can't be bound again")
        if diag.state == TcpState.LISTEN:
            fields |= self._listener(entry, diag)
        elif diag.peer is not None:
            fields |= self._connection(entry, diag, events)
        elif events & 0x8:  # POLLERR
            self.around.refuse(entry, "an error is pending that the program has not read", RETRY)
        if not fields.get("accepted") and self._holds_name(entry, diag):
            fields |= {"file": self._file(entry, diag)}
        fields |= {"credentials": self._peer_credentials(entry)}
        if events & 0x1 and diag.state != TcpState.LISTEN and len(self.around.ctx.problems) == before:
            fields |= {"queue": self._queue(entry, diag, events)}
        if len(self.around.ctx.problems) > before:
            return None
        return msgspec.convert(fields, UnixSocket)

    @staticmethod
    def _holds_name(entry: Entry, diag: UnixDiag) -> bool:
        """Whether the name leads to this socket: not so for connected streams, whose file is not kept."""
        return bool(diag.name) and not diag.name.startswith(b"\0") and not (
            entry.type != socket.SOCK_DGRAM and diag.state == TcpState.ESTABLISHED
        )

    # listeners

    def _listener(self, entry: Entry, diag: UnixDiag) -> dict[str, object]:
        memory = insight.sockets() if diag.pending else None
        if memory is None:
            waiting = [self._guess_waiting(entry, ino) for ino in diag.pending]
        else:
            embryos = memory.embryos(entry.sock.fileno(), self._pid_level(memory))
            waiting = [self._read_waiting(entry, ino, e) for ino, e in zip(diag.pending, embryos, strict=True)]
        return {"listening": True, "backlog": diag.send_queue, "waiting": tuple(w for w in waiting if w)}

    def _pid_level(self, memory: SocketMemory) -> int:
        if self.pid_level < 0:
            init = next(process for process in self.around.ctx.processes if process.pidfd >= 0)
            self.pid_level = memory.pid_level(init.pidfd)
        return self.pid_level

    def _read_waiting(self, entry: Entry, ino: int, embryo: UnixEmbryo) -> UnixWaiting | None:
        """A connection not accepted yet, as kernel memory shows it."""
        client = self.around.by_ino.get(ino)
        if client is None and not embryo.client_gone and not self._cut_off(entry):
            pass
        elif embryo.error:
            self.around.refuse(entry, "a connection waits to be accepted that has an error pending", RETRY)
        elif any(message.files for message in embryo.queue):
            reason = "descriptors are on their way (SCM_RIGHTS) on a connection that is not accepted yet"
            self.around.refuse(client or entry, reason, RETRY)
        else:
            queue = tuple(UnixMessage(m.data, credentials=_credentials(m.sender)) for m in embryo.queue)
            who = _credentials(embryo.made_by)
            return UnixWaiting(client.file_id if client else None, embryo.client_name, who, queue)
        return None

    def _cut_off(self, entry: Entry) -> bool:
        """Whether a client outside of the pod, whose connection isn't accepted yet, is let go; else it is refused."""
        policy = external.settle(
            self.around.ctx.external,
            lambda reason, hint: self.around.refuse(entry, reason, hint or RETRY),
            "a connection waits to be accepted whose client is not in the pod",
            close="a branch finds it closed",
        )
        return policy == "close"

    def _guess_waiting(self, entry: Entry, ino: int) -> UnixWaiting | None:
        """A connection not accepted yet, where nobody can look at it: only with nothing sent."""
        client = self.around.by_ino.get(ino)
        if client is None:
            reason = "a connection waits to be accepted whose client is gone or is not in the pod"
            self.around.refuse(entry, reason, RETRY)
        elif ksock.unsent(client.sock.fileno()):
            reason = "has sent data on a connection that is not accepted yet: it can't be read from outside"
            self.around.refuse(client, reason, RETRY)
        elif self.diag[ino].shutdown:
            self.around.refuse(client, "is shut down already, and not accepted yet", RETRY)
        else:
            return UnixWaiting(client.file_id, credentials=self._holder(client))
        return None

    @staticmethod
    def _holder(entry: Entry) -> Credentials:
        """Who holds a socket: the best guess at who connected it, which only the unaccepted end knows."""
        status = procfs.status(entry.process.living)
        uid, gid = int(status["Uid"].split()[1]), int(status["Gid"].split()[1])
        return Credentials(entry.process.pid, uid, gid, tuple(int(g) for g in status["Groups"].split()))

    # connections

    def _connection(self, entry: Entry, diag: UnixDiag, events: int) -> dict[str, object]:
        fields: dict[str, object] = {"connected": True}
        if entry.ino in self.waiting:
            return fields | {"peer": self._waiting_at(entry)}
        if unixoutside.is_outside(entry, diag, self.around):
            return fields | self._outside(entry, diag, events)
        if diag.peer:
            peer = self.around.by_ino[diag.peer]
            if events & 0x8:
                self.around.refuse(entry, "an error is pending that the program has not read", RETRY)
            other = self.diag[peer.ino]
            if entry.type == socket.SOCK_DGRAM and not other.name and other.peer != entry.ino:
                self.around.refuse(entry, "connected to a datagram socket that has no name and another peer")
            return fields | {"peer": peer.file_id, "accepted": self._was_accepted(entry, diag, other)}
        return fields | self._gone(entry, diag, events)

    def _outside(self, entry: Entry, diag: UnixDiag, events: int) -> dict[str, object]:
        """Of a socket whose other end is outside of the pod."""
        policy, name = unixoutside.settle(entry, diag, self.around)
        if policy == "close":
            return self._gone(entry, diag, events)
        return {"outside": name, "user": self._holder(entry)} if policy == "keep" else {}

    def _gone(self, entry: Entry, diag: UnixDiag, events: int) -> dict[str, object]:
        """Of a socket whose other end is gone."""
        name = entry.sock.getpeername()
        lost = name if isinstance(name, bytes) else os.fsencode(name)
        fields: dict[str, object] = {"lost_name": lost, "reset": bool(events & 0x8)}
        if entry.type == socket.SOCK_DGRAM:
            if events & 0x8:
                self.around.refuse(entry, "an error is pending that the program has not read", RETRY)
            return fields
        return fields | {"accepted": bool(diag.name) and (not lost or (diag.type, diag.name) in self.listener_names)}

    def _waiting_at(self, entry: Entry) -> int | None:
        listener = self.around.by_ino.get(self.waiting[entry.ino])
        if listener is None:
            self.around.refuse(entry, "waits to be accepted by a listener that is not in the pod")
            return None
        return listener.file_id

    def _was_accepted(self, entry: Entry, diag: UnixDiag, other: UnixDiag) -> bool:
        """Of two connected stream sockets, whether this is the one that accept(2) returned."""
        if entry.type == socket.SOCK_DGRAM or not diag.name:
            return False
        if not other.name:
            return True
        mine = (diag.type, diag.name) in self.listener_names
        theirs = (other.type, other.name) in self.listener_names
        # Both have names and neither listener is left: accept(2) gives a socket its inode after connect(2) did.
        return mine if mine != theirs else diag.ino > other.ino

    def _peer_credentials(self, entry: Entry) -> Credentials | None:
        raw = entry.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, gid = struct.unpack("iII", raw)
        if uid == 0xFFFFFFFF:
            return None
        inside = self.pod_pids.get(pid) if pid in self.pod_pids or not pid else self._gone_peers().get(entry.file_id)
        return Credentials(inside or 0, uid, gid, ksock.peer_groups(entry.sock))

    def _gone_peers(self) -> dict[int, int]:
        """By file id: the pids, inside the pod, of peers that have ended. What was learned is kept by socket."""
        if self.gone is None:
            cookies = {e.file_id: e.sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8) for e in self.entries}
            known = {c: _known_peers[c] for c in cookies.values() if c in _known_peers}
            new = [e for e in self.entries if cookies[e.file_id] not in known]
            if new:
                init = next(p.living for p in self.around.ctx.processes if p.pid == 1)
                pids = peer_pids(init, [e.sock.fileno() for e in new])
                known |= {cookies[e.file_id]: pid for e, pid in zip(new, pids, strict=True)}
            _known_peers.clear()
            _known_peers.update(known)
            self.gone = {file_id: known[cookie] for file_id, cookie in cookies.items()}
        return self.gone

    def _pod_pid(self, host_pid: int) -> int:
        """The number inside the pod. Of a process that has ended it is not known any more: the kernel
        shows the program the number that nobody answers to, so another such number is taken."""
        if not host_pid:
            return 0
        if host_pid in self.pod_pids:
            return self.pod_pids[host_pid]
        taken = set(self.pod_pids.values())
        while host_pid in taken:
            host_pid += 1
        return host_pid

    # names

    def _file(self, entry: Entry, diag: UnixDiag) -> SocketFile | None:
        fd = ksock.bound_file(entry.sock)
        if fd is None:
            return None
        try:
            info = os.fstat(fd)
            link = os.readlink(f"/proc/self/fd/{fd}".encode())
            if info.st_nlink == 0 or link.endswith(DELETED):
                return None
            path = path_text(link)
            if not self._own_mount(entry, fd):
                external.settle(
                    self.around.ctx.external,
                    lambda reason, hint: self.around.refuse(entry, reason, hint),
                    f"bound to {os.fsdecode(link)}, in a directory shared with the host: two pods can't both have it",
                    close="nobody reaches a branch by that name",
                )
                return None
            return SocketFile(
                path, info.st_mode & 0o7777, info.st_uid, info.st_gid, info.st_atime_ns, info.st_mtime_ns
            )
        finally:
            os.close(fd)

    def _own_mount(self, entry: Entry, fd: int) -> bool:
        """Whether the file lies in the pod's root or in a tmpfs that only the pod has."""
        mount_id = _mount_id(fd)
        if not self.mounts:
            root = os.open(f"/proc/{entry.process.living}/root", os.O_PATH | os.O_CLOEXEC)
            try:
                self.mounts = {_mount_id(root): "root"}
            finally:
                os.close(root)
        if mount_id not in self.mounts:
            host = {line.split()[2] for line in procfs.read_text("/proc/self/mountinfo").splitlines()}
            for line in procfs.read_text(f"/proc/{entry.process.living}/mountinfo").splitlines():
                words = line.split()
                own = words[2] not in host and words[words.index("-") + 1] in ("tmpfs", "overlay")
                self.mounts.setdefault(words[0], "own" if own else "shared")
        return self.mounts.get(mount_id, "shared") != "shared"

    # queues

    def _queue(self, entry: Entry, diag: UnixDiag, events: int) -> tuple[UnixMessage, ...]:
        if events & POLLPRI:
            self.around.refuse(entry, "an out-of-band byte is queued", RETRY)
            return ()
        stream = entry.type == socket.SOCK_STREAM
        if events & POLLERR and not stream:
            self.around.refuse(entry, "an error is pending in front of queued messages", RETRY)
            return ()
        if entry.peeked and _passes_pidfds(entry.sock):
            self.around.refuse(entry, "messages wait that would bring process descriptors (SO_PASSPIDFD)", RETRY)
            return ()
        with_files = any(files for _, files in entry.peeked)
        if stream and not with_files and all(self._known(peeked) for peeked, _ in entry.peeked):
            return tuple(self._message(entry, diag, peeked, ()) for peeked, _ in entry.peeked)
        # Peeking joins bytes with the message behind them that has descriptors, and may skip empty messages.
        memory = insight.sockets()
        if memory is not None:
            return self._read_queue(entry, diag, memory)
        if insight.untried() or (stream and with_files):
            what = "descriptors are on their way (SCM_RIGHTS)" if with_files else "messages wait in its queue"
            self.around.refuse(entry, f"{what}: only kernel memory shows all of them", insight.why_not() or RETRY)
        elif entry.sock.getsockopt(socket.SOL_SOCKET, ksock.SO_PEEK_OFF) >= 0:
            self.around.refuse(entry, "messages are queued while the program uses SO_PEEK_OFF", RETRY)
        return tuple(self._message(entry, diag, peeked, files) for peeked, files in entry.peeked)

    def _known(self, peeked: Peeked) -> bool:
        """Whether it was sent by a process that is still there, as far as that is told."""
        return all(
            struct.unpack("iII", value[:12])[0] in self.pod_pids
            for level, kind, value in peeked.controls
            if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS
        )

    def _read_queue(self, entry: Entry, diag: UnixDiag, memory: SocketMemory) -> tuple[UnixMessage, ...]:
        """As kernel memory shows it; the descriptors are those that peeking has brought."""
        passed = [files for _, files in entry.peeked if files]
        found = []
        for message in memory.unix_queue(entry.sock.fileno(), self._pid_level(memory)):
            files: tuple[int, ...] = ()
            if message.files:
                files = passed.pop(0) if passed else ()
                if len(files) != len(message.files):
                    reason = "descriptors are on their way in an empty message, which can't be looked at twice"
                    self.around.refuse(entry, reason, RETRY)
            sender = message.name if entry.type == socket.SOCK_DGRAM else b""
            sender_id = self._sender(entry, diag, sender)
            found.append(UnixMessage(message.data, sender, sender_id, _credentials(message.sender), files))
        return tuple(found)

    def _message(self, entry: Entry, diag: UnixDiag, peeked: Peeked, files: tuple[int, ...]) -> UnixMessage:
        sender = b""
        if entry.type == socket.SOCK_DGRAM and peeked.address:
            address = peeked.address
            sender = address if isinstance(address, bytes) else os.fsencode(str(address))
        credentials = None
        for level, kind, value in peeked.controls:
            if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                pid, uid, gid = struct.unpack("iII", value[:12])
                if pid or uid != OVERFLOW_ID:
                    credentials = Credentials(self._pod_pid(pid), uid, gid)
        return UnixMessage(peeked.data, sender, self._sender(entry, diag, sender), credentials, files)

    def _sender(self, entry: Entry, diag: UnixDiag, name: bytes) -> int | None:
        """File id of the socket that sent a message, if it is known."""
        by = self.by_name.get((entry.type, name)) if name else None
        peer = self.around.by_ino.get(diag.peer or 0)
        if not name and peer and not self.diag[peer.ino].name:
            by = peer  # nobody else can send to, or from, a pair without names
        return by.file_id if by else None


def _credentials(sender: Sender | None) -> Credentials | None:
    return Credentials(sender.pid, sender.uid, sender.gid, sender.groups) if sender else None


def _passes_pidfds(sock: socket.socket) -> bool:
    """Who sends again what was sent has the same number, but isn't the same process: a pidfd would tell."""
    try:
        return bool(sock.getsockopt(socket.SOL_SOCKET, SO_PASSPIDFD))
    except OSError:  # before Linux 6.5
        return False


def _mount_id(fd: int) -> str:
    for line in procfs.read_text(f"/proc/self/fdinfo/{fd}").splitlines():
        if line.startswith("mnt_id:"):
            return line.split()[1]
    return ""


def collect(entries: list[Entry], around: Surroundings) -> dict[int, UnixSocket]:
    """States of these sockets by file id."""
    if not entries:
        return {}
    collector = _Collector(entries, around)
    states = {entry.file_id: collector.collect(entry) for entry in entries}
    return {file_id: state for file_id, state in states.items() if state is not None}

