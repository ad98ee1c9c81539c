"""TCP over the loopback comes back as it was: no byte lost or doubled, every end where it was closed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import random
import select
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from podtree.kernel import sock as ksock
from podtree.kernel.pidfd import pidfd_getfd, pidfd_open
from podtree.objects import insight
from podtree.objects import sockets as socket_objects
from podtree.objects.tcp import TcpSocket
from socketcell import PATIENCE_S, Sockets, frozen, refused, restored, transplant

V4, V6 = socket.AF_INET, socket.AF_INET6
FAMILIES = [
    pytest.param(V4, "127.0.0.1", V4, "127.0.0.1", id="v4"),
    pytest.param(V6, "::1", V6, "::1", id="v6"),
    pytest.param(V6, "::", V4, "127.0.0.1", id="v4-to-any-v6"),
    pytest.param(V6, "::ffff:127.0.0.5", V4, "127.0.0.5", id="mapped"),
    pytest.param(V6, "::", V6, "::ffff:127.3.2.1", id="mapped-both"),
    pytest.param(V4, "0.0.0.0", V4, "127.9.9.9", id="any"),
]


def tcp(family: int = V4) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(PATIENCE_S)
    return sock


def listening(family: int = V4, host: str = "127.0.0.1", port: int = 7000, backlog: int = 5) -> socket.socket:
    sock = tcp(family)
    sock.bind((host, port))
    sock.listen(backlog)
    return sock


def connection(port: int = 7000) -> Sockets:
    listener = listening(port=port)
    client = tcp()
    client.connect(("127.0.0.1", port))
    server, _ = listener.accept()
    server.settimeout(PATIENCE_S)
    listener.close()
    return {"c": client, "s": server}


def read_all(sock: socket.socket) -> bytes:
    data = []
    while chunk := sock.recv(1 << 20):
        data.append(chunk)
    return b"".join(data)


def fill(sock: socket.socket, data: bytes) -> int:
    """Send without waiting; returns how much the kernel took."""
    sock.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < len(data):
            sent += sock.send(data[sent : sent + 65536])
    sock.settimeout(PATIENCE_S)
    return sent


@pytest.mark.parametrize("family,bound,client_family,to", FAMILIES)
def test_listener_and_connection(family: int, bound: str, client_family: int, to: str) -> None:
    def setup() -> Sockets:
        listener = listening(family, bound, backlog=3)
        client = tcp(client_family)
        client.connect((to, 7000))
        server, _ = listener.accept()
        server.settimeout(PATIENCE_S)
        client.send(b"request")
        server.send(b"response")
        low = tcp(client_family)
        low.bind((to, 901))
        low.connect((to, 7000))
        low_server, _ = listener.accept()
        names = repr([(s.getsockname(), s.getpeername()) for s in (client, server, low, low_server)])
        client.send(names.encode())
        return {"l": listener, "c": client, "s": server, "low": low, "low s": low_server}

    def check(made: Sockets) -> None:
        names = repr([(s.getsockname(), s.getpeername()) for s in (made["c"], made["s"], made["low"], made["low s"])])
        assert made["s"].recv(1000) == b"request" + names.encode()
        assert made["c"].recv(100) == b"response"
        assert ksock.tcp_info(made["l"])[2] == 3
        fresh = tcp(client_family)
        fresh.connect((to, 7000))
        assert made["l"].accept()
        made["low"].close()
        assert made["low s"].recv(1) == b""

    transplant(setup, check)


def test_full_queues_both_ways() -> None:
    data = random.Random(1).randbytes(12_000_000)

    def setup() -> Sockets:
        made = connection()
        sent = [fill(made["c"], data), fill(made["s"], data)]
        assert min(sent) > 1_000_000 and max(sent) < len(data)
        assert ksock.unsent(made["c"].fileno())
        Path("sent").write_text(json.dumps(sent))
        return made

    def check(made: Sockets) -> None:
        sent = json.loads(Path("sent").read_text()) if os.path.exists("sent") else expected
        got: dict[str, bytes] = {}
        threads = [threading.Thread(target=lambda n=n: got.update({n: read_all(made[n])})) for n in made]
        for sock in made.values():
            sock.shutdown(socket.SHUT_WR)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert [len(got["s"]), len(got["c"])] == sent
        assert got["s"] == data[: sent[0]] and got["c"] == data[: sent[1]]

    with frozen(setup, check) as cell:
        c, s = cell.named("c"), cell.named("s")
        assert isinstance(c, TcpSocket) and isinstance(s, TcpSocket)
        expected = [len(s.incoming), len(c.incoming)]
        restored(cell, check)


@pytest.mark.parametrize("seed", range(60))
def test_random_closing(seed: int) -> None:
    """Random data, shutdowns and closes on both ends; then every byte and every end, exactly once."""
    dice = random.Random(seed)
    blob = random.Random(7).randbytes(200_000)
    plans: list[tuple[dict[str, int], dict[str, str]]] = []
    for _ in range(6):
        ends = {end: dice.choice(["open", "shut", "open", "shut", "close"]) for end in dice.choice(["cs", "sc"])}
        if set(ends.values()) == {"close"}:
            ends["c"] = "open"
        # Of an end that is closed, what it sent must have arrived: more than a receive queue is refused.
        sizes = {end: dice.choice([0, 1, 3000, 30_000 if "close" in ends.values() else 200_000]) for end in "cs"}
        plans.append((sizes, ends))
    other = {"c": "s", "s": "c"}

    def setup() -> Sockets:
        made: Sockets = {}
        for number, (sizes, ends) in enumerate(plans):
            pair = connection(7000 + number)
            for end, size in sizes.items():
                assert fill(pair[end], blob[:size]) == size
            for end, what in ends.items():
                if what == "shut":
                    pair[end].shutdown(socket.SHUT_WR)
                elif what == "close":
                    left = sizes[other[end]]
                    while left:  # what has unread data would reset the connection
                        left -= len(pair[end].recv(left))
                    while ksock.unsent(pair[end].fileno()):
                        select.select([], [], [], 0.01)
                    pair.pop(end).close()
            made |= {f"{number}{end}": sock for end, sock in pair.items()}
        return made

    def check(made: Sockets) -> None:
        for name, sock in made.items():
            if plans[int(name[0])][1][name[1]] == "shut":
                with pytest.raises(BrokenPipeError):
                    sock.send(b"x")
            else:
                sock.shutdown(socket.SHUT_WR)
        for name, sock in made.items():
            assert read_all(sock) == blob[: plans[int(name[0])][0][other[name[1]]]], name

    with frozen(setup, check) as cell:
        restored(cell, check)


def test_both_closed_with_data_left() -> None:
    def setup() -> Sockets:
        made = connection()
        for name, sock in made.items():
            sock.send(name.encode() * 1000)
            sock.shutdown(socket.SHUT_WR)
        select.select([], [], [], 0.1)
        return made

    def check(made: Sockets) -> None:
        with pytest.raises(OSError) as error:
            made["c"].getpeername()
        assert error.value.errno == errno.ENOTCONN
        assert read_all(made["c"]) == b"s" * 1000 and read_all(made["s"]) == b"c" * 1000
        listening().close()  # nobody holds the port but TIME_WAIT on the other's side

    transplant(setup, check)


def test_shut_for_reading() -> None:
    def setup() -> Sockets:
        made = connection()
        made["c"].send(b"first")
        made["s"].shutdown(socket.SHUT_RD)
        return made

    def check(made: Sockets) -> None:
        assert made["s"].recv(10) == b"first" and made["s"].recv(10) == b""
        made["s"].send(b"x")
        assert made["c"].recv(1) == b"x"

    transplant(setup, check)


def test_not_accepted_yet() -> None:
    def setup() -> Sockets:
        listener = listening()
        waiting, half, gone = tcp(), tcp(), tcp()
        for client in (waiting, half, gone):
            client.connect(("127.0.0.1", 7000))
        half.shutdown(socket.SHUT_WR)
        gone.close()
        return {"l": listener, "w": waiting, "h": half}

    def check(made: Sockets) -> None:
        made["w"].send(b"late")
        got = {}
        for _ in range(3):
            server, address = made["l"].accept()
            server.settimeout(PATIENCE_S)
            if address == made["w"].getsockname():
                assert server.recv(10) == b"late"
            else:
                assert server.recv(10) == b""
            got[address] = server
        server = got[made["h"].getsockname()]
        server.send(b"answer")
        assert made["h"].recv(10) == b"answer"

    transplant(setup, check)


BLOB = random.Random(9).randbytes(3_000_000)


def left(client: socket.socket, how: str) -> None:
    """What a client does that doesn't wait for the server to accept it."""
    if how == "shut":
        client.shutdown(socket.SHUT_WR)
    elif how == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if how in ("gone", "reset"):
        client.close()


