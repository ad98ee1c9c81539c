"""TCP sockets over the pod's loopback: listeners, connections with data under way, half-closed ones.

Listeners of Multipath TCP, too, as Go makes them: what plain clients get from those is TCP.

Source: tcp(7); net/ipv4/tcp.c, tcp_input.c (Linux 6.18).

Both ends of every connection are in the pod, so a connection is restored by connecting again, between the
same addresses and ports, and sending again what was under way: the kernel itself then brings about the
state, half-closed ones included, and there is nothing about windows, options or timestamps to get wrong,
as there would be with TCP_REPAIR. What the program can't see is new: sequence numbers, the split of data
under way between the sender's and the receiver's queue, estimates of the round-trip time.

Reading what is under way, without consuming: frozen processes don't stop the kernel's timers, so bytes may
move from a sender's queue to the receiver's while we look. All send queues are read first, then all receive
queues. A byte that moves in between is then seen twice, never missed, and the sequence numbers tell which
ones those are. Only a socket with unacknowledged data, and its peer, ever enter repair mode.
Ends that no process has a descriptor of are the matter of podtree.objects.tcpunheld, the restoring half is in
podtree.objects.tcprestore.
"""

from __future__ import annotations

import dataclasses
import errno
import socket

import msgspec

from podtree.kernel import sock as ksock
from podtree.kernel.sock import TcpState
from podtree.kernel.sockdiag import INET_DIAG_MD5SIG, InetDiag
from podtree.kernel.sockmem import SocketMemory, TcpEnd
from podtree.objects.inet import Address, Key, local_address, pack, remote_address
from podtree.objects.socketcommon import RETRY, Entry, SocketBase, Surroundings
from podtree.objects.tcpunheld import HALF_MADE, ORPHANS, UNACCEPTED, Unheld

POLLERR, POLLPRI = 0x8, 0x2
TCP_ULP = 31
IPPROTO_MPTCP = 262
USUAL_SEGMENT = 65_000  # over `lo` it is a little more, less than that was asked for

FIN_SENT = {TcpState.FIN_WAIT1, TcpState.FIN_WAIT2, TcpState.CLOSING, TcpState.LAST_ACK}
FIN_RECEIVED = {TcpState.CLOSE_WAIT, TcpState.CLOSING, TcpState.LAST_ACK}
RESTORABLE_ERRORS = {errno.ECONNRESET, errno.EPIPE, errno.ECONNREFUSED}


class Waiting(msgspec.Struct, frozen=True):
    """A connection that waits for accept(2): what its listener's end has got, or will by itself."""

    client: int | None  # file id of the other end; None: it is gone
    remote: Address  # of the other end
    local: Address
    data: bytes = b""
    fin: bool = False  # the other end is shut down for sending, or gone
    reset: bool = False  # the other end has broken it off


class TcpSocket(SocketBase, frozen=True, kw_only=True, tag="tcp"):
    """One TCP socket."""

    family: int
    protocol: int = socket.IPPROTO_TCP
    role: str  # "closed", "listening", "connecting", "connected", "finished"
    local: Address
    remote: Address | None = None
    backlog: int = 0
    waiting: tuple[Waiting, ...] = ()  # of a listener: first come first
    #: File id of the other end; None while connected: it is gone, or (`unaccepted`) not accepted yet.
    peer: int | None = None
    unaccepted: bool = False
    incoming: bytes = b""  # received and not read, then what was still under way to this socket
    outgoing: bytes = b""  # sent, and not received by an end that is gone
    fin_sent: bool = False  # shut down for sending
    read_shut: bool = False  # shut down for receiving by its own program
    error: int = 0  # errno that the next call will report
    segment: int = 0  # TCP_MAXSEG with which the connection was made
    saved_syn: bool = False  # the packet that made it can be had (TCP_SAVED_SYN)


@dataclasses.dataclass(slots=True)
class _Seen:
    """One socket while it is being collected."""

    entry: Entry
    state: TcpState
    backlog_used: int
    backlog: int
    local: Address
    remote: Address | None
    events: int
    send_end: int = 0  # sequence number behind the last byte sent (a FIN not counted)
    send_queue: bytes = b""
    received_end: int | None = None  # rcv_nxt, a FIN not counted
    received: bytes = b""
    other: InetDiag | None = None  # the other end, where no process of the pod has a descriptor for it
    orphan: TcpEnd | None = None  # that end, where something is in it

    @property
    def key(self) -> tuple[Key, Key]:
        family = self.entry.family
        assert self.remote is not None
        return self.local.key(family), self.remote.key(family)

    @property
    def has_queue(self) -> bool:
        """Whether what is in its receive queue can be looked at."""
        idle = self.state in (TcpState.LISTEN, TcpState.SYN_SENT) or self.entry.protocol == IPPROTO_MPTCP
        return not idle and not self.events & POLLPRI

    @property
    def connected(self) -> bool:
        return self.state not in (TcpState.LISTEN, TcpState.CLOSE, TcpState.SYN_SENT)


