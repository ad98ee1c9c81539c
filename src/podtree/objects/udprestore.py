"""Bringing UDP and UDP-Lite sockets back: podtree.objects.udp holds the states and how they are collected.

A waiting datagram is sent again through a raw socket (raw(7)), so that it has its sender's address whoever that was.
While one socket is loaded, others of the same port are out of the way, so that it alone is meant: connected to nobody.
That would take a member out of its SO_REUSEPORT group for good (udp_lib_rehash(), net/ipv4/udp.c), so those are bound
together and made deaf by a filter instead, and a program of the group says which of them is meant.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator

from podtree.errors import Damaged, RestoreFailed
from podtree.kernel import sock as ksock
from podtree.kernel.namespaces import loopback_up
from podtree.objects import multicast
from podtree.objects.inet import MAPPED, checksum, loopback_for, pack, wildcard
from podtree.objects.multicast import LOOPBACK
from podtree.objects.socketcommon import finish, steer
from podtree.objects.sockopts import BEFORE_BIND, set_option
from podtree.objects.udp import IPPROTO_UDPLITE, Datagram, UdpSocket

ROOM = 1 << 28
NOBODY = 9  # the discard port
PATIENCE_S = 10.0
LARGEST = 65535 - 20 - 8  # bytes in a datagram, with the smallest headers
NOTHING = struct.pack("=HBBI", ksock.BPF_RET_K, 0, 0, 0)  # a filter that lets nothing through
POLLERR = 0x8
ICMP_UNREACHABLE, ICMPV6_UNREACHABLE = (3, 3), (1, 4)  # type and code of "port unreachable": RFC 792, RFC 4443


def restore(states: dict[int, UdpSocket]) -> dict[int, socket.socket]:
    """All UDP sockets of a pod by file id; the caller is in the pod's network namespace. Brings `lo` up."""
    if not states:
        return {}
    loopback_up()
    made: dict[int, socket.socket] = {}
    try:
        for stage in _stages(states):
            for file_id in stage:
                made[file_id] = _bound(states[file_id])
            _load_all([(made[file_id], states[file_id]) for file_id in stage])
        for file_id, state in states.items():
            _settle(made[file_id], state)
        for file_id, state in states.items():
            steer(made[file_id], state)
            if state.error:
                _have_it_refused(made[file_id], state)
    except BaseException as error:
        for sock in made.values():
            sock.close()
        if isinstance(error, OSError):
            raise RestoreFailed(f"UDP sockets: {error}") from error
        raise
    return made


def _grouped(state: UdpSocket) -> bool:
    """Whether it is in an SO_REUSEPORT group, which it leaves when it is connected."""
    return bool(state.options.get("SO_REUSEPORT") and state.local.port and state.remote is None)


def _stages(states: dict[int, UdpSocket]) -> list[list[int]]:
    """File ids of sockets that are bound together: one alone or a group, whose order counts.

    Of two that could be meant the kernel takes the more specific (compute_score(), net/ipv4/udp.c): that comes later.
    """

    def rank(state: UdpSocket) -> tuple[bool, bool, bool, int]:
        device = "SO_BINDTODEVICE" in state.options
        return not wildcard(state.local.host), _grouped(state), device, -state.family

    stages: dict[object, list[int]] = {}
    for file_id, state in sorted(states.items(), key=lambda item: (*rank(item[1]), item[1].group_index)):
        options = state.options.get("SO_BINDTODEVICE"), state.options.get("IPV6_V6ONLY")
        group = (state.family, state.protocol, state.local, state.uid, options)
        stages.setdefault(group if _grouped(state) else file_id, []).append(file_id)
    return list(stages.values())


def _load_all(stage: list[tuple[socket.socket, UdpSocket]]) -> None:
    """Load sockets that were bound together; they are out of the way afterwards."""
    for sock, state in stage:
        if _grouped(state):
            ksock.attach_program(sock, ksock.SO_ATTACH_FILTER, NOTHING)
    for index, (sock, state) in enumerate(stage):
        if state.queue:
            with _meant(sock, index) if _grouped(state) else contextlib.nullcontext():
                _load(sock, state)
        if state.local.port and not _grouped(state):
            sock.connect((_some_host(state), NOBODY))