@pytest.mark.parametrize("family,bound,client_family,to", FAMILIES)
def test_data_before_accept(family: int, bound: str, client_family: int, to: str) -> None:
    """Connections come out of accept(2) in their order, with what was sent, also by clients that have gone since."""
    plans = [(0, "here"), (5, "here"), (0, "gone"), (70_000, "shut"), (9, "gone"), (2_000_000, "here"), (0, "reset"),
             (300_000, "gone"), (50, "reset"), (1, "here")]  # fmt: skip
    ports = [20_001 + number for number in range(len(plans))]

    def setup() -> Sockets:
        made = {"l": listening(family, bound, backlog=10)}
        made["l"].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for (size, how), port in zip(plans, ports, strict=True):
            client = tcp(client_family)
            client.bind((to, port))
            client.connect((to, 7000))
            client.setblocking(False)
            assert not size or client.send(BLOB[:size]) == size
            left(client, how)
            if how in ("here", "shut"):
                client.settimeout(PATIENCE_S)
                made[str(port)] = client
        return made

    def check(made: Sockets) -> None:
        for (size, how), port in zip(plans, ports, strict=True):
            server, address = made["l"].accept()
            server.settimeout(PATIENCE_S)
            assert address[1] == port
            assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            if how == "here":
                made[str(port)].shutdown(socket.SHUT_WR)
            if how == "reset":
                got = server.recv(size, socket.MSG_WAITALL) if size else b""
                with pytest.raises(ConnectionResetError):
                    server.recv(1)
            else:
                got = read_all(server)
            assert got == BLOB[:size], (len(got), size, how)
            if how in ("here", "shut"):
                server.send(b"answer")
                assert made[str(port)].recv(10) == b"answer"

    transplant(setup, check)


