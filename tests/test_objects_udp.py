"""UDP and netlink sockets come back with their addresses, peers and waiting datagrams."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import socket
import struct

import pytest

from podtree.kernel.sys import NR, syscall
from podtree.objects import insight
from podtree.objects.sockopts import read_filter
from socketcell import PATIENCE_S, Sockets, frozen, refused, restored, transplant

V4, V6 = socket.AF_INET, socket.AF_INET6


def udp(family: int = V4, host: str | None = None, port: int = 0) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.settimeout(PATIENCE_S)
    if host is not None:
        sock.bind((host, port))
    return sock


def drained(sock: socket.socket) -> list[bytes]:
    """All that waits."""
    sock.setblocking(False)
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(sock.recv(100))
    return found


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


@pytest.mark.parametrize("hosts", [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("::", "::ffff:127.0.0.2")])
def test_group_goes_on(hosts: tuple[str, str]) -> None:
    """A program chooses in a group of one port, in the order in which they came; another socket has the port, too."""
    to = hosts[1].removeprefix("::ffff:")
    family = V6 if ":" in hosts[0] else V4

    def send(texts: range) -> None:
        for number in texts:
            udp().sendto(b"" if number % 3 == 0 else b"%d" % number, (to, 5300))

    def setup() -> Sockets:
        made = {}
        for number in (2, 0, 1, 3):
            made[f"{number}"] = sock = udp(family)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((hosts[0], 5300))
        made["connected"] = udp()
        for option in (socket.SO_REUSEPORT, socket.SO_REUSEADDR):
            made["connected"].setsockopt(socket.SOL_SOCKET, option, 1)
        made["connected"].bind((to, 5300))
        made["connected"].connect((to, 6000))
        # ldb [0]; and #3; ret a: as the first letter says. An empty one has none: that gives 0.
        code = ctypes.create_string_buffer(
            struct.pack("=HBBIHBBIHBBI", 0x30, 0, 0, 0, 0x54, 0, 0, 3, 0x16, 0, 0, 0), 24
        )
        made["0"].setsockopt(socket.SOL_SOCKET, 51, struct.pack("@HxxxxxxQ", 3, ctypes.addressof(code)))
        send(range(20))
        return made

    def check(made: Sockets) -> None:
        assert made["connected"].getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 1
        send(range(20, 40))
        got = {name: drained(sock) for name, sock in made.items()}
        assert got == {
            name: [b"" if n % 3 == 0 else b"%d" % n for n in range(40) if chosen(n) == index]
            for index, name in enumerate(made)
        }

    def chosen(number: int) -> int:
        return 0 if number % 3 == 0 else (b"%d" % number)[0] & 3

    transplant(setup, check)


def test_group_shares_again() -> None:
    """Without a program the kernel spreads senders over the group."""

    def setup() -> Sockets:
        made = {}
        for number in range(3):
            made[str(number)] = sock = udp()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(("0.0.0.0", 5300))
        return made

    def check(made: Sockets) -> None:
        for number in range(120):  # one of the three stays without any with a probability of 1e-20
            udp(V4, "127.0.0.1", 6000 + number).sendto(b"x", ("127.0.0.1", 5300))
        counts = [len(drained(sock)) for sock in made.values()]
        assert sum(counts) == 120 and all(counts)

    transplant(setup, check)


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


def group_request(group: str, host: str = "") -> bytes:
    """struct group_req, or with `host` struct group_source_req, on `lo`."""

    def storage(address: str) -> bytes:
        if ":" in address:
            return struct.pack("=HHI16s", V6, 0, 0, socket.inet_pton(V6, address)).ljust(128, b"\0")
        return struct.pack("=HH4s", V4, 0, socket.inet_aton(address)).ljust(128, b"\0")

    return struct.pack("=I4x", 1) + storage(group) + (storage(host) if host else b"")


def test_multicast() -> None:
    """Groups of IPv4 and IPv6, of one socket or of several, some sources only or all but some; and what waits."""
    join, join_source, block, leave = 42, 46, 43, 45  # MCAST_JOIN_GROUP, MCAST_JOIN_SOURCE_GROUP, ...
    ip, ip6 = socket.IPPROTO_IP, socket.IPPROTO_IPV6

    def send(data: bytes, group: str, source: str) -> None:
        with udp(V4, source) as sock:
            sock.setsockopt(ip, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            sock.sendto(data, (group, 5300))

    def setup() -> Sockets:
        made: Sockets = {}
        for name, family in (("all", V4), ("some", V4), ("most", V4), ("six", V6), ("none", V4)):
            made[name] = sock = udp(family)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("::" if family == V6 else "0.0.0.0", 5300))
            sock.setsockopt(ip, 49, 0)  # IP_MULTICAST_ALL
        made["all"].setsockopt(ip, join, group_request("239.1.2.3"))
        made["all"].setsockopt(ip, join, group_request("239.1.2.4"))
        made["some"].setsockopt(ip, join_source, group_request("239.1.2.3", "127.0.0.7"))
        made["some"].setsockopt(ip, join_source, group_request("239.1.2.3", "127.0.0.8"))
        made["most"].setsockopt(ip, join, group_request("239.1.2.3"))
        made["most"].setsockopt(ip, block, group_request("239.1.2.3", "127.0.0.7"))
        made["six"].setsockopt(ip6, join, group_request("ff02::123"))
        made["six"].setsockopt(ip, join, group_request("239.1.2.5"))
        send(b"early", "239.1.2.4", "127.0.0.7")
        return made

    def check(made: Sockets) -> None:
        for number in (1, 7, 8):
            send(b"%d" % number, "239.1.2.3", f"127.0.0.{number}")
        send(b"5", "239.1.2.5", "127.0.0.1")
        counts = {"all": 4, "some": 2, "most": 2, "six": 1}
        got = {name: [made[name].recv(20) for _ in range(count)] for name, count in counts.items()}
        assert got["all"] == [b"early", b"1", b"7", b"8"]
        assert (got["some"], got["most"], got["six"]) == ([b"7", b"8"], [b"1", b"8"], [b"5"])
        made["six"].setsockopt(ip6, leave, group_request("ff02::123"))  # nothing can be sent to it on `lo`
        with pytest.raises(OSError):
            made["six"].setsockopt(ip6, leave, group_request("ff02::123"))
        for sock in made.values():
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(20)

    transplant(setup, check)


@pytest.mark.parametrize("bound", ["239.1.2.3", "0.0.0.0", "::"])
def test_waiting_of_a_group_that_was_left(bound: str) -> None:
    """Messages to a group and to everybody; another socket is bound to the same and hears nothing anew."""
    ip = socket.IPPROTO_IP

    def setup() -> Sockets:
        made = {"t": udp(V6 if bound == "::" else V4), "other": udp(), "s": udp(V4, "127.0.0.9", 6000)}
        for name, host in (("t", bound), ("other", "0.0.0.0")):
            made[name].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made[name].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            made[name].bind((host, 5300))
        made["t"].setsockopt(ip, 49, 0)  # IP_MULTICAST_ALL
        made["s"].setsockopt(ip, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        made["s"].setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        made["t"].setsockopt(ip, 42, group_request("239.1.2.3"))  # MCAST_JOIN_GROUP
        made["s"].sendto(b"group", ("239.1.2.3", 5300))
        made["s"].sendto(b"all", ("127.255.255.255", 5300))
        made["t"].setsockopt(ip, 45, group_request("239.1.2.3"))  # MCAST_LEAVE_GROUP
        return made

    def check(made: Sockets) -> None:
        assert drained(made["t"]) == ([b"group"] if bound == "239.1.2.3" else [b"group", b"all"])
        assert drained(made["other"]) == [b"group", b"all"]
        made["s"].sendto(b"nobody", ("239.1.2.3", 5300))
        assert drained(made["t"]) == drained(made["other"]) == []

    transplant(setup, check)


@pytest.mark.parametrize("family,host", [(V4, "127.0.0.1"), (V6, "::1"), (V6, "::ffff:127.0.0.1")])
@pytest.mark.parametrize("connected", [False, True])
def test_held_back(family: int, host: str, connected: bool) -> None:
    """A datagram that is being put together, in several pieces, by flag or by option."""
    large = random.Random(4).randbytes(30_000)

    def setup() -> Sockets:
        made = {"t": udp(family, host, 5300), "more": udp(family), "cork": udp(family)}
        made["cork"].setsockopt(socket.IPPROTO_UDP, 1, 1)  # UDP_CORK
        for name, flag in (("more", socket.MSG_MORE), ("cork", 0)):
            if connected:
                made[name].connect((host, 5300))
            for piece in (name.encode(), large):
                if connected:
                    made[name].send(piece, flag)
                else:
                    made[name].sendto(piece, flag, (host, 5300))
        return made

    def check(made: Sockets) -> None:
        made["t"].setblocking(False)
        with pytest.raises(BlockingIOError):
            made["t"].recv(1)
        made["more"].send(b" done") if connected else made["more"].sendto(b" done", (host, 5300))
        made["t"].settimeout(PATIENCE_S)
        assert made["t"].recv(70_000) == b"more" + large + b" done"
        assert made["cork"].getsockopt(socket.IPPROTO_UDP, 1) == 1
        made["cork"].setsockopt(socket.IPPROTO_UDP, 1, 0)
        assert made["t"].recv(70_000) == b"cork" + large

    transplant(setup, check)


def test_lite() -> None:
    """UDP-Lite: how much of a datagram its checksum covers."""
    lite = 136

    def setup() -> Sockets:
        made = {"t": socket.socket(V4, socket.SOCK_DGRAM, lite), "s": socket.socket(V4, socket.SOCK_DGRAM, lite)}
        made["t"].bind(("127.0.0.1", 5300))
        made["t"].setsockopt(lite, 11, 8)  # UDPLITE_RECV_CSCOV
        made["s"].setsockopt(lite, 10, 20)  # UDPLITE_SEND_CSCOV
        made["s"].sendto(b"x" * 100, ("127.0.0.1", 5300))
        return made

    def check(made: Sockets) -> None:
        made["s"].sendto(b"y" * 100, ("127.0.0.1", 5300))
        assert [made["t"].recv(200) for _ in range(2)] == [b"x" * 100, b"y" * 100]
        assert made["t"].getsockopt(lite, 11) == 8 and made["s"].getsockopt(lite, 10) == 20

    transplant(setup, check)


def test_connected_to_port_zero() -> None:
    """As programs do to learn their own address: getpeername(2) doesn't tell of it."""

    def setup() -> Sockets:
        sock = udp()
        sock.connect(("127.0.0.3", 0))
        return {"a": sock}

    def check(made: Sockets) -> None:
        assert made["a"].getsockname()[0] == "127.0.0.1"
        assert made["a"].send(b"x") == 1  # which an unconnected one can't

    transplant(setup, check)


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])
def test_shut(how: int) -> None:
    def setup() -> Sockets:
        made = {"a": udp(V4, "127.0.0.1", 6000), "b": udp(V4, "127.0.0.1", 6001)}
        made["a"].connect(("127.0.0.1", 6001))
        made["b"].sendto(b"waits", ("127.0.0.1", 6000))
        made["a"].shutdown(how)
        return made

    def check(made: Sockets) -> None:
        assert made["a"].recv(10) == b"waits"
        if how != socket.SHUT_WR:
            made["a"].settimeout(None)
            assert made["a"].recv(10) == b""
        if how != socket.SHUT_RD:
            with pytest.raises(BrokenPipeError):
                made["a"].send(b"x")
        else:
            made["a"].send(b"x")
            assert made["b"].recv(1) == b"x"

    transplant(setup, check)


