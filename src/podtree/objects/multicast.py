"""Multicast groups that sockets have joined, and whose messages they want. Source: ip(7), ipv6(7), RFC 3678.

No call lists a socket's groups. But the network namespace's are in /proc, and MCAST_MSFILTER tells of a socket and
one group what it wants to hear of it, or that it is no member.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Iterator

import msgspec

from podtree.errors import Damaged
from podtree.kernel import procfs
from podtree.objects.inet import MAPPED, pack

IP_MULTICAST_ALL, MCAST_JOIN_GROUP, MCAST_MSFILTER = 49, 42, 48  # linux/in.h
MCAST_EXCLUDE, MCAST_INCLUDE = 0, 1
ADDRESS_SIZE = 128  # struct sockaddr_storage
MAX_SOURCES = 512
LOOPBACK = 1  # interface number of `lo`, in every network namespace
#: Groups that every interface is in: 224.0.0.1; ff02::1 and ff01::1.
EVERYBODY = {
    socket.inet_aton("224.0.0.1"),
    *(socket.inet_pton(socket.AF_INET6, host) for host in ("ff02::1", "ff01::1")),
}
_FILTER = struct.Struct("=I4x128sII")  # struct group_filter, without its sources
_libc = ctypes.CDLL(None, use_errno=True)


class Membership(msgspec.Struct, frozen=True):
    """A socket is in `group` on interface number `interface`, and hears all but (`exclude`) or only `sources`."""

    interface: int
    group: str
    exclude: bool = True
    sources: tuple[str, ...] = ()


class Groups:
    """The groups that are joined in a network namespace, and which of them sockets have accounted for."""

    def __init__(self, host_pid: int) -> None:
        """`host_pid`: any process there."""
        self._joined = _joined_v4(host_pid) | _joined_v6(host_pid)
        self._found: set[tuple[int, bytes]] = set()

    def of(self, sock: socket.socket) -> tuple[Membership, ...]:
        """Those that a socket is in."""
        found = []
        for interface, group in sorted(self._joined):
            six = len(group) == 16
            if six and sock.family != socket.AF_INET6:
                continue
            wanted = _wanted(sock, interface, group)
            if wanted is not None:
                self._found.add((interface, group))
                found.append(wanted)
        return tuple(found)

    def unaccounted(self) -> list[str]:
        """Those that no socket was found to be in."""
        return [_text(group) for _, group in sorted(self._joined - self._found)]


def _joined_v4(host_pid: int) -> set[tuple[int, bytes]]:
    """A line for each interface begins with its number; its groups follow, indented, as numbers of this machine."""
    found, interface = set(), 0
    for line in procfs.read_text(f"/proc/{host_pid}/net/igmp").splitlines()[1:]:
        if line.startswith("\t"):
            found.add((interface, int(line.split()[0], 16).to_bytes(4, "little")))
        else:
            interface = int(line.split()[0])
    return {one for one in found if one[1] not in EVERYBODY}


def _joined_v6(host_pid: int) -> set[tuple[int, bytes]]:
    path = f"/proc/{host_pid}/net/igmp6"
    if not os.path.exists(path):
        return set()
    lines = [line.split() for line in procfs.read_text(path).splitlines()]
    found = {(int(words[0]), bytes.fromhex(words[2])) for words in lines}
    return {one for one in found if one[1] not in EVERYBODY}


def _text(host: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET6 if len(host) == 16 else socket.AF_INET, host)


def _level(group: bytes) -> int:
    return socket.IPPROTO_IPV6 if len(group) == 16 else socket.IPPROTO_IP


def _sockaddr(host: bytes) -> bytes:
    if len(host) == 16:
        raw = struct.pack("=HHI16s", socket.AF_INET6, 0, 0, host)
    else:
        raw = struct.pack("=HH4s", socket.AF_INET, 0, host)
    return raw.ljust(ADDRESS_SIZE, b"\0")


def _host(sockaddr: bytes) -> str:
    if struct.unpack_from("=H", sockaddr)[0] == socket.AF_INET6:
        return socket.inet_ntop(socket.AF_INET6, sockaddr[8:24])
    return socket.inet_ntop(socket.AF_INET, sockaddr[4:8])


def _wanted(sock: socket.socket, interface: int, group: bytes) -> Membership | None:
    """None if the socket is no member."""
    head = _FILTER.pack(interface, _sockaddr(group), 0, MAX_SOURCES)
    buffer = ctypes.create_string_buffer(head, len(head) + MAX_SOURCES * ADDRESS_SIZE)
    length = ctypes.c_uint(len(buffer))
    if _libc.getsockopt(sock.fileno(), _level(group), MCAST_MSFILTER, buffer, ctypes.byref(length)) < 0:
        code = ctypes.get_errno()
        if code in (errno.EADDRNOTAVAIL, errno.ENOPROTOOPT, errno.EINVAL, errno.ENODEV):
            return None
        raise OSError(code, f"MCAST_MSFILTER: {os.strerror(code)}")
    _, _, mode, count = _FILTER.unpack_from(buffer.raw)
    sources = [buffer.raw[at : at + ADDRESS_SIZE] for at in range(len(head), len(buffer), ADDRESS_SIZE)][:count]
    return Membership(interface, _text(group), mode == MCAST_EXCLUDE, tuple(map(_host, sources)))


def _request(one: Membership) -> tuple[int, bytes]:
    """The level, and the struct group_req of MCAST_JOIN_GROUP."""
    group = pack(socket.AF_INET6 if ":" in one.group else socket.AF_INET, one.group)
    return _level(group), struct.pack("=I4x128s", one.interface, _sockaddr(group))


@contextlib.contextmanager
def heard(sock: socket.socket, hosts: Iterable[str]) -> Iterator[None]:
    """Within, messages to those of these addresses that are groups' come in on `lo`, and `sock` hears them. OSError.

    It need not be a member, which it may have been: others are, and it wants all (IP_MULTICAST_ALL).
    """
    groups = [host for host in sorted({host.removeprefix(MAPPED) for host in hosts}) if _is_group(host)]
    before = sock.getsockopt(socket.IPPROTO_IP, IP_MULTICAST_ALL)
    with contextlib.ExitStack() as stack:
        for host in groups:
            member = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
            join(stack.enter_context(member), (Membership(LOOPBACK, host),))
        if groups:  # of IPv6 it is the default; of IPv4 not in sockets of IPv6
            sock.setsockopt(socket.IPPROTO_IP, IP_MULTICAST_ALL, 1)
        yield
        sock.setsockopt(socket.IPPROTO_IP, IP_MULTICAST_ALL, before)


def _is_group(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_multicast
    except ValueError as error:
        raise Damaged(f"internet address {host!r}") from error


def join(sock: socket.socket, memberships: tuple[Membership, ...]) -> None:
    """Become a member again. OSError."""
    for one in memberships:
        if len(one.sources) > MAX_SOURCES or not 0 <= one.interface < 1 << 31:
            raise Damaged(f"multicast group {one.group} with {len(one.sources)} sources")
        level, request = _request(one)
        sock.setsockopt(level, MCAST_JOIN_GROUP, request)
        if one.sources or not one.exclude:
            mode = MCAST_EXCLUDE if one.exclude else MCAST_INCLUDE
            family = socket.AF_INET6 if level == socket.IPPROTO_IPV6 else socket.AF_INET
            wanted = request + struct.pack("=II", mode, len(one.sources))
            wanted += b"".join(_sockaddr(pack(family, source)) for source in one.sources)
            sock.setsockopt(level, MCAST_MSFILTER, wanted)