def test_full_queue() -> None:
    """More clients than a listener's queue has room for: half made, with data sent, and others not even that far."""

    def setup() -> Sockets:
        made = {"l": listening(backlog=1)}
        for number in range(4):
            made[str(number)] = client = tcp()
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", 7000))
        for name in "0123":
            with contextlib.suppress(OSError):
                made[name].send(name.encode())
        return made

    def check(made: Sockets) -> None:
        got = set()
        made["l"].settimeout(PATIENCE_S)
        for _ in range(4):
            server, address = made["l"].accept()
            server.settimeout(PATIENCE_S)
            client = next(made[name] for name in "0123" if made[name].getsockname() == address)
            name = next(name for name in "0123" if made[name] is client)
            client.send(b"+" + name.encode())
            client.shutdown(socket.SHUT_WR)
            got.add(read_all(server))
        assert {text.lstrip(b"0123")[1:] for text in got} == {b"0", b"1", b"2", b"3"}
        assert len(got & {b"0+0", b"1+1"}) == 2

    transplant(setup, check)


def test_waiting_at_a_reuseport_group() -> None:
    """Which of the listeners of an address has a connection, too."""

    def setup() -> Sockets:
        made: Sockets = {}
        for number in range(3):
            made[f"l{number}"] = sock = tcp()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(("0.0.0.0", 7000))
            sock.listen()
        for number in range(20):
            made[str(number)] = tcp()
            made[str(number)].connect(("127.0.0.1", 7000))
            made[str(number)].send(b"%d" % number)
        Path("counts").write_text(json.dumps([ksock.tcp_info(made[f"l{number}"])[1] for number in range(3)]))
        return made

    def check(made: Sockets) -> None:
        counts = expected or json.loads(Path("counts").read_text())
        assert [ksock.tcp_info(made[f"l{number}"])[1] for number in range(3)] == counts
        for number, count in enumerate(counts):
            last = -1
            for _ in range(count):
                server, address = made[f"l{number}"].accept()
                server.settimeout(PATIENCE_S)
                text = server.recv(10)
                assert made[text.decode()].getsockname() == address and int(text) > last
                last = int(text)
        for _ in range(60):
            tcp().connect(("127.0.0.1", 7000))
        assert min(ksock.tcp_info(made[f"l{number}"])[1] for number in range(3)) > 0

    expected: list[int] = []
    with frozen(setup, check) as cell:
        for number in range(3):
            state = cell.named(f"l{number}")
            assert isinstance(state, TcpSocket)
            expected.append(len(state.waiting))
        restored(cell, check)
        expected = []