class _Collector:
    def __init__(self, entries: list[Entry], around: Surroundings) -> None:
        self.around = around
        self.diag = around.namespace.diag
        self.unheld = Unheld(self.diag, entries[0].sock.fileno())
        self.seen = [self._look(entry) for entry in entries]
        self.by_key = {
            seen.key: seen
            for seen in self.seen
            if seen.remote is not None and seen.state not in (TcpState.LISTEN, TcpState.CLOSE)
        }
        #: by file id of the listener, and all their clients' sides
        self.waiting: dict[int, list[Waiting]] = {}
        self.claimed: set[tuple[Key, Key]] = set()

    def _look(self, entry: Entry) -> _Seen:
        while True:  # a FIN may come in between: state and events must be of the same moment
            state, used, backlog = ksock.tcp_info(entry.sock)
            events = ksock.events(entry.sock.fileno())
            if ksock.tcp_info(entry.sock)[0] == state:
                break
        remote = remote_address(entry.sock) if state != TcpState.LISTEN else None
        if state == TcpState.SYN_SENT:  # getpeername(2) does not tell yet
            for other in self.diag.inet(entry.family, socket.IPPROTO_TCP, 1 << state):
                if other.ino == entry.ino:
                    remote = _address(other.family, other.remote)
        return _Seen(entry, state, used, backlog, local_address(entry.sock), remote, events)

    def peer(self, seen: _Seen) -> _Seen | None:
        here, there = seen.key
        return self.by_key.get((there, here))

    def run(self) -> dict[int, TcpSocket]:
        self._read_queues()
        states = {}
        for seen in self.seen:
            before = len(self.around.ctx.problems)
            fields = self._fields(seen)
            if len(self.around.ctx.problems) == before:
                states[seen.entry.file_id] = msgspec.convert(fields, TcpSocket)
        return states

    # queues

    def _read_queues(self) -> None:
        """First all send queues, then all receive queues: see the module's text."""
        plain = [seen for seen in self.seen if seen.entry.protocol == socket.IPPROTO_TCP]
        senders = [seen for seen in plain if seen.connected and ksock.unsent(seen.entry.sock.fileno())]
        if not senders:
            self._read_all(senders)
            return
        self.around.ctx.hold()  # a program that reads from a socket in repair mode gets EPERM
        try:
            self._read_all(senders)
        finally:
            self.around.ctx.let_go()

    def _read_all(self, senders: list[_Seen]) -> None:
        for seen in senders:
            sock = seen.entry.sock
            with ksock.repair(sock):
                fin = seen.state in FIN_SENT
                end = ksock.queue_sequence(sock, ksock.TCP_SEND_QUEUE)
                seen.send_queue = ksock.peek_send_queue(sock, ksock.unsent(sock.fileno()))
                seen.send_end = end - fin & 0xFFFFFFFF
        for seen in self.seen:
            if seen.remote is not None and seen.connected and not self.peer(seen):
                self._look_at_other(seen)
        for seen in self.seen:
            if seen.state == TcpState.LISTEN and seen.backlog_used:
                self.waiting[seen.entry.file_id] = self._waiting(seen)
        measured = {id(peer) for seen in senders if seen.send_queue and (peer := self.peer(seen))}
        for seen in self.seen:
            if seen.has_queue:
                self._read_received(seen, id(seen) in measured)

    def _look_at_other(self, seen: _Seen) -> None:
        """The other end has no descriptor in the pod. What it has still to send is read before all receive queues."""
        assert seen.remote is not None
        seen.other = other = self.unheld.lookup(seen.entry.family, seen.remote, seen.local)
        if other is None:
            return
        if INET_DIAG_MD5SIG in other.attributes:
            self.around.refuse(seen.entry, "uses TCP MD5 signatures")
        fin = other.state in (TcpState.FIN_WAIT1, TcpState.CLOSING, TcpState.LAST_ACK)
        if not other.ino and other.state in ORPHANS and other.send_queue - fin > 0:
            here, there = seen.key
            if self.unheld.memory is None:
                reason = "closed by the other end with data still under way: it can't be read from outside"
                self.around.refuse(seen.entry, reason, RETRY)
            else:
                seen.orphan = self.unheld.end(there, here)

    def _read_received(self, seen: _Seen, measure: bool) -> None:
        sock = seen.entry.sock
        if seen.orphan:
            memory = self.unheld.memory
            assert memory is not None
            end = memory.tcp_end(memory.memory.sock(sock.fileno()))
            seen.received, seen.received_end = end.received, end.received_end
            return
        if not measure:
            seen.received = b"".join(run.data for run in ksock.peek_stream(sock))
            return
        with ksock.repair(sock):
            while True:
                sequence = ksock.queue_sequence(sock, ksock.TCP_RECV_QUEUE)
                seen.received = b"".join(run.data for run in ksock.peek_stream(sock))
                fin = ksock.tcp_info(sock)[0] in FIN_RECEIVED | {TcpState.CLOSE}
                if sequence == ksock.queue_sequence(sock, ksock.TCP_RECV_QUEUE):
                    break
        seen.received_end = sequence - fin & 0xFFFFFFFF

    def _under_way(self, entry: Entry, queue: bytes, end: int, received_end: int | None) -> bytes:
        """What was sent and not received: of a send queue that ends at sequence number `end`, the rest."""
        if not queue or received_end is None:
            return b""
        missing = end - received_end & 0xFFFFFFFF
        if missing > len(queue):
            self.around.refuse(entry, "sequence numbers of the two ends do not fit together", RETRY)
            return b""
        return queue[len(queue) - missing :]

    # states

    def _fields(self, seen: _Seen) -> dict[str, object]:
        entry = seen.entry
        over = seen.state == TcpState.CLOSE and seen.events & ksock.POLLRDHUP
        connected = bool(over) or seen.state not in (TcpState.LISTEN, TcpState.CLOSE)
        fields = entry.base(self.around, connected)
        fields |= {"family": entry.family, "protocol": entry.protocol, "local": seen.local, "remote": seen.remote}
        if entry.protocol == IPPROTO_MPTCP:
            if connected:
                self.around.refuse(entry, "a connection over several paths (MPTCP) can't be saved")
                return fields
        elif entry.sock.getsockopt(socket.IPPROTO_TCP, TCP_ULP, 16).strip(b"\0"):
            self.around.refuse(entry, "has an upper layer protocol (TLS in the kernel, say)")
        if seen.events & POLLPRI:
            self.around.refuse(entry, "urgent data is pending", RETRY)
            return fields
        error = self._error(seen) if seen.events & POLLERR else 0
        if seen.state == TcpState.LISTEN:
            waiting = self.waiting.get(entry.file_id, [])
            return fields | {"role": "listening", "backlog": seen.backlog, "waiting": tuple(waiting)}
        if seen.state == TcpState.SYN_SENT:
            return fields | {"role": "connecting"}
        if seen.state == TcpState.CLOSE:
            role = "finished" if over and error != errno.ECONNREFUSED else "closed"
            return fields | {"role": role, "incoming": seen.received, "error": error}
        if seen.remote is None:
            self.around.refuse(entry, f"in state {seen.state.name}, without a peer", RETRY)
            return fields
        return fields | self._connection(seen)

    def _error(self, seen: _Seen) -> int:
        """The errno that the program's next call will get."""
        memory = self.unheld.memory
        if memory is None:
            self.around.refuse(seen.entry, "an error is pending that the program has not read", RETRY)
            return 0
        error, queued = memory.error(seen.entry.sock.fileno())
        if queued:
            self.around.refuse(seen.entry, "messages wait in its error queue (MSG_ERRQUEUE)", RETRY)
        elif error not in RESTORABLE_ERRORS or seen.state != TcpState.CLOSE:
            name = errno.errorcode.get(error, str(error))
            self.around.refuse(seen.entry, f"an error is pending ({name}) that can't be brought about again", RETRY)
        return error

    def _connection(self, seen: _Seen) -> dict[str, object]:
        segment = ksock.advertised_segment(seen.entry.sock)
        fields: dict[str, object] = {
            "role": "connected",
            "segment": segment if segment < USUAL_SEGMENT else 0,
            "saved_syn": ksock.has_saved_syn(seen.entry.sock),
            "fin_sent": seen.state in FIN_SENT,
            "read_shut": bool(seen.events & ksock.POLLRDHUP) and seen.state not in FIN_RECEIVED,
        }
        peer = self.peer(seen)
        if peer is not None:
            incoming = seen.received + self._under_way(peer.entry, peer.send_queue, peer.send_end, seen.received_end)
            return fields | {"peer": peer.entry.file_id, "incoming": incoming}
        return fields | {"incoming": seen.received} | self._without_peer(seen)

    def _without_peer(self, seen: _Seen) -> dict[str, object]:
        """The other end has no descriptor in the pod: not accepted yet, or closed, or outside."""
        other, entry = seen.other, seen.entry
        if seen.key in self.claimed:
            return {"unaccepted": True}
        if other is not None and other.ino:
            self.around.refuse(entry, "the other end of the connection is not in the pod")
        elif other is not None and other.state in (*UNACCEPTED, *HALF_MADE):
            self.around.refuse(entry, "waits to be accepted by a listener that is not in the pod", RETRY)
        elif seen.orphan:
            end = seen.orphan
            missing = self._under_way(entry, end.sent, end.sent_end, seen.received_end)
            return {"outgoing": seen.send_queue, "incoming": seen.received + missing}
        elif (other is None or other.state not in ORPHANS) and seen.state not in FIN_RECEIVED:
            self.around.refuse(entry, f"in state {seen.state.name}, but its other end does not exist", RETRY)
        return {"outgoing": seen.send_queue}

    # listeners

    def _waiting(self, listener: _Seen) -> list[Waiting]:
        """The connections not accepted yet, as they will be."""
        memory = self.unheld.memory
        found = self._read_waiting(listener, memory) if memory else self._guess_waiting(listener)
        for client in self.seen:  # of those half made the client has all that it sent
            other = client.other
            if other is None or other.state not in HALF_MADE or client.key in self.claimed:
                continue
            if _belongs(other, listener):
                local = _address(other.family, other.local)
                found.append(self._claim(client, local, client.send_queue))
        return found

    def _claim(self, client: _Seen, local: Address, data: bytes) -> Waiting:
        """A waiting connection whose other end is in the pod."""
        self.claimed.add(client.key)
        return Waiting(client.entry.file_id, client.local, local, data, client.state in FIN_SENT)

    def _read_waiting(self, listener: _Seen, memory: SocketMemory) -> list[Waiting]:
        """As kernel memory shows them. Who may still have to send is asked before what was received is read."""
        fd, family = listener.entry.sock.fileno(), listener.entry.family
        gone = {}
        for end in memory.waiting(fd):
            here, there = _key(family, end.local), _key(family, end.remote)
            if (there, here) not in self.by_key:
                gone[there, here] = self.unheld.end(there, here)
        found = []
        for end in memory.waiting(fd):
            local, remote = _address(family, end.local), _address(family, end.remote)
            key = remote.key(family), local.key(family)
            if client := self.by_key.get(key):
                rest = self._under_way(client.entry, client.send_queue, client.send_end, end.received_end)
                found.append(self._claim(client, local, end.received + rest))
                continue
            orphan, reset = gone.get(key), end.state == TcpState.CLOSE
            if orphan is None and not reset and not end.fin_received:
                reason = "a connection waits to be accepted whose other end is not in the pod"
                self.around.refuse(listener.entry, reason, RETRY)
            rest = b""
            if orphan:
                rest = self._under_way(listener.entry, orphan.sent, orphan.sent_end, end.received_end)
            found.append(Waiting(None, remote, local, end.received + rest, not reset, reset))
        return found

    def _guess_waiting(self, listener: _Seen) -> list[Waiting]:
        """As the socket diagnosis tells: only where nothing was sent, in any order."""
        found = []
        for end in self.unheld.unaccepted(listener.entry.family):
            local, remote = _address(end.family, end.local), _address(end.family, end.remote)
            key = remote.key(end.family), local.key(end.family)
            if not _belongs(end, listener) or key in self.claimed:
                continue  # another listener of the same port has it
            client = self.by_key.get(key)
            empty = end.receive_queue - (end.state == TcpState.CLOSE_WAIT) <= 0
            if client and empty and not client.send_queue:
                found.append(self._claim(client, local, b""))
            elif not client and empty and end.state == TcpState.CLOSE_WAIT:
                self.claimed.add(key)
                found.append(Waiting(None, remote, local, fin=True))
            else:
                self.claimed.add(key)
                reason = "data was sent on a connection that is not accepted yet: it can't be read from outside"
                self.around.refuse((client or listener).entry, reason, RETRY)
        return found


def _key(family: int, packed: tuple[bytes, int]) -> Key:
    return _address(family, packed).key(family)


def _address(family: int, packed: tuple[bytes, int]) -> Address:
    return Address(socket.inet_ntop(family, packed[0]), packed[1])


def _belongs(other: InetDiag, listener: _Seen) -> bool:
    """Whether an unaccepted connection can be of this listener: the port, and the address or any."""
    host = pack(listener.entry.family, listener.local.host)
    return other.local[1] == listener.local.port and (not any(host) or other.local[0] == host)


def collect(entries: list[Entry], around: Surroundings) -> dict[int, TcpSocket]:
    """States of these sockets by file id."""
    return _Collector(entries, around).run() if entries else {}
