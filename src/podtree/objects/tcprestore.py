"""Bringing TCP sockets back: podtree.objects.tcp holds the states, how they are collected, and why so.

Order: connections through passing listeners, so that the real ones can't lose or gain anything; what was
under way and how far each side was closed; then the real listeners with their options, which what they accept
inherits, and the connections they have yet to accept; then connections being made. All sockets have
SO_REUSEADDR meanwhile, since a listener comes after connections of its port, which without it would be in its
way; what the program had set comes last.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from podtree.errors import Damaged, RestoreFailed
from podtree.kernel import sock as ksock
from podtree.kernel.fdops import proc_fd
from podtree.kernel.namespaces import loopback_up
from podtree.objects.inet import Address, loopback_for, wildcard
from podtree.objects.socketcommon import finish, steer
from podtree.objects.sockopts import BEFORE_BIND, SO_BUF_LOCK, set_option
from podtree.objects.tcp import IPPROTO_MPTCP, TcpSocket, Waiting

IP_BIND_ADDRESS_NO_PORT = 24
IP_LOCAL_PORT_RANGE = 51
PATIENCE_S = 10.0  # for a handshake over the loopback; microseconds are usual
SETTLE_S = 0.06  # without any progress, until what does not fit into a receive queue stays with the sender
BATCH = 1000
ROOM = 1 << 28
NOBODY = 9  # the discard port: nothing listens in a pod before its own listeners are there
ROLES = ("closed", "listening", "connecting", "connected", "finished")


def restore(states: dict[int, TcpSocket]) -> dict[int, socket.socket]:
    """All TCP sockets of a pod by file id; the caller is in the pod's network namespace. Brings `lo` up."""
    if not states:
        return {}
    loopback_up()
    restorer = _Restorer(states)
    try:
        return restorer.run()
    except OSError as error:
        raise RestoreFailed(f"TCP sockets: {error}") from error
    finally:
        restorer.close()


class _Link(NamedTuple):
    """A connection to make; ids of its ends, None for one that is gone."""

    server: int | None
    client: int | None
    client_family: int
    client_local: Address | None


class _Door(NamedTuple):
    """A passing listener: what the ends accepted from it have in common."""

    family: int
    local: Address
    v6only: int
    segment: int
    saves_syn: bool