def test_closed_with_data_under_way() -> None:
    """An end that nobody holds any more has still to send more than the other's queue takes."""

    def setup() -> Sockets:
        made = connection()
        sent = fill(made["c"], BLOB)
        assert sent > 1_000_000
        made.pop("c").close()
        return made

    def check(made: Sockets) -> None:
        got = read_all(made["s"])
        assert len(got) > 1_000_000 and got == BLOB[: len(got)] and len(got) == (size or len(got))

    size = 0
    with frozen(setup, check) as cell:
        state = cell.named("s")
        assert isinstance(state, TcpSocket)
        size = len(state.incoming)
        restored(cell, check)


@pytest.mark.parametrize("unread", [0, 50_000])
@pytest.mark.parametrize("fin", [False, True])
def test_pending_reset(unread: int, fin: bool) -> None:
    """A reset that the program has not heard of: of its reads (and, after a FIN, of its writes)."""

    def setup() -> Sockets:
        made = connection()
        made["c"].sendall(BLOB[:unread])
        while ksock.queued(made["s"].fileno()) < unread:
            select.select([], [], [], 0.01)
        if fin:
            made["c"].shutdown(socket.SHUT_WR)
        made["c"].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        made.pop("c").close()
        return made

    def check(made: Sockets) -> None:
        assert not unread or made["s"].recv(unread, socket.MSG_WAITALL) == BLOB[:unread]
        wanted = errno.EPIPE if fin else errno.ECONNRESET
        assert made["s"].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == wanted
        assert made["s"].recv(1) == b""

    transplant(setup, check)


def test_pending_refusal() -> None:
    def setup() -> Sockets:
        client = tcp()
        client.setblocking(False)
        client.connect_ex(("127.0.0.1", 4444))
        return {"c": client}

    def check(made: Sockets) -> None:
        poll = select.poll()
        poll.register(made["c"], select.POLLOUT)
        assert poll.poll(0)[0][1] & select.POLLERR
        assert made["c"].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED
        server = listening()
        made["c"].settimeout(PATIENCE_S)
        with pytest.raises(ConnectionAbortedError):  # the end of the attempt that failed
            made["c"].connect(("127.0.0.1", 7000))
        made["c"].connect(("127.0.0.1", 7000))
        assert server.accept()

    transplant(setup, check)


def test_refused_without_kernel_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only kernel memory shows is refused where that can't be read, and passes unharmed."""
    monkeypatch.setenv(insight.SWITCH, "off")
    insight.forget()

    def unaccepted() -> Sockets:
        listener, client = listening(), tcp()
        client.connect(("127.0.0.1", 7000))
        client.send(b"early")
        return {"l": listener, "c": client}

    def reset() -> Sockets:
        made = connection()
        made["c"].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        made.pop("c").close()
        return made

    def closed() -> Sockets:
        made = connection()
        fill(made["c"], BLOB)
        made.pop("c").close()
        return made

    def hears_of_it(made: Sockets) -> None:
        with pytest.raises(ConnectionResetError):
            made["s"].recv(1)

    try:
        refused(unaccepted, "not accepted yet", lambda made: made["l"].accept()[0].recv(5) == b"early" or 1 / 0)
        refused(reset, "an error is pending", hears_of_it)
        refused(closed, "closed by the other end with data still under way")
        test_not_accepted_yet()
    finally:
        insight.forget()


def test_reset_and_known() -> None:
    def setup() -> Sockets:
        made = connection()
        made["c"].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        made.pop("c").close()
        with contextlib.suppress(ConnectionResetError):
            made["s"].recv(1)
        return made

    def check(made: Sockets) -> None:
        assert made["s"].recv(1) == b""
        with pytest.raises(BrokenPipeError):
            made["s"].send(b"x")

    transplant(setup, check)


