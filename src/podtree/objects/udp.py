"""UDP and UDP-Lite sockets: bound, connected, in multicast groups, with datagrams waiting or held back.

Source: udp(7), udplite(7), ip(7), ipv6(7); net/ipv4/udp.c (Linux 6.18). The restoring half is in
podtree.objects.udprestore.

What waits is read in kernel memory: peeking doesn't tell where a datagram was sent to, and skips empty ones that were
peeked at before. Where that can't be read it is peeked at all the same.
"""

from __future__ import annotations

import errno
import socket

import msgspec

from podtree.kernel import sock as ksock
from podtree.kernel import sockmem
from podtree.kernel.sock import Peeked
from podtree.kernel.sockdiag import InetDiag
from podtree.objects import insight
from podtree.objects.inet import MAPPED, Address, address, local_address, remote_address
from podtree.objects.multicast import Membership
from podtree.objects.socketcommon import RETRY, Entry, SocketBase, Surroundings
from podtree.objects.sockopts import SOL_UDP

UDP_ENCAP = 100
IP_RECVERR, IPV6_RECVERR = 11, 25
IPPROTO_UDPLITE = 136
LARGEST_V6 = 65536 - 40 - 8  # what goes through lo in one piece (its MTU is 65536)
POLLIN, POLLERR = 0x1, 0x8


class Datagram(msgspec.Struct, frozen=True):
    """One that waits. `destination`, `ttl` and `tos` as far as they are known."""

    data: bytes
    source: Address
    destination: Address | None = None
    ttl: int = 64
    tos: int = 0


class HeldBack(msgspec.Struct, frozen=True):
    """A datagram whose sender has not completed it yet (UDP_CORK, MSG_MORE)."""

    data: bytes
    destination: Address


class UdpSocket(SocketBase, frozen=True, kw_only=True, tag="udp"):
    """One UDP or UDP-Lite socket."""

    family: int
    protocol: int = socket.IPPROTO_UDP
    local: Address
    remote: Address | None = None
    shutdown: int = 0  # 1 receiving, 2 sending
    memberships: tuple[Membership, ...] = ()
    queue: tuple[Datagram, ...] = ()
    held_back: HeldBack | None = None
    error: int = 0  # errno that the next call will report


def collect(entries: list[Entry], around: Surroundings) -> dict[int, UdpSocket]:
    """States of these sockets by file id."""
    if not entries:
        return {}
    known = _diagnosed(entries, around)
    states = {}
    for entry in entries:
        before = len(around.ctx.problems)
        state = _collect(entry, around, known.get(entry.ino))
        if len(around.ctx.problems) == before:
            states[entry.file_id] = state
    return states


def _diagnosed(entries: list[Entry], around: Surroundings) -> dict[int, InetDiag]:
    """What the kernel's socket diagnosis lists, by inode: those that are bound."""
    kinds = {(entry.family, entry.protocol) for entry in entries}
    return {diag.ino: diag for kind in kinds for diag in around.namespace.diag.inet(*kind)}


def _remote(entry: Entry, diag: InetDiag | None) -> Address | None:
    """getpeername(2) doesn't tell of a peer with port 0."""
    remote = remote_address(entry.sock)
    if remote is None and diag and any(diag.remote[0]):
        return Address(_text(entry.family, diag.remote[0]), diag.remote[1])
    return remote


def _collect(entry: Entry, around: Surroundings, diag: InetDiag | None) -> UdpSocket:
    sock = entry.sock
    events = ksock.events(sock.fileno())
    if entry.protocol == socket.IPPROTO_UDP and sock.getsockopt(SOL_UDP, UDP_ENCAP):
        around.refuse(entry, "encapsulates packets for the kernel (UDP_ENCAP)")
    remote = _remote(entry, diag)
    return UdpSocket(
        **entry.base(around),  # type: ignore[arg-type]
        family=entry.family,
        protocol=entry.protocol,
        local=local_address(sock),
        remote=remote,
        shutdown=diag.shutdown if diag else ksock.SHUT_RCV if events & ksock.POLLRDHUP else 0,
        memberships=around.groups.of(sock),
        queue=_queue(entry, around, events) if events & POLLIN else (),
        held_back=_held_back(entry, around, remote) if ksock.unsent(sock.fileno()) else None,
        error=_error(entry, around, remote) if events & POLLERR else 0,
    )