@contextlib.contextmanager
def _meant(sock: socket.socket, index: int) -> Iterator[None]:
    """Within, number `index` of a group hears what is sent to any."""
    sock.setsockopt(socket.SOL_SOCKET, ksock.SO_DETACH_FILTER, 0)
    with ksock.reuseport_index(sock, index):
        yield
    ksock.attach_program(sock, ksock.SO_ATTACH_FILTER, NOTHING)


def _bound(state: UdpSocket) -> socket.socket:
    protocols = (socket.IPPROTO_UDP, IPPROTO_UDPLITE)
    if state.family not in (socket.AF_INET, socket.AF_INET6) or state.protocol not in protocols:
        raise Damaged(f"UDP socket of family {state.family}, protocol {state.protocol}")
    if not 0 <= state.shutdown <= 3 or state.error not in (0, errno.ECONNREFUSED):
        raise Damaged("UDP socket in an impossible state")
    for one in state.queue:
        sizes = one.source.port >> 16, one.ttl >> 8, one.tos >> 8, len(one.data) // (LARGEST + 1)
        if any(sizes):
            raise Damaged("an impossible datagram in a UDP socket")
    sock = socket.socket(state.family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, state.protocol)
    os.fchown(sock.fileno(), state.uid, state.gid)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for name in BEFORE_BIND:
        if name in state.options and (name != "SO_REUSEPORT" or _grouped(state)):
            set_option(sock, name, state.options[name])
    if state.local.port:
        sock.bind(state.local.raw(state.family))
    return sock


def _some_host(state: UdpSocket) -> str:
    """A loopback address that the bound socket can have to do with."""
    if state.family == socket.AF_INET:
        return "127.0.0.1"
    return MAPPED + "127.0.0.1" if state.local.host.startswith(MAPPED) else "::1"