def test_options() -> None:
    tcp_level, sol, ip = socket.IPPROTO_TCP, socket.SOL_SOCKET, socket.IPPROTO_IP
    options = [  # the last: IP_MTU_DISCOVER, IP_PMTUDISC_DO
        (sol, socket.SO_KEEPALIVE, 1), (tcp_level, socket.TCP_KEEPIDLE, 77), (tcp_level, socket.TCP_KEEPINTVL, 11),
        (tcp_level, socket.TCP_KEEPCNT, 3), (tcp_level, socket.TCP_NODELAY, 1), (sol, socket.SO_OOBINLINE, 1),
        (tcp_level, socket.TCP_USER_TIMEOUT, 4321), (ip, socket.IP_TOS, 0x10), (ip, socket.IP_TTL, 9),
        (sol, socket.SO_PRIORITY, 3), (sol, socket.SO_MARK, 42), (tcp_level, socket.TCP_CORK, 1),
        (sol, socket.SO_RCVLOWAT, 5), (tcp_level, socket.TCP_LINGER2, 17), (ip, 10, 2),
    ]  # fmt: skip

    def setup() -> Sockets:
        made = connection()
        for level, number, value in options:
            made["s"].setsockopt(level, number, value)
        made["s"].setsockopt(tcp_level, socket.TCP_CONGESTION, b"reno")
        made["c"].setsockopt(sol, socket.SO_SNDBUF, 50000)
        made["l"] = tcp(V6)
        made["l"].setsockopt(sol, socket.SO_REUSEADDR, 1)
        made["l"].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made["l"].bind(("::", 7000))
        made["l"].listen(9)
        made["l"].setsockopt(tcp_level, socket.TCP_DEFER_ACCEPT, 7)
        made["six"] = tcp(V6)
        made["six"].connect(("::1", 7000))
        made["six"].send(b"x")
        made["six s"] = made["l"].accept()[0]
        made["fresh"] = tcp()
        made["bound"] = tcp()
        made["bound"].bind(("127.0.0.1", 5555))
        return made

    def check(made: Sockets) -> None:
        for level, number, value in options:
            assert made["s"].getsockopt(level, number) == value, (level, number)
        assert made["s"].getsockopt(tcp_level, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"
        assert made["c"].getsockopt(sol, socket.SO_SNDBUF) == 100000
        for name in ("l", "six s"):
            assert made[name].getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1
            assert made[name].getsockopt(sol, socket.SO_REUSEADDR) == 1
        for name in ("c", "s", "six", "fresh", "bound"):
            assert made[name].getsockopt(sol, socket.SO_REUSEADDR) == 0, name
        assert made["l"].getsockopt(tcp_level, socket.TCP_DEFER_ACCEPT) == defer
        assert made["fresh"].getsockname() == ("0.0.0.0", 0) and made["bound"].getsockname()[1] == 5555

    defer = 7
    transplant(setup, check)


IP, IP6, TCP, SOL = socket.IPPROTO_IP, socket.IPPROTO_IPV6, socket.IPPROTO_TCP, socket.SOL_SOCKET
#: (level, number, value) of what a connection, and what a listener may have set; numbers of linux/{in,in6,tcp,socket}.h
EVERYWHERE = [
    (SOL, 29, 1), (SOL, 46, 50), (SOL, 60, 1), (SOL, 18, 5), (SOL, 36, 42), (SOL, 69, 1), (SOL, 74, 0),
    (IP, 10, 2), (IP, 21, 33), (IP, 1, 0x10), (IP, 2, 9), (IP, 11, 1), (IP, 15, 1), (IP, 49, 0), (SOL, 12, 5),
    (TCP, 7, 3), (TCP, 8, 17), (TCP, 18, 4321), (TCP, 25, 5000), (TCP, 1, 1), (TCP, 3, 1), (TCP, 4, 77), (TCP, 5, 11),
    (TCP, 6, 3), (TCP, 16, 1), (TCP, 36, 1), (TCP, 37, 200), (TCP, 44, 90_000), (TCP, 12, 0),
]  # fmt: skip
#: SO_TIMESTAMP, SO_BUSY_POLL, SO_ZEROCOPY, SO_RCVLOWAT, SO_MARK, SO_PREFER_BUSY_POLL, SO_TXREHASH;
#: IP_MTU_DISCOVER, IP_MINTTL, IP_TOS, IP_TTL, IP_RECVERR, IP_FREEBIND, IP_MULTICAST_ALL; SO_PRIORITY; TCP_SYNCNT,
#: TCP_LINGER2, TCP_USER_TIMEOUT, TCP_NOTSENT_LOWAT, TCP_NODELAY, TCP_CORK, TCP_KEEP*, TCP_THIN_LINEAR_TIMEOUTS,
#: TCP_INQ, TCP_TX_DELAY, TCP_RTO_MAX_MS, TCP_QUICKACK
LISTENING = [(TCP, 9, 7), (TCP, 23, 5), (TCP, 27, 1)]  # TCP_DEFER_ACCEPT, TCP_FASTOPEN, TCP_SAVE_SYN


def test_every_option() -> None:
    """Each on a connection, on a listener, and on a socket that is neither."""

    def setup() -> Sockets:
        made = connection() | {"l": listening(port=7001), "f": tcp()}
        for name in ("c", "l", "f"):
            for option in EVERYWHERE + (LISTENING if name == "l" else []):
                made[name].setsockopt(*option)
            made[name].setsockopt(SOL, 47, struct.pack("=Q", 1_000_000))  # SO_MAX_PACING_RATE
            made[name].setsockopt(TCP, socket.TCP_CONGESTION, b"reno")
        for name in ("l", "f"):
            made[name].setsockopt(TCP, socket.TCP_MAXSEG, 777)
        for name in ("c", "f"):
            made[name].setsockopt(TCP, socket.TCP_WINDOW_CLAMP, 30_000)
        return made

    def check(made: Sockets) -> None:
        for name in ("c", "l", "f"):
            for level, number, value in EVERYWHERE + (LISTENING if name == "l" else []):
                assert made[name].getsockopt(level, number) == value, (name, level, number)
            assert made[name].getsockopt(SOL, 47, 8) == struct.pack("=Q", 1_000_000)
            assert made[name].getsockopt(TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"
        assert [made[name].getsockopt(TCP, socket.TCP_MAXSEG) for name in "lf"] == [777, 777]
        assert [made[name].getsockopt(TCP, socket.TCP_WINDOW_CLAMP) for name in "cf"] == [30_000, 30_000]

    transplant(setup, check)


@pytest.mark.parametrize("who", ["client", "listener", "both"])
def test_segment_size(who: str) -> None:
    """A connection made with TCP_MAXSEG goes on with such segments, both ways."""

    def setup() -> Sockets:
        listener, client = listening(), tcp()
        if who != "client":
            listener.setsockopt(TCP, socket.TCP_MAXSEG, 700)
        if who != "listener":
            client.setsockopt(TCP, socket.TCP_MAXSEG, 900)
        client.connect(("127.0.0.1", 7000))
        server, _ = listener.accept()
        server.settimeout(PATIENCE_S)
        waiting = tcp()
        waiting.connect(("127.0.0.1", 7000))
        return {"c": client, "s": server, "l": listener, "w": waiting}

    def check(made: Sockets) -> None:
        sizes = [made[name].getsockopt(TCP, socket.TCP_MAXSEG) for name in "csw"]
        least = {"client": 900, "listener": 700, "both": 700}[who] - 12  # with time stamps
        assert sizes[:2] == [least, least]
        assert sizes[2] > 10_000 if who == "client" else sizes[2] == least

    transplant(setup, check)


def test_saved_syn() -> None:
    """TCP_SAVE_SYN: the packet that made a connection can still be looked at."""

    def setup() -> Sockets:
        listener, client = listening(), tcp()
        listener.setsockopt(TCP, 27, 1)
        client.connect(("127.0.0.1", 7000))
        return {"l": listener, "c": client, "s": listener.accept()[0]}

    def check(made: Sockets) -> None:
        syn = made["s"].getsockopt(TCP, 28, 200)
        assert syn[12:16] == syn[16:20] == bytes((127, 0, 0, 1)) and syn[20:22] == struct.pack(
            "!H", made["c"].getsockname()[1]
        )

    transplant(setup, check)


def test_steering_program() -> None:
    """A program that chooses among the listeners of an address (SO_ATTACH_REUSEPORT_CBPF)."""

    def setup() -> Sockets:
        made: Sockets = {}
        for number in range(3):
            made[str(number)] = sock = tcp()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(("127.0.0.1", 7000))
            sock.listen()
        code = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 2), 8)
        program = struct.pack("@HxxxxxxQ", 1, ctypes.addressof(code))
        made["0"].setsockopt(socket.SOL_SOCKET, 51, program)
        clients = [tcp() for _ in range(3)]
        for client in clients:
            client.connect(("127.0.0.1", 7000))
            client.send(b"x")
        return made | {f"c{number}": client for number, client in enumerate(clients)}

    def check(made: Sockets) -> None:
        for _ in range(20):
            tcp().connect(("127.0.0.1", 7000))
        assert [ksock.tcp_info(made[str(number)])[1] for number in range(3)] == [0, 0, 23]

    transplant(setup, check)


