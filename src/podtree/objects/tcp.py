"""TCP sockets over the pod's loopback: listeners, connections with data under way, half-closed ones.

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
The restoring half is in podtree.objects.tcprestore.
"""

from __future__ import annotations

import dataclasses
import socket

import msgspec

from podtree.kernel import sock as ksock
from podtree.kernel.sock import TcpState
from podtree.kernel.sockdiag import INET_DIAG_MD5SIG, InetDiag
from podtree.objects.inet import Address, Key, local_address, pack, remote_address
from podtree.objects.socketcommon import RETRY, Entry, SocketBase, Surroundings

POLLERR, POLLPRI = 0x8, 0x2
TCP_ULP = 31

FIN_SENT = {TcpState.FIN_WAIT1, TcpState.FIN_WAIT2, TcpState.CLOSING, TcpState.LAST_ACK}
FIN_RECEIVED = {TcpState.CLOSE_WAIT, TcpState.CLOSING, TcpState.LAST_ACK}
ORPHANS = {TcpState.FIN_WAIT1, TcpState.FIN_WAIT2, TcpState.CLOSING, TcpState.LAST_ACK, TcpState.TIME_WAIT}


class TcpSocket(SocketBase, frozen=True, kw_only=True, tag="tcp"):
    """One TCP socket."""

    family: int
    role: str  # "closed", "listening", "connecting", "connected", "finished"
    local: Address
    remote: Address | None = None
    backlog: int = 0
    #: Of a listener: (client, its own) addresses of connections whose client left before accept(2).
    departed: tuple[tuple[Address, Address], ...] = ()
    #: File id of the other end; None while connected: it is gone, or (`unaccepted`) not accepted yet.
    peer: int | None = None
    unaccepted: bool = False
    incoming: bytes = b""  # received and not read, then what was still under way to this socket
    outgoing: bytes = b""  # sent, and not received by an end that is gone
    fin_sent: bool = False  # shut down for sending
    read_shut: bool = False  # shut down for receiving by its own program


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

    @property
    def key(self) -> tuple[Key, Key]:
        family = self.entry.family
        assert self.remote is not None
        return self.local.key(family), self.remote.key(family)