def _settle(sock: socket.socket, state: UdpSocket) -> None:
    """Connected as it was; options; then what it has begun to send, and how far it is shut down."""
    if _grouped(state):
        sock.setsockopt(socket.SOL_SOCKET, ksock.SO_DETACH_FILTER, 0)
    elif state.local.port:
        _disconnect(sock)
    multicast.join(sock, state.memberships)
    if state.remote is not None:
        sock.connect(state.remote.raw(state.family))
    with socket.socket(state.family, socket.SOCK_DGRAM) as fresh:
        set_option(sock, "SO_RCVBUF", fresh.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    finish(sock, state, f"UDP socket {state.local.host} port {state.local.port}")
    if held := state.held_back:
        if state.remote:
            sock.send(held.data, socket.MSG_MORE)
        else:
            sock.sendto(held.data, socket.MSG_MORE, held.destination.raw(state.family))
    if state.shutdown:
        try:
            sock.shutdown(state.shutdown - 1)
        except OSError as error:
            if error.errno != errno.ENOTCONN:  # which it says after having done it
                raise


def _disconnect(sock: socket.socket) -> None:
    """connect(2) to AF_UNSPEC, which Python can't say; a wildcard address comes back with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.connect(sock.fileno(), bytes(16), 16) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"connect(AF_UNSPEC): {os.strerror(code)}")


def _load(sock: socket.socket, state: UdpSocket) -> None:
    """Have the datagrams received again, in order; the socket is bound and not connected."""
    if not state.local.port:
        raise Damaged("datagrams in a UDP socket without a port")
    set_option(sock, "SO_RCVBUF", ROOM)
    to = [one.destination.host if one.destination else _reachable(state, one) for one in state.queue]
    with multicast.heard(sock, to):
        for datagram, host in zip(state.queue, to, strict=True):
            used = ksock.memory_used(sock)
            _inject(datagram, host, state)
            _wait(functools.partial(_fuller, sock, used), state, "a datagram")
    texts = [one.data for one in state.queue]
    if all(texts) and [peeked.data for peeked in ksock.peek_messages(sock)] != texts:  # an empty one would show it
        raise RestoreFailed(f"UDP socket {state.local.host} port {state.local.port}: other datagrams came back")


def _fuller(sock: socket.socket, used: int) -> bool:
    return ksock.memory_used(sock) > used


def _wait(done: Callable[[], bool], state: UdpSocket, what: str) -> None:
    """For what goes through `lo`: nearly always it is there at once."""
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        if time.monotonic() > deadline:
            raise RestoreFailed(f"UDP socket {state.local.host} port {state.local.port}: {what} does not come back")
        time.sleep(0.001)


def _reachable(state: UdpSocket, datagram: Datagram) -> str:
    """Where the datagram can have been sent to: the bound address, or the loopback of the sender's kind."""
    if not wildcard(state.local.host):
        return state.local.host
    six = ":" in datagram.source.host and not datagram.source.host.startswith(MAPPED)
    return loopback_for(socket.AF_INET6 if six else socket.AF_INET, "::" if six else "0.0.0.0")


def _inject(datagram: Datagram, to: str, state: UdpSocket) -> None:
    """Send it with its own source address, through a raw socket with the IP header included."""
    source, to = datagram.source.host.removeprefix(MAPPED), to.removeprefix(MAPPED)
    family = socket.AF_INET6 if ":" in to else socket.AF_INET
    here, there = pack(family, source), pack(family, to)
    length = 8 + len(datagram.data)
    if family == socket.AF_INET:
        pseudo = here + there + struct.pack("!xBH", state.protocol, length)
        header = struct.pack(
            "!BBHHHBBH4s4s", 0x45, datagram.tos, 20 + length, 0, 0, datagram.ttl, state.protocol, 0, here, there
        )
    else:
        pseudo = here + there + struct.pack("!IxxxB", length, state.protocol)
        header = struct.pack(
            "!IHBB16s16s", 6 << 28 | datagram.tos << 20, length, state.protocol, datagram.ttl, here, there
        )
    ports = struct.pack("!HHH", datagram.source.port, state.local.port, length)
    total = checksum(pseudo + ports + bytes(2) + datagram.data) or 0xFFFF
    packet = header + ports + struct.pack("!H", total) + datagram.data
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        if family == socket.AF_INET:
            raw.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, struct.pack("=8xI", LOOPBACK))  # ip_mreqn
            raw.sendto(packet, (to, 0))
        else:
            raw.sendto(packet, (to, 0, 0, LOOPBACK if there[0] == 0xFF else 0))


def _have_it_refused(sock: socket.socket, state: UdpSocket) -> None:
    """Let the kernel tell a connected socket, as a host does where nobody listens, that its datagram was refused."""
    if state.remote is None:
        raise Damaged("a UDP socket that is connected to nobody has been refused")
    local, remote = state.local.host.removeprefix(MAPPED), state.remote.host.removeprefix(MAPPED)
    family = socket.AF_INET6 if ":" in local else socket.AF_INET
    here, there = pack(family, local), pack(family, remote)
    ports = struct.pack("!HHHH", state.local.port, state.remote.port, 8, 0)
    if family == socket.AF_INET:
        header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28, 0, 0, 64, state.protocol, 0, here, there)
        message = struct.pack("!BBHI", *ICMP_UNREACHABLE, 0, 0) + header + ports
        message = message[:2] + struct.pack("!H", checksum(message)) + message[4:]
    else:
        header = struct.pack("!IHBB16s16s", 6 << 28, 8, state.protocol, 64, here, there)
        message = struct.pack("!BBHI", *ICMPV6_UNREACHABLE, 0, 0) + header + ports
    protocol = socket.IPPROTO_ICMP if family == socket.AF_INET else socket.IPPROTO_ICMPV6
    with socket.socket(family, socket.SOCK_RAW, protocol) as raw:
        raw.sendto(message, (local, 0))
    _wait(lambda: bool(ksock.events(sock.fileno()) & POLLERR), state, "its pending error")