@pytest.mark.parametrize("family,host", [(V4, "127.0.0.1"), (V6, "::")])
def test_multipath_listener(family: int, host: str) -> None:
    """As Go makes them: plain clients get plain connections, also those not accepted yet."""

    def setup() -> Sockets:
        made = {
            "l": socket.socket(family, socket.SOCK_STREAM, 262),
            "f": socket.socket(family, socket.SOCK_STREAM, 262),
        }
        made["l"].bind((host, 7000))
        made["l"].listen(5)
        for name in ("c", "w"):
            made[name] = tcp()
            made[name].connect(("127.0.0.1", 7000))
            made[name].send(name.encode())
            if name == "c":
                made["s"], _ = made["l"].accept()
        return made

    def check(made: Sockets) -> None:
        protocols = [made[name].getsockopt(socket.SOL_SOCKET, 38) for name in "lfs"]  # SO_PROTOCOL
        assert protocols == [262, 262, socket.IPPROTO_TCP]
        late, _ = made["l"].accept()
        assert (made["s"].recv(5), late.recv(5)) == (b"c", b"w")
        multi = socket.socket(V4, socket.SOCK_STREAM, 262)
        multi.connect(("127.0.0.1", 7000))
        accepted, _ = made["l"].accept()
        assert accepted.getsockopt(socket.SOL_SOCKET, 38) == 262
        made["f"].connect(("::ffff:127.0.0.1" if family == V6 else "127.0.0.1", 7000))

    transplant(setup, check)