class _Collector:
    def __init__(self, entries: list[Entry], around: Surroundings) -> None:
        self.around = around
        self.diag = around.namespace.diag
        self.claimed: set[tuple[Address, Address]] = set()
        self.seen = [self._look(entry) for entry in entries]
        self.by_key = {
            seen.key: seen
            for seen in self.seen
            if seen.remote is not None and seen.state not in (TcpState.LISTEN, TcpState.CLOSE)
        }

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
        senders = [
            seen
            for seen in self.seen
            if seen.state not in (TcpState.LISTEN, TcpState.CLOSE, TcpState.SYN_SENT)
            and ksock.unsent(seen.entry.sock.fileno())
        ]
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
        # Ends without a descriptor can't be read. Whether they still hold something is asked before the
        # receive queues are read, for the same reason.
        for seen in self.seen:
            if seen.remote is not None and seen.state not in (TcpState.SYN_SENT, TcpState.CLOSE):
                seen.other = None if self.peer(seen) else self._lookup(seen)
        measured = {id(peer) for seen in senders if seen.send_queue and (peer := self.peer(seen))}
        for seen in self.seen:
            if seen.state not in (TcpState.LISTEN, TcpState.SYN_SENT) and not seen.events & (POLLERR | POLLPRI):
                self._read_received(seen, id(seen) in measured)

    @staticmethod
    def _read_received(seen: _Seen, measure: bool) -> None:
        sock = seen.entry.sock
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

    def _under_way(self, sender: _Seen, receiver: _Seen) -> bytes:
        """What `sender` sent and `receiver` has not got: the end of the send queue, from rcv_nxt on."""
        if not sender.send_queue or receiver.received_end is None:
            return b""
        missing = sender.send_end - receiver.received_end & 0xFFFFFFFF
        if missing > len(sender.send_queue):
            self.around.refuse(sender.entry, "sequence numbers of the two ends do not fit together", RETRY)
            return b""
        return sender.send_queue[len(sender.send_queue) - missing :]

    # states

    def _fields(self, seen: _Seen) -> dict[str, object]:
        entry = seen.entry
        over = seen.state == TcpState.CLOSE and seen.events & ksock.POLLRDHUP
        connected = bool(over) or seen.state not in (TcpState.LISTEN, TcpState.CLOSE)
        fields = entry.base(self.around, connected)
        fields |= {"family": entry.family, "local": seen.local, "remote": seen.remote}
        if entry.sock.getsockopt(socket.IPPROTO_TCP, TCP_ULP, 16).strip(b"\0"):
            self.around.refuse(entry, "has an upper layer protocol (TLS in the kernel, say)")
        if seen.events & POLLERR:
            self.around.refuse(entry, "an error is pending that the program has not read", RETRY)
            return fields
        if seen.events & POLLPRI:
            self.around.refuse(entry, "urgent data is pending", RETRY)
            return fields
        if seen.state == TcpState.LISTEN:
            return fields | self._listener(seen)
        if seen.state == TcpState.SYN_SENT:
            return fields | {"role": "connecting"}
        if seen.state == TcpState.CLOSE:
            return fields | {"role": "finished" if over else "closed", "incoming": seen.received}
        if seen.remote is None:
            self.around.refuse(entry, f"in state {seen.state.name}, without a peer", RETRY)
            return fields
        return fields | self._connection(seen)

    def _connection(self, seen: _Seen) -> dict[str, object]:
        fields: dict[str, object] = {
            "role": "connected",
            "fin_sent": seen.state in FIN_SENT,
            "read_shut": bool(seen.events & ksock.POLLRDHUP) and seen.state not in FIN_RECEIVED,
        }
        peer = self.peer(seen)
        if peer is not None:
            incoming = seen.received + self._under_way(peer, seen)
            return fields | {"peer": peer.entry.file_id, "incoming": incoming}
        return fields | {"incoming": seen.received} | self._without_peer(seen)

    def _without_peer(self, seen: _Seen) -> dict[str, object]:
        """The other end has no descriptor in the pod: not accepted yet, or closed, or outside."""
        other, entry = seen.other, seen.entry
        if other is not None and other.ino:
            self.around.refuse(entry, "the other end of the connection is not in the pod")
        elif other is not None and other.state in (TcpState.ESTABLISHED, TcpState.CLOSE_WAIT):
            fin = other.state == TcpState.CLOSE_WAIT
            if other.receive_queue - fin > 0 or seen.send_queue:
                self.around.refuse(
                    entry,
                    "data was sent on a connection that is not accepted yet: it can't be read from outside",
                    RETRY,
                )
            return {"unaccepted": True}
        elif other is not None and other.state in (TcpState.SYN_RECV, TcpState.NEW_SYN_RECV):
            self.around.refuse(entry, "the listener's queue is full, the connection is half made", RETRY)
        elif other is not None and other.state in ORPHANS:
            fin = other.state in (TcpState.FIN_WAIT1, TcpState.CLOSING, TcpState.LAST_ACK)
            if other.send_queue - fin > 0:
                self.around.refuse(
                    entry, "closed by the other end with data still under way: it can't be read from outside", RETRY
                )
        elif seen.state not in FIN_RECEIVED:
            self.around.refuse(entry, f"in state {seen.state.name}, but its other end does not exist", RETRY)
        return {"outgoing": seen.send_queue}

    def _lookup(self, seen: _Seen) -> InetDiag | None:
        family = seen.entry.family
        assert seen.remote is not None
        there = pack(family, seen.remote.host), seen.remote.port
        here = pack(family, seen.local.host), seen.local.port
        found = self.diag.inet_lookup(family, socket.IPPROTO_TCP, there, here)
        if found is None or found.state == TcpState.LISTEN or found.remote[1] != seen.local.port:
            return None
        if INET_DIAG_MD5SIG in found.attributes:
            self.around.refuse(seen.entry, "uses TCP MD5 signatures")
        return found

    # listeners

    def _listener(self, seen: _Seen) -> dict[str, object]:
        fields: dict[str, object] = {"role": "listening", "backlog": seen.backlog}
        if not seen.backlog_used:
            return fields
        states = 1 << TcpState.ESTABLISHED | 1 << TcpState.CLOSE_WAIT
        departed = []
        for other in self.diag.inet(seen.entry.family, socket.IPPROTO_TCP, states):
            if other.ino or not _belongs(other, seen):
                continue
            local, remote = _address(other.family, other.local), _address(other.family, other.remote)
            client = self.by_key.get((remote.key(other.family), local.key(other.family)))
            if client is not None or (remote, local) in self.claimed:
                continue  # the client's own state says so; another listener of the same port has it
            if other.state == TcpState.CLOSE_WAIT and other.receive_queue <= 1:
                departed.append((remote, local))
                self.claimed.add((remote, local))
            else:
                self.around.refuse(
                    seen.entry, "a connection waits to be accepted whose client has sent data and left", RETRY
                )
        return fields | {"departed": tuple(departed)}


def _address(family: int, packed: tuple[bytes, int]) -> Address:
    return Address(socket.inet_ntop(family, packed[0]), packed[1])


def _belongs(other: InetDiag, listener: _Seen) -> bool:
    """Whether an unaccepted connection can be of this listener: the port, and the address or any."""
    host = pack(listener.entry.family, listener.local.host)
    return other.local[1] == listener.local.port and (not any(host) or other.local[0] == host)


def collect(entries: list[Entry], around: Surroundings) -> dict[int, TcpSocket]:
    """States of these sockets by file id."""
    return _Collector(entries, around).run() if entries else {}
