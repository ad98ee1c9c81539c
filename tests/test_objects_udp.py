"""UDP and netlink sockets come back with their addresses, peers and waiting datagrams."""

from __future__ import annotations

import random
import socket
import struct

import pytest

from socketcell import PATIENCE_S, Sockets, refused, transplant

V4, V6 = socket.AF_INET, socket.AF_INET6


def udp(family: int = V4, host: str | None = None, port: int = 0) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.settimeout(PATIENCE_S)
    if host is not None:
        sock.bind((host, port))
    return sock


@pytest.mark.parametrize(
    "family,bound,sender_family,to",
    [
        (V4, "127.0.0.1", V4, "127.0.0.1"),
        (V4, "0.0.0.0", V4, "127.5.6.7"),
        (V6, "::1", V6, "::1"),
        (V6, "::", V6, "::1"),
        (V6, "::", V4, "127.0.0.9"),
    ],
)
def test_waiting_datagrams(family: int, bound: str, sender_family: int, to: str) -> None:
    largest = 65507 if sender_family == V4 else 65488
    payloads = [b"one", b"", random.Random(2).randbytes(largest), b"odd", b"", b"x" * 1400]

    def setup() -> Sockets:
        made = {"t": udp(family, bound, 5300), "a": udp(sender_family, to, 6000)}
        gone = udp(sender_family, to, 6001)
        made["t"].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 200_000)
        for number, payload in enumerate(payloads):
            (gone if number % 2 else made["a"]).sendto(payload, (to, 5300))
        return made

    def check(made: Sockets) -> None:
        made["a"].sendto(b"last", (to, 5300))
        got = [made["t"].recvfrom(70000) for _ in range(7)]
        assert [data for data, _ in got] == [*payloads, b"last"]
        assert [sender[1] for _, sender in got] == [6000, 6001, 6000, 6001, 6000, 6001, 6000]
        assert {sender[0].removeprefix("::ffff:") for _, sender in got} == {to}
        made["t"].sendto(b"answer", got[0][1])
        assert made["a"].recv(10) == b"answer"
        assert made["t"].getsockname()[:2] == (bound, 5300)
        assert made["t"].getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 400_000

    transplant(setup, check)


def test_connected_with_datagrams_from_before() -> None:
    def setup() -> Sockets:
        a, b, c = udp(V4, "127.0.0.1", 6000), udp(V4, "127.0.0.1", 6001), udp(V4, "127.0.0.1", 6002)
        c.sendto(b"before", ("127.0.0.1", 6000))
        a.connect(("127.0.0.1", 6001))
        b.connect(("127.0.0.1", 6000))
        b.send(b"after")
        b.shutdown(socket.SHUT_RD)
        return {"a": a, "b": b, "c": c, "unbound": udp()}

    def check(made: Sockets) -> None:
        made["c"].sendto(b"not taken", ("127.0.0.1", 6000))
        made["b"].send(b"more")
        got = [made["a"].recvfrom(20) for _ in range(3)]
        assert got == [(b"before", ("127.0.0.1", 6002)), (b"after", ("127.0.0.1", 6001)), (b"more", got[1][1])]
        made["b"].settimeout(None)
        assert made["b"].recv(1) == b""
        assert made["unbound"].getsockname() == ("0.0.0.0", 0)
        with pytest.raises(OSError):
            made["unbound"].getpeername()

    transplant(setup, check)


def test_group_of_one_port() -> None:
    def setup() -> Sockets:
        made = {}
        for number in range(4):
            made[str(number)] = sock = udp()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(("0.0.0.0", 5300))
        for number in range(40):
            udp(V4, "127.0.0.1", 6000 + number).sendto(b"%d" % number, ("127.0.0.1", 5300))
        return made

    def check(made: Sockets) -> None:
        everything = []
        for sock in made.values():
            sock.settimeout(0)
            mine = []
            while True:
                try:
                    data, sender = sock.recvfrom(10)
                except BlockingIOError:
                    break
                assert sender[1] == 6000 + int(data)
                mine.append(int(data))
            assert mine == sorted(mine)
            everything += mine
        assert sorted(everything) == list(range(40))

    cell = transplant(setup, check)
    assert len({len(cell.named(str(n)).queue) for n in range(4)} | {0}) > 1  # type: ignore[union-attr]


def test_told_of_the_packet() -> None:
    def setup() -> Sockets:
        made = {"t": udp(V4, "0.0.0.0", 5300), "s": udp(V4, "127.0.0.1", 6000)}
        made["t"].setsockopt(socket.IPPROTO_IP, 8, 1)  # IP_PKTINFO
        made["t"].setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        made["s"].setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x28)
        made["s"].sendto(b"x", ("127.8.8.8", 5300))
        return made

    def check(made: Sockets) -> None:
        _, control, _, _ = made["t"].recvmsg(10, 200)
        told = {kind: value for _, kind, value in control}
        assert socket.inet_ntoa(told[8][8:12]) == "127.8.8.8" and told[1] == b"\x28"

    transplant(setup, check)


def test_refuses_multicast() -> None:
    def setup() -> Sockets:
        sock = udp(V4, "0.0.0.0", 5300)
        group = socket.inet_aton("239.1.2.3") + socket.inet_aton("127.0.0.1")
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
        return {"a": sock}

    refused(setup, "multicast")


def test_refuses_what_is_held_back() -> None:
    def setup() -> Sockets:
        sock = udp(V4, "127.0.0.1", 5300)
        sock.connect(("127.0.0.1", 5300))
        sock.send(b"half", socket.MSG_MORE)
        return {"a": sock}

    refused(setup, "held back", lambda made: made["a"].send(b" done") and made["a"].recv(20) == b"half done")


def test_refuses_a_pending_error_and_leaves_it() -> None:
    def setup() -> Sockets:
        sock = udp()
        sock.connect(("127.0.0.1", 1))
        sock.send(b"x")
        return {"a": sock}

    def check(made: Sockets) -> None:
        with pytest.raises(ConnectionRefusedError):
            made["a"].recv(1)

    refused(setup, "error is pending", check)


def test_refuses_raw_and_ping() -> None:
    refused(lambda: {"a": socket.socket(V4, socket.SOCK_RAW, socket.IPPROTO_ICMP)}, "raw IP socket")
    refused(lambda: {"a": socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)}, "packet socket")


def test_netlink() -> None:
    def setup() -> Sockets:
        route = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        route.bind((4711, 0x11))  # RTMGRP_LINK, RTMGRP_IPV4_IFADDR
        route.setsockopt(270, 11, 1)  # NETLINK_EXT_ACK
        return {
            "route": route,
            "fresh": socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 16),
            "audit": socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 9),  # dbus-daemon and sshd have one
        }

    def check(made: Sockets) -> None:
        assert made["route"].getsockname() == (4711, 0x11) and made["route"].getsockopt(270, 11) == 1
        assert made["fresh"].getsockname()[0] == 0
        assert (made["audit"].getsockname()[0], made["audit"].proto) == (0, 9)
        request = struct.pack("=IHHIIB3x", 20, 18, 0x301, 1, 0, 0)  # RTM_GETLINK, dump
        made["route"].send(request)
        assert b"lo\0" in made["route"].recv(65536)

    transplant(setup, check)


def test_refuses_unread_netlink_answers() -> None:
    def setup() -> Sockets:
        route = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        route.send(struct.pack("=IHHIIB3x", 20, 18, 0x301, 1, 0, 0))
        return {"route": route}

    refused(setup, "wait to be read", lambda made: b"lo\0" in made["route"].recv(65536) or pytest.fail("lost"))