def test_refuses_a_multipath_connection() -> None:
    def setup() -> Sockets:
        listener, client = (socket.socket(V4, socket.SOCK_STREAM, 262) for _ in range(2))
        listener.bind(("127.0.0.1", 7000))
        listener.listen()
        client.connect(("127.0.0.1", 7000))
        return {"l": listener, "c": client, "s": listener.accept()[0]}

    refused(setup, "MPTCP")


def test_reuseport_group() -> None:
    def setup() -> Sockets:
        made: Sockets = {}
        for number in range(4):
            made[str(number)] = sock = tcp()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(("0.0.0.0", 7000))
            sock.listen()
        return made

    def check(made: Sockets) -> None:
        for _ in range(50):
            tcp().connect(("127.0.0.1", 7000))
        counts = [ksock.tcp_info(sock)[1] for sock in made.values()]
        assert sum(counts) == 50 and min(counts) > 0

    transplant(setup, check)


def test_connected_to_itself() -> None:
    def setup() -> Sockets:
        sock = tcp()
        sock.bind(("127.0.0.1", 5000))
        sock.connect(("127.0.0.1", 5000))
        sock.send(b"echo")
        return {"a": sock}

    def check(made: Sockets) -> None:
        made["a"].send(b"more")
        made["a"].shutdown(socket.SHUT_WR)
        assert read_all(made["a"]) == b"echomore"

    transplant(setup, check)


