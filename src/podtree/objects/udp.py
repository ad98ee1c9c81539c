"""UDP sockets: bound, connected, with datagrams waiting in them.

Source: udp(7), ip(7), ipv6(7), raw(7); net/ipv4/udp.c (Linux 6.18).

A waiting datagram is sent again through a raw socket, so that it has its sender's address whoever that was.
While one socket is loaded, others of the same port are connected to nobody, so that it alone is meant.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import time

import msgspec

from podtree.errors import Damaged, RestoreFailed
from podtree.kernel import procfs
from podtree.kernel import sock as ksock
from podtree.kernel.namespaces import loopback_up
from podtree.kernel.sock import Peeked
from podtree.objects.inet import Address, address, checksum, local_address, loopback_for, pack, remote_address, wildcard
from podtree.objects.socketcommon import RETRY, Entry, SocketBase, Surroundings, finish
from podtree.objects.sockopts import BEFORE_BIND, SOL_UDP, set_option

UDP_ENCAP = 100
ROOM = 1 << 28
NOBODY: dict[int, tuple[str, int]] = {socket.AF_INET: ("127.0.0.1", 9), socket.AF_INET6: ("::1", 9)}  # the discard port
LARGEST_V6 = 65536 - 40 - 8  # what goes through lo in one piece (its MTU is 65536)
MAPPED = "::ffff:"
#: Groups that every interface is in: 224.0.0.1; ff02::1 and ff01::1.
EVERYBODY = {"010000E0", "ff020000000000000000000000000001", "ff010000000000000000000000000001"}


class Datagram(msgspec.Struct, frozen=True):
    """One that waits. `destination`, `ttl` and `tos` only where the program asked to be told."""

    data: bytes
    source: Address
    destination: Address | None = None
    ttl: int = 64
    tos: int = 0


class UdpSocket(SocketBase, frozen=True, kw_only=True, tag="udp"):
    """One UDP socket."""

    family: int
    local: Address
    remote: Address | None = None
    read_shut: bool = False
    queue: tuple[Datagram, ...] = ()


# --- collect -----------------------------------------------------------------------------------------


def collect(entries: list[Entry], around: Surroundings) -> dict[int, UdpSocket]:
    """States of these sockets by file id."""
    if not entries:
        return {}
    groups = _joined_groups(entries[0].process.host_pid)
    if groups:
        around.refuse(entries[0], f"multicast groups are joined in the pod ({', '.join(sorted(groups))})")
    states = {}
    for entry in entries:
        before = len(around.ctx.problems)
        state = _collect(entry, around)
        if len(around.ctx.problems) == before:
            states[entry.file_id] = state
    return states


def _joined_groups(host_pid: int) -> set[str]:
    found = set()
    lines = procfs.read_text(f"/proc/{host_pid}/net/igmp").splitlines()[1:]
    found |= {line.split()[0] for line in lines if line.startswith("\t")}
    if os.path.exists(f"/proc/{host_pid}/net/igmp6"):
        found |= {line.split()[2] for line in procfs.read_text(f"/proc/{host_pid}/net/igmp6").splitlines()}
    return found - EVERYBODY


def _collect(entry: Entry, around: Surroundings) -> UdpSocket:
    sock = entry.sock
    events = ksock.events(sock.fileno())
    queue: tuple[Datagram, ...] = ()
    if ksock.unsent(sock.fileno()):
        around.refuse(entry, "a datagram is held back (UDP_CORK or MSG_MORE)", "let it be sent")
    if sock.getsockopt(SOL_UDP, UDP_ENCAP):
        around.refuse(entry, "encapsulates packets for the kernel (UDP_ENCAP)")
    if events & 0x8:  # POLLERR; to receive would consume it
        around.refuse(entry, "an error is pending that the program has not read", RETRY)
    elif events & 0x1:
        if sock.getsockopt(socket.SOL_SOCKET, ksock.SO_PEEK_OFF) >= 0:
            around.refuse(entry, "datagrams are queued while the program uses SO_PEEK_OFF", RETRY)
        else:
            queue = tuple(_datagram(entry, around, peeked) for peeked in ksock.peek_messages(sock))
    return UdpSocket(
        **entry.base(around),  # type: ignore[arg-type]
        family=entry.family,
        local=local_address(sock),
        remote=remote_address(sock),
        read_shut=bool(events & ksock.POLLRDHUP),
        queue=queue,
    )


def _datagram(entry: Entry, around: Surroundings, peeked: Peeked) -> Datagram:
    source = address(peeked.address)
    destination: Address | None = None
    ttl, tos = 64, 0
    for level, kind, value in peeked.controls:
        match level, kind:
            case (socket.IPPROTO_IP, 8):  # IP_PKTINFO: in_pktinfo.ipi_addr
                destination = Address(socket.inet_ntop(socket.AF_INET, value[8:12]), 0)
            case (socket.IPPROTO_IPV6, 50):  # IPV6_PKTINFO
                destination = destination or Address(socket.inet_ntop(socket.AF_INET6, value[:16]), 0)
            case (socket.IPPROTO_IP, 2) | (socket.IPPROTO_IPV6, 52):  # IP_TTL, IPV6_HOPLIMIT
                ttl = int.from_bytes(value[:4], "little")
            case (socket.IPPROTO_IP, 1):  # IP_TOS
                tos = value[0]
            case (socket.IPPROTO_IPV6, 67):  # IPV6_TCLASS
                tos = int.from_bytes(value[:4], "little")
            case (17, 104):  # SOL_UDP, UDP_GRO
                around.refuse(entry, "datagrams wait that were merged (UDP_GRO)", RETRY)
    if ":" in source.host and not source.host.startswith(MAPPED) and len(peeked.data) > LARGEST_V6:
        around.refuse(entry, f"an IPv6 datagram of {len(peeked.data)} bytes waits: more than fits in one packet", RETRY)
    return Datagram(peeked.data, source, destination, ttl, tos)


# --- restore -----------------------------------------------------------------------------------------


def restore(states: dict[int, UdpSocket]) -> dict[int, socket.socket]:
    """All UDP sockets of a pod by file id; the caller is in the pod's network namespace. Brings `lo` up."""
    if not states:
        return {}
    loopback_up()
    made: dict[int, socket.socket] = {}
    try:
        for file_id, state in states.items():
            made[file_id] = sock = _bound(state)
            if state.queue:
                _load(sock, state)
            if state.local.port:  # out of the way of those that are loaded after it
                sock.connect(NOBODY[state.family])
        for file_id, state in states.items():
            _settle(made[file_id], state)
    except OSError as error:
        for sock in made.values():
            sock.close()
        raise RestoreFailed(f"UDP sockets: {error}") from error
    return made