@pytest.mark.parametrize("family,host", [(V4, "127.0.0.1"), (V6, "::1")])
@pytest.mark.parametrize("waiting", [b"", b"came before"])
def test_pending_refusal(family: int, host: str, waiting: bytes) -> None:
    """That nobody was there, and the program has not heard of it; also if somebody is there by now."""

    def setup() -> Sockets:
        made = {"a": udp(family, host, 6000), "other": udp(family, host, 6001)}
        if waiting:
            made["other"].sendto(waiting, (host, 6000))
        made["a"].connect((host, 6002))
        made["a"].send(b"x")
        return made | {"late": udp(family, host, 6002)}

    def check(made: Sockets) -> None:
        with pytest.raises(ConnectionRefusedError):
            made["a"].recv(100)
        if waiting:
            assert made["a"].recv(100) == waiting
        made["a"].send(b"y")
        assert made["late"].recv(10) == b"y"

    transplant(setup, check)


def test_empty_ones() -> None:
    """Datagrams without a byte, looked at more than once."""
    texts = [b"", b"one", b"", b"", b"two", b""]

    def setup() -> Sockets:
        made = {"t": udp(V4, "127.0.0.1", 5300), "s": udp(V4, "127.0.0.1", 6000)}
        for text in texts:
            made["s"].sendto(text, ("127.0.0.1", 5300))
        return made

    def check(made: Sockets) -> None:
        assert made["t"].recv(10, socket.MSG_PEEK) == b""  # which would go on to the next, had anybody peeked before
        assert [made["t"].recvfrom(10) for _ in texts] == [(text, ("127.0.0.1", 6000)) for text in texts]

    with frozen(setup, check) as cell:
        cell.collect()
        restored(cell, check)