class Ledger:
    """How far each end of each connection is, in memory shared with the test: bytes written and read.

    `busy` is odd while a call and its entry don't fit together: then the entry is only a lower bound.
    """

    def __init__(self, names: list[str]) -> None:
        self.memory = mmap.mmap(-1, 4096)
        self.at = {name: number * 32 for number, name in enumerate(names)}

    def get(self, name: str) -> tuple[int, int, int, int]:
        return struct.unpack_from("4q", self.memory, self.at[name])

    def note(self, name: str, slot: int, value: int) -> None:
        struct.pack_into("q", self.memory, self.at[name] + slot * 8, value)


@pytest.mark.parametrize("seed", range(20))
def test_frozen_under_traffic(seed: int) -> None:
    """Both ends send numbered words as fast as they can; whenever they are stopped, the streams fit together."""
    ends = [f"{end}{number}" for number in range(3) for end in "cs"]
    ledger = Ledger(ends)

    def setup() -> Sockets:
        made: Sockets = {}
        for number in range(3):
            made |= {f"{end}{number}": sock for end, sock in connection(7000 + number).items()}
        return made

    def traffic(made: Sockets) -> None:
        dice = random.Random(seed)
        names = {sock: name for name, sock in made.items()}
        position = {(name, slot): 0 for name in ends for slot in (0, 2)}
        for sock in made.values():
            sock.setblocking(False)

        def move(name: str, slot: int, call: Callable[[], int]) -> None:
            ledger.note(name, slot + 1, 1)
            with contextlib.suppress(BlockingIOError):
                position[name, slot] += call()
            ledger.note(name, slot, position[name, slot])
            ledger.note(name, slot + 1, 0)

        while True:
            readable, writable, _ = select.select(list(names), list(names), [])
            for sock in writable:
                if dice.random() < 0.7:
                    first, size = position[names[sock], 0], dice.choice([1, 7, 4000, 40_000])
                    move(names[sock], 0, lambda s=sock, f=first, n=size: s.send(counted(f, n)))
            for sock in readable:
                if dice.random() < 0.5:
                    size = dice.choice([1, 4000, 100_000])
                    move(names[sock], 2, lambda s=sock, n=size: len(s.recv(n)))

    def counted(first: int, size: int) -> bytes:
        """Bytes `first` and on of the stream 0, 1, 2, ... of 32-bit words."""
        words = range(first // 4, (first + size) // 4 + 1)
        return struct.pack(f"<{len(words)}I", *words)[first % 4 :][:size]

    def check(made: Sockets) -> None:
        for sock in made.values():
            sock.shutdown(socket.SHUT_WR)
        for name, sock in made.items():
            other = ("s" if name[0] == "c" else "c") + name[1]
            _, _, read, reading = ledger.get(name)
            written, writing, _, _ = ledger.get(other)
            data = read_all(sock)
            if not reading and not writing:
                assert len(data) == written - read
            starts = range(read, read + 100_001) if reading else [read]
            assert any(data == counted(start, len(data)) for start in starts if start + len(data) >= written), name

    with frozen(setup, traffic=traffic, delay_s=0.03 + 0.02 * seed) as cell:
        restored(cell, check)
        queued = sum(len(state.incoming) for state in cell.states.values() if isinstance(state, TcpSocket))
        assert queued


def test_recovery_after_a_killed_checkpointer() -> None:
    def setup() -> Sockets:
        made = connection()
        made["c"].send(b"data")
        made["d"], made["e"] = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        made["e"].send(b"one")
        return made

    def check(made: Sockets) -> None:
        assert not ksock.in_repair(made["s"])
        assert made["d"].getsockopt(socket.SOL_SOCKET, ksock.SO_PEEK_OFF) == -1
        assert made["s"].recv(10) == b"data"
        made["s"].close()
        assert made["c"].recv(1) == b""

    with frozen(setup, check) as cell:
        pidfd = pidfd_open(cell.pid)
        left = (("s", socket.IPPROTO_TCP, ksock.TCP_REPAIR, 1), ("d", socket.SOL_SOCKET, ksock.SO_PEEK_OFF, 3))
        for name, level, number, value in left:
            with socket.socket(fileno=pidfd_getfd(pidfd, cell.names[name])) as sock:
                sock.setsockopt(level, number, value)
        os.close(pidfd)
        socket_objects.recover([cell.pid])