def _bound(state: UdpSocket) -> socket.socket:
    if state.family not in NOBODY:
        raise Damaged(f"UDP socket of family {state.family}")
    sock = socket.socket(state.family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    os.fchown(sock.fileno(), state.uid, state.gid)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for name in BEFORE_BIND:
        if name in state.options:
            set_option(sock, name, state.options[name])
    if state.local.port:
        sock.bind(state.local.raw(state.family))
    return sock


def _settle(sock: socket.socket, state: UdpSocket) -> None:
    """Connected as it was; options last."""
    if state.local.port:
        _disconnect(sock)
    if state.remote is not None:
        sock.connect(state.remote.raw(state.family))
    if state.read_shut:
        try:
            sock.shutdown(socket.SHUT_RD)
        except OSError as error:
            if error.errno != errno.ENOTCONN:  # which it says after having done it
                raise
    with socket.socket(state.family, socket.SOCK_DGRAM) as fresh:
        set_option(sock, "SO_RCVBUF", fresh.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    finish(sock, state, f"UDP socket {state.local.host} port {state.local.port}")


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
    for datagram in state.queue:
        to = datagram.destination.host if datagram.destination else _reachable(state, datagram)
        _inject(datagram, to, state.local.port)
    deadline = time.monotonic() + 2
    while (got := [peeked.data for peeked in ksock.peek_messages(sock)]) != [d.data for d in state.queue]:
        if time.monotonic() > deadline:
            raise RestoreFailed(
                f"UDP socket {state.local.host} port {state.local.port}: of {len(state.queue)} datagrams,"
                f" {len(got)} came back"
            )
        time.sleep(0.001)


def _reachable(state: UdpSocket, datagram: Datagram) -> str:
    """Where the datagram can have been sent to: the bound address, or the loopback of the sender's kind."""
    if not wildcard(state.local.host):
        return state.local.host
    six = ":" in datagram.source.host and not datagram.source.host.startswith(MAPPED)
    return loopback_for(socket.AF_INET6 if six else socket.AF_INET, "::" if six else "0.0.0.0")


def _inject(datagram: Datagram, to: str, port: int) -> None:
    """Send it with its own source address, through a raw socket with the IP header included (raw(7))."""
    source, to = datagram.source.host.removeprefix(MAPPED), to.removeprefix(MAPPED)
    family = socket.AF_INET6 if ":" in to else socket.AF_INET
    here, there = pack(family, source), pack(family, to)
    length = 8 + len(datagram.data)
    if family == socket.AF_INET:
        pseudo = here + there + struct.pack("!xBH", socket.IPPROTO_UDP, length)
        header = struct.pack(
            "!BBHHHBBH4s4s", 0x45, datagram.tos, 20 + length, 0, 0, datagram.ttl, socket.IPPROTO_UDP, 0, here, there
        )
    else:
        pseudo = here + there + struct.pack("!IxxxB", length, socket.IPPROTO_UDP)
        header = struct.pack(
            "!IHBB16s16s", 6 << 28 | datagram.tos << 20, length, socket.IPPROTO_UDP, datagram.ttl, here, there
        )
    ports = struct.pack("!HHH", datagram.source.port, port, length)
    total = checksum(pseudo + ports + bytes(2) + datagram.data) or 0xFFFF
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.sendto(header + ports + struct.pack("!H", total) + datagram.data, (to, 0))