def _error(entry: Entry, around: Surroundings, remote: Address | None) -> int:
    """The errno that the program's next call will get."""
    memory = insight.sockets()
    if memory is None:
        around.refuse(entry, "an error is pending that the program has not read", insight.why_not() or RETRY)
        return 0
    error, queued = memory.error(entry.sock.fileno())
    if queued:
        around.refuse(entry, "messages wait in its error queue (MSG_ERRQUEUE)", RETRY)
    elif error != errno.ECONNREFUSED or remote is None or _told_of_errors(entry):
        name = errno.errorcode.get(error, str(error))
        around.refuse(entry, f"an error is pending ({name}) that can't be brought about again", RETRY)
    return error


def _told_of_errors(entry: Entry) -> bool:
    """Whether an error that comes is queued besides (IP_RECVERR)."""
    if entry.sock.getsockopt(socket.IPPROTO_IP, IP_RECVERR):
        return True
    return entry.family == socket.AF_INET6 and bool(entry.sock.getsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR))


def _held_back(entry: Entry, around: Surroundings, remote: Address | None) -> HeldBack | None:
    memory = insight.sockets()
    if memory is None:
        reason = "a datagram is held back (UDP_CORK or MSG_MORE)"
        around.refuse(entry, reason, RETRY if insight.untried() else insight.why_not())
        return None
    held = memory.held_back(entry.sock.fileno())
    if held is None:
        return None
    data, (host, port) = held
    return HeldBack(data, remote or Address(_text(entry.family, host), port))


def _text(family: int, host: bytes) -> str:
    """As a socket of that family shows an address."""
    if len(host) == 16:
        return socket.inet_ntop(socket.AF_INET6, host)
    return (MAPPED if family == socket.AF_INET6 else "") + socket.inet_ntop(socket.AF_INET, host)


def _queue(entry: Entry, around: Surroundings, events: int) -> tuple[Datagram, ...]:
    memory = insight.sockets()
    if memory is not None:
        found = [_read(entry, around, one) for one in memory.datagrams(entry.sock.fileno())]
    elif insight.untried():
        around.refuse(entry, "datagrams wait: only kernel memory shows all of them", RETRY)
        return ()
    elif events & POLLERR:
        return ()  # to receive would consume the error
    elif entry.sock.getsockopt(socket.SOL_SOCKET, ksock.SO_PEEK_OFF) >= 0:
        around.refuse(entry, "datagrams are queued while the program uses SO_PEEK_OFF", RETRY)
        return ()
    else:
        found = [_peeked(entry, around, peeked) for peeked in ksock.peek_messages(entry.sock)]
    for one in found:
        if _is_v6(one.source.host) and len(one.data) > LARGEST_V6:
            reason = f"an IPv6 datagram of {len(one.data)} bytes waits: more than fits in one packet"
            around.refuse(entry, reason, RETRY)
    return tuple(found)


def _is_v6(host: str) -> bool:
    return ":" in host and not host.startswith(MAPPED)


def _read(entry: Entry, around: Surroundings, one: sockmem.Datagram) -> Datagram:
    if one.merged:
        around.refuse(entry, "datagrams wait that were merged (UDP_GRO)", RETRY)
    if one.extended:
        around.refuse(entry, "datagrams wait that came with IP options or extension headers", RETRY)
    source = Address(_text(entry.family, one.source[0]), one.source[1])
    return Datagram(one.data, source, Address(_text(entry.family, one.destination), 0), one.ttl, one.tos)


def _peeked(entry: Entry, around: Surroundings, peeked: Peeked) -> Datagram:
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
    return Datagram(peeked.data, source, destination, ttl, tos)