class _Restorer:
    def __init__(self, states: dict[int, TcpSocket]) -> None:
        self.states = states
        self.made: dict[int, socket.socket] = {}
        self.gone: dict[int, socket.socket] = {}  # stand-ins for ends that are gone, by the id of the other
        self.done = False
        self.ports = {state.local.port for state in states.values() if state.role == "listening"}
        low, high = _read("sys/net/ipv4/ip_local_port_range").split()
        self.ephemeral = range(int(low), int(high) + 1)
        self._check()

    def run(self) -> dict[int, socket.socket]:
        self._connections()
        for role, make in (("closed", self._closed), ("finished", self._closed), ("listening", self._listener)):
            for file_id, state in sorted(self.states.items(), key=lambda item: item[1].group_index):
                if state.role == role and file_id not in self.made:
                    make(file_id, state)
        for file_id, state in self.states.items():
            if state.role == "listening":
                self._finish(self.made[file_id], state)
        for file_id, state in self.states.items():
            if state.waiting:
                self._wait_at(file_id, state)
        for file_id, state in self.states.items():
            if state.role == "connecting":
                self._connecting(file_id, state)
        for file_id, state in self.states.items():
            if state.role != "listening":
                self._finish(self.made[file_id], state)
            steer(self.made[file_id], state)
        self.done = True
        return self.made

    def close(self) -> None:
        for sock in [*self.gone.values(), *([] if self.done else self.made.values())]:
            sock.close()

    def _check(self) -> None:
        """An image may be damaged: every reference must lead somewhere sensible."""
        for file_id, state in self.states.items():
            if state.role not in ROLES or state.family not in (socket.AF_INET, socket.AF_INET6):
                raise Damaged(f"TCP socket in role {state.role!r} of family {state.family}")
            if state.protocol not in (socket.IPPROTO_TCP, IPPROTO_MPTCP):
                raise Damaged(f"TCP socket of protocol {state.protocol}")
            peer = self.states.get(state.peer) if state.peer is not None else None
            if state.peer is not None and (peer is None or peer.peer != file_id):
                raise Damaged("a TCP connection whose two ends disagree")
            if state.remote is None and (state.role == "connecting" or state.role == "connected"):
                raise Damaged("a TCP connection without an address")
            if state.waiting and state.role != "listening":
                raise Damaged("connections wait at a TCP socket that does not listen")
            for one in state.waiting:
                client = self.states.get(one.client) if one.client is not None else None
                if one.client is not None and (client is None or not client.unaccepted):
                    raise Damaged("a TCP listener with a client that does not wait for it")
        waiting = [one.client for state in self.states.values() for one in state.waiting if one.client is not None]
        if sorted(waiting) != sorted(file_id for file_id, state in self.states.items() if state.unaccepted):
            raise Damaged("a TCP connection that waits at no listener, or at two")

    # connections

    def _connections(self) -> None:
        doors: dict[_Door, list[_Link]] = defaultdict(list)
        for one, state in self.states.items():
            if state.role not in ("connected", "finished") or state.unaccepted:
                continue
            if state.peer == one:
                self._with_itself(one, state)
            elif state.peer is None:
                if state.local.port:
                    link = _Link(one, None, state.family, state.remote)
                    doors[self._door(state)].append(link)
            elif one < state.peer:
                server, client = (one, state.peer) if self._serves(one, state.peer) else (state.peer, one)
                there = self.states[client]
                doors[self._door(self.states[server])].append(_Link(server, client, there.family, there.local))
        for door, links in doors.items():
            for at in range(0, len(links), BATCH):
                self._connect(door, links[at : at + BATCH])
        self._fill()
        for one, other in list(self.gone.items()):
            if self.states[one].error:
                self._break_off(other, self.states[one].error)
            other.close()  # nothing unread is in there, so this sends a FIN
            self._send(self.made[one], self.states[one].outgoing)  # which then brings the reset it would have
            del self.gone[one]
        for one, sock in self.made.items():
            self._shut(sock, self.states[one])

    @staticmethod
    def _door(state: TcpSocket) -> _Door:
        v6only = state.options.get("IPV6_V6ONLY", 0)
        host = loopback_for(state.family, state.local.host)
        local = Address(host, state.local.port, state.local.flow, state.local.scope)
        return _Door(state.family, local, v6only if isinstance(v6only, int) else 0, state.segment, state.saved_syn)

    def _serves(self, one: int, two: int) -> bool:
        """Which end shall be the accepted one: as it probably was. A program can't tell."""

        def likely(file_id: int) -> tuple[bool, bool, bool]:
            port = self.states[file_id].local.port
            return self.states[file_id].saved_syn, port in self.ports, port not in self.ephemeral

        return likely(one) >= likely(two)

    def _connect(self, door: _Door, links: list[_Link]) -> None:
        listener = self._new(door.family)
        with listener:
            if door.v6only:
                set_option(listener, "IPV6_V6ONLY", 1)
            if door.segment:
                set_option(listener, "TCP_MAXSEG", door.segment)
            if door.saves_syn:
                set_option(listener, "TCP_SAVE_SYN", 1)
            self._widen(listener, [self.states[link.server] for link in links if link.server is not None])
            listener.bind(door.local.raw(door.family))
            listener.listen(len(links))
            for link in links:
                client = self._client(link.client_family, link.client_local, link.client)
                self._put(link.client, link.server, client)
                client.connect(_as_family(door, link.client_family).raw(link.client_family))
                server = listener.accept()[0]
                server.settimeout(PATIENCE_S)
                self._put(link.server, link.client, server)

    def _put(self, file_id: int | None, other: int | None, sock: socket.socket) -> None:
        if file_id is not None:
            self.made[file_id] = sock
        elif other is not None:
            self.gone[other] = sock

    def _with_itself(self, one: int, state: TcpSocket) -> None:
        """A socket connected to its own address (a simultaneous open)."""
        self.made[one] = sock = self._new(state.family)
        sock.bind(state.local.raw(state.family))
        sock.connect(state.local.raw(state.family))

    @staticmethod
    def _new(family: int, protocol: int = socket.IPPROTO_TCP) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, protocol)
        sock.settimeout(PATIENCE_S)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return sock

    def _client(self, family: int, local: Address | None, file_id: int | None = None) -> socket.socket:
        """A socket that will connect from `local`.

        Where the port is one that the kernel chooses from, it is made to choose it: bind(2) would also keep
        the port taken when the connection is over (SOCK_BINDPORT_LOCK).
        """
        sock = self._new(family)
        state = self.states.get(file_id) if file_id is not None else None
        if state is not None:
            self._before_bind(sock, state)
            self._widen(sock, [state])
            if state.segment:
                set_option(sock, "TCP_MAXSEG", state.segment)
        if local is None:
            return sock
        if local.port in self.ephemeral:
            sock.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("HH", local.port, local.port))
            sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind(Address(local.host, 0, local.flow, local.scope).raw(family))
        else:
            sock.bind(local.raw(family))
        return sock

    @staticmethod
    def _before_bind(sock: socket.socket, state: TcpSocket) -> None:
        os.fchown(sock.fileno(), state.uid, state.gid)  # SO_REUSEPORT asks for the same owner
        for name in BEFORE_BIND:
            if name in state.options:
                set_option(sock, name, state.options[name])

    @staticmethod
    def _widen(sock: socket.socket, states: list[TcpSocket]) -> None:
        """Let the receive window grow so that all that was received is received again, not left waiting.

        The window's limit is taken from the buffer when the connection is made (tcp_init_buffer_space()).
        """
        wanted = 0
        for state in states:
            size = state.options.get("SO_RCVBUF", 0)
            wanted = max(wanted, size if isinstance(size, int) else 0, 4 * len(state.incoming))
        if wanted > sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF):
            set_option(sock, "SO_RCVBUF", min(wanted, ROOM))

    @staticmethod
    def _break_off(sock: socket.socket, error: int = errno.ECONNRESET) -> None:
        """Have the other end hear of `error` when `sock` is closed, after all that was sent to it."""
        deadline = time.monotonic() + PATIENCE_S
        while ksock.unsent(sock.fileno()):
            if time.monotonic() > deadline:
                raise RestoreFailed("TCP sockets: what a broken-off connection had received does not arrive again")
            time.sleep(0.001)
        if error == errno.EPIPE:  # a reset after a FIN
            sock.shutdown(socket.SHUT_WR)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    # what was under way

    def _fill(self) -> None:
        waiting = []
        for one, state in self.states.items():
            if one in self.made and state.incoming:
                peer = self.gone[one] if state.peer is None else self.made[state.peer]
                self._send(peer, state.incoming)
                waiting.append((self.made[one], len(state.incoming)))
        for sock, size in waiting:
            last, since = -1, time.monotonic()
            while (now := ksock.queued(sock.fileno())) < size and time.monotonic() - since < SETTLE_S:
                if now != last:
                    last, since = now, time.monotonic()
                time.sleep(0.001)

    @staticmethod
    def _send(sock: socket.socket, data: bytes) -> None:
        if not data:
            return
        before = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        set_option(sock, "SO_SNDBUF", ROOM)
        sock.sendall(data)
        set_option(sock, "SO_SNDBUF", before)

    @staticmethod
    def _shut(sock: socket.socket, state: TcpSocket) -> None:
        try:
            if state.fin_sent or state.role == "finished":
                sock.shutdown(socket.SHUT_WR)
            if state.read_shut:
                sock.shutdown(socket.SHUT_RD)
        except OSError as error:
            if error.errno != errno.ENOTCONN:  # reset in answer to `outgoing`
                raise

    # the others

    def _closed(self, file_id: int, state: TcpSocket) -> None:
        if state.error == errno.ECONNREFUSED:
            self.made[file_id] = sock = self._client(state.family, state.local, file_id)
            sock.setblocking(False)  # a blocking one would be told at once
            sock.connect_ex((loopback_for(state.family, "::"), NOBODY))
            return
        self.made[file_id] = sock = self._new(state.family, state.protocol)
        self._before_bind(sock, state)
        if state.role == "finished":
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError as error:
                if error.errno != errno.ENOTCONN:  # which it says after having done it
                    raise
        elif state.local.port or not wildcard(state.local.host):
            sock.bind(state.local.raw(state.family))

    def _listener(self, file_id: int, state: TcpSocket) -> None:
        self.made[file_id] = sock = self._new(state.family, state.protocol)
        self._before_bind(sock, state)
        sock.bind(state.local.raw(state.family))
        sock.listen(state.backlog)

    def _wait_at(self, file_id: int, listener: TcpSocket) -> None:
        """Make the connections that `listener` has yet to accept, in their order."""
        sock = self.made[file_id]
        deferred = listener.options.get("TCP_DEFER_ACCEPT", 0)
        if deferred:  # those with nothing sent would not come into the queue
            set_option(sock, "TCP_DEFER_ACCEPT", 0)
        sock.listen(len(listener.waiting) + listener.backlog)  # half-made ones were beyond its limit
        with self._steered_to(file_id, listener):
            for one in listener.waiting:
                if one.client is None:
                    self._departed(listener, one)
                else:
                    client = self.states[one.client]
                    self._unaccepted(one.client, client)
                    self._send(self.made[one.client], one.data)
                    self._shut(self.made[one.client], client)
        sock.listen(listener.backlog)
        if deferred:
            set_option(sock, "TCP_DEFER_ACCEPT", deferred)

    @contextlib.contextmanager
    def _steered_to(self, file_id: int, listener: TcpSocket) -> Iterator[None]:
        """Of several listeners of one address (SO_REUSEPORT) this one gets the connections."""
        group = [
            one
            for one, state in sorted(self.states.items(), key=lambda item: item[1].group_index)
            if state.role == "listening" and (state.family, state.local) == (listener.family, listener.local)
        ]
        if len(group) < 2:
            yield
            return
        sock = self.made[file_id]
        index = group.index(file_id)  # in the group they are in the order in which they began to listen
        with ksock.reuseport_index(sock, index):
            yield

    def _departed(self, listener: TcpSocket, one: Waiting) -> None:
        """A connection whose client has gone."""
        with self._client(listener.family, one.remote) as passing:
            passing.connect(one.local.raw(listener.family))
            self._send(passing, one.data)
            if one.reset:
                self._break_off(passing)

    def _unaccepted(self, file_id: int, state: TcpSocket) -> None:
        assert state.remote is not None
        self.made[file_id] = sock = self._client(state.family, state.local, file_id)
        sock.connect(state.remote.raw(state.family))

    def _connecting(self, file_id: int, state: TcpSocket) -> None:
        assert state.remote is not None
        self.made[file_id] = sock = self._client(state.family, state.local, file_id)
        sock.setblocking(False)
        sock.connect_ex(state.remote.raw(state.family))

    @staticmethod
    def _finish(sock: socket.socket, state: TcpSocket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        if state.protocol == socket.IPPROTO_TCP:
            _undo_preparations(sock, state)
        finish(sock, state, f"TCP socket {state.local.host} port {state.local.port}")


def _undo_preparations(sock: socket.socket, state: TcpSocket) -> None:
    """Buffers and ports as a fresh socket has them, before the program's options come."""
    with socket.socket(state.family, socket.SOCK_STREAM) as fresh:
        if state.role not in ("connected", "finished", "connecting"):
            set_option(sock, "SO_SNDBUF", fresh.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF))
        set_option(sock, "SO_RCVBUF", fresh.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))
    sock.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, 0)
    sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 0)
    sock.setsockopt(socket.SOL_SOCKET, SO_BUF_LOCK, 0)
    if state.role in ("connected", "finished"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)  # which bringing in its bytes has switched off


def _as_family(door: _Door, family: int) -> Address:
    """The door's address in the words of the client's family."""
    local = door.local
    if family == door.family:
        return local
    if family == socket.AF_INET:
        return Address(local.host.rpartition(":")[2], local.port)
    return Address(f"::ffff:{local.host}", local.port)


def _read(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc_fd())
    try:
        return os.read(fd, 4096).decode()
    finally:
        os.close(fd)