def test_filter() -> None:
    """A BPF program that a socket's messages go through, and its lock: of UDP, TCP, unix, netlink."""
    nothing_shorter = struct.pack("=HBBIHBBIHBBIHBBI", 0x80, 0, 0, 0, 0x35, 0, 1, 12, 6, 0, 0, 0xFFFF, 6, 0, 0, 0)
    everything = struct.pack("=HBBI", 6, 0, 0, 0xFFFF)

    def attach(sock: socket.socket, program: bytes) -> None:
        code = ctypes.create_string_buffer(program, len(program))
        fprog = struct.pack("@HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
        sock.setsockopt(socket.SOL_SOCKET, 26, fprog)  # SO_ATTACH_FILTER

    def setup() -> Sockets:
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        made = {"t": udp(V4, "127.0.0.1", 5300), "one": one, "other": other, "tcp": socket.socket()}
        made["netlink"] = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        udp().sendto(b"a", ("127.0.0.1", 5300))
        for name, sock in made.items():
            attach(sock, nothing_shorter if name == "t" else everything)
        made["t"].setsockopt(socket.SOL_SOCKET, 44, 1)  # SO_LOCK_FILTER
        return made

    def check(made: Sockets) -> None:
        for text in (b"b", b"long enough", b"c"):
            udp().sendto(text, ("127.0.0.1", 5300))
        assert [made["t"].recv(20) for _ in range(2)] == [b"a", b"long enough"]
        with pytest.raises(PermissionError):
            attach(made["t"], everything)
        for name in ("one", "tcp", "netlink"):
            assert read_filter(made[name]) == everything

    transplant(setup, check)


def test_refuses_an_ebpf_filter() -> None:
    def setup() -> Sockets:
        code = ctypes.create_string_buffer(struct.pack("=BBhiBBhi", 0xB7, 0, 0, -1, 0x95, 0, 0, 0), 16)
        licence = ctypes.create_string_buffer(b"GPL")
        attr = struct.pack("=IIQQ", 1, 2, ctypes.addressof(code), ctypes.addressof(licence)).ljust(128, b"\0")
        program = syscall(NR.bpf, 5, attr, 128)  # BPF_PROG_LOAD of a BPF_PROG_TYPE_SOCKET_FILTER
        sock = udp()
        sock.setsockopt(socket.SOL_SOCKET, 50, program)  # SO_ATTACH_BPF
        os.close(program)
        return {"a": sock}

    refused(setup, "eBPF")


def test_refused_without_kernel_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(insight.SWITCH, "off")
    insight.forget()

    def held_back() -> Sockets:
        sock = udp(V4, "127.0.0.1", 5300)
        sock.connect(("127.0.0.1", 5300))
        sock.send(b"half", socket.MSG_MORE)
        return {"a": sock}

    def error() -> Sockets:
        sock = udp()
        sock.connect(("127.0.0.1", 1))
        sock.send(b"x")
        return {"a": sock}

    def hears_of_it(made: Sockets) -> None:
        with pytest.raises(ConnectionRefusedError):
            made["a"].recv(1)

    def whole(made: Sockets) -> None:
        made["a"].send(b" done")
        assert made["a"].recv(20) == b"half done"

    try:
        refused(held_back, "held back", whole)
        refused(error, "error is pending", hears_of_it)
        test_connected_with_datagrams_from_before()
        test_told_of_the_packet()
    finally:
        insight.forget()


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
