"""Raw IP and packet sockets come back as they were, where nothing waits in them."""

from __future__ import annotations

import socket
import struct

import pytest

from podtree.objects.inet import checksum
from socketcell import PATIENCE_S, Sockets, refused, transplant

V4, V6, RAW = socket.AF_INET, socket.AF_INET6, socket.SOCK_RAW
ICMP_FILTER, PACKET_ADD_MEMBERSHIP, PACKET_AUXDATA, SOL_PACKET = 1, 1, 8, 263


def echo(number: int) -> bytes:
    """An ICMP echo request."""
    head = struct.pack("!BBHHH", 8, 0, 0, 1, number)
    return head[:2] + struct.pack("!H", checksum(head)) + head[4:]


def test_raw() -> None:
    def setup() -> Sockets:
        made = {
            "ping": socket.socket(V4, RAW, socket.IPPROTO_ICMP),
            "six": socket.socket(V6, RAW, socket.IPPROTO_ICMPV6),
            "own": socket.socket(V4, RAW, 253),  # for experiments, RFC 3692
            "send": socket.socket(V4, RAW, socket.IPPROTO_RAW),
        }
        made["ping"].setsockopt(255, ICMP_FILTER, struct.pack("=I", ~(1 << 0) & 0xFFFFFFFF))  # echo replies only
        made["own"].bind(("127.0.0.5", 0))
        made["own"].connect(("127.0.0.6", 0))
        made["own"].setsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL, 0)
        made["own"].setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 33)
        made["six"].setsockopt(socket.IPPROTO_ICMPV6, 1, b"\xff" * 32)  # ICMPV6_FILTER: nothing
        return made

    def check(made: Sockets) -> None:
        made["ping"].settimeout(PATIENCE_S)
        made["ping"].sendto(echo(7), ("127.0.0.1", 0))
        packet = made["ping"].recv(100)
        assert packet[20] == 0 and packet[26:28] == b"\0\7", packet
        assert made["own"].getsockname()[0] == "127.0.0.5"
        with socket.socket(V4, RAW, 253) as other:
            other.bind(("127.0.0.6", 0))
            other.settimeout(PATIENCE_S)
            made["own"].send(b"hello")
            packet = other.recv(100)
            assert packet[8] == 33 and packet[20:] == b"hello"
        assert made["send"].getsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL) == 1
        assert made["six"].getsockopt(socket.IPPROTO_ICMPV6, 1, 32) == b"\xff" * 32

    transplant(setup, check)


def test_packet() -> None:
    """Bound to an interface, to a protocol of all, to nothing; one that wants all that passes by."""

    def setup() -> Sockets:
        made = {
            "lo": socket.socket(socket.AF_PACKET, RAW, 0),
            "all": socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x88B5)),
            "idle": socket.socket(socket.AF_PACKET, RAW, 0),
        }
        made["lo"].bind(("lo", 0x88B6))
        made["lo"].setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        made["lo"].setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, struct.pack("=iHH8x", 1, 1, 0))  # PACKET_MR_PROMISC
        return made

    def check(made: Sockets) -> None:
        assert made["lo"].getsockname()[:2] == ("lo", 0x88B6) and made["all"].getsockname()[:2] == ("", 0x88B5)
        assert made["idle"].getsockname()[:2] == ("", 0)
        for name, kind in (("lo", 0x88B6), ("all", 0x88B5)):
            made[name].settimeout(PATIENCE_S)
            with socket.socket(socket.AF_PACKET, RAW, 0) as sender:
                sender.bind(("lo", 0))
                sender.send(bytes(12) + struct.pack("!H", kind) + b"frame")
            assert made[name].recv(100).endswith(b"frame")
        drop = struct.pack("=iHH8x", 1, 1, 0)
        made["lo"].setsockopt(SOL_PACKET, 2, drop)  # PACKET_DROP_MEMBERSHIP
        assert made["lo"].getsockopt(SOL_PACKET, PACKET_AUXDATA) == 1

    transplant(setup, check)


def test_refuses_what_waits() -> None:
    def setup() -> Sockets:
        ping = socket.socket(V4, RAW, socket.IPPROTO_ICMP)
        ping.sendto(echo(1), ("127.0.0.1", 0))
        return {"a": ping}

    refused(setup, "packets or an error wait", lambda made: made["a"].recv(100)[20] in (0, 8) or pytest.fail("lost"))


def test_refuses_a_ring() -> None:
    def setup() -> Sockets:
        sock = socket.socket(socket.AF_PACKET, RAW, 0)
        sock.setsockopt(SOL_PACKET, 5, struct.pack("4I", 4096, 2, 2048, 4))  # PACKET_RX_RING
        return {"a": sock}

    refused(setup, "ring")


def test_refuses_ping_and_others() -> None:
    """Sockets that no module saves, by their names."""

    def ping() -> Sockets:
        with open("/proc/sys/net/ipv4/ping_group_range", "w") as file:
            file.write("0 0")
        return {"a": socket.socket(V4, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)}

    refused(ping, "ICMP")
    refused(lambda: {"a": socket.socket(44, RAW, 0)}, "family 44")  # AF_XDP
    refused(lambda: {"a": socket.socket(socket.AF_NETLINK, RAW, 12)}, "netlink socket of protocol 12")
