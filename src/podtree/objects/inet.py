"""Internet addresses of sockets: shared by TCP and UDP."""

from __future__ import annotations

import socket
import struct

import msgspec

from podtree.errors import Damaged

MAPPED = "::ffff:"
_MAPPED = bytes(10) + b"\xff\xff"

#: As Python's socket module has it: (host, port) or (host, port, flow, scope).
RawAddress = tuple[str, int] | tuple[str, int, int, int]
#: (packed address, port); IPv4-mapped IPv6 addresses as IPv4, so that both ends of a connection agree.
Key = tuple[bytes, int]


class Address(msgspec.Struct, frozen=True, array_like=True):
    """An IPv4 or IPv6 socket address."""

    host: str
    port: int
    flow: int = 0
    scope: int = 0

    def raw(self, family: int) -> RawAddress:
        """For the socket module."""
        if not 0 <= self.port <= 0xFFFF:
            raise Damaged(f"port {self.port}")
        if family == socket.AF_INET:
            return self.host, self.port
        return self.host, self.port, self.flow, self.scope

    def key(self, family: int) -> Key:
        """For comparing: IPv4-mapped addresses are IPv4 addresses."""
        packed = pack(family, self.host)
        return (packed[12:] if packed[:12] == _MAPPED else packed), self.port


def pack(family: int, host: str) -> bytes:
    """The address in network order, without a scope."""
    try:
        return socket.inet_pton(family, host.partition("%")[0])
    except OSError as error:
        raise Damaged(f"internet address {host!r}") from error


def address(raw: object) -> Address:
    """From what getsockname(2) gave."""
    assert isinstance(raw, tuple)
    return Address(raw[0].partition("%")[0], *raw[1:])


def local_address(sock: socket.socket) -> Address:
    return address(sock.getsockname())


def remote_address(sock: socket.socket) -> Address | None:
    """None for a socket that is not connected."""
    try:
        return address(sock.getpeername())
    except OSError:
        return None


def wildcard(host: str) -> bool:
    """Whether this is the unspecified address, "any"."""
    return host in ("0.0.0.0", "::")


def loopback_for(family: int, host: str) -> str:
    """An address to reach a socket bound to `host` by."""
    if not wildcard(host):
        return host
    return "127.0.0.1" if family == socket.AF_INET else "::1"


def checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF

