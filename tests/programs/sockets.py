"""Unix, TCP and UDP sockets: pairs, listening, connected, half-closed, with data in flight both ways."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from pathlib import Path

from inpod import bad, case, child, equal, frozen, main, reap, true, wait_go

IP_RECVTTL, TCP_MAXSEG, TCP_CORK, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT = 12, 2, 3, 4, 5, 6
TCP_DEFER_ACCEPT, TCP_USER_TIMEOUT, TCP_QUICKACK = 9, 18, 12


def pattern(size: int, seed: int) -> bytes:
    """`size` bytes that don't repeat soon and differ by `seed`."""
    block = b"".join(struct.pack("<QQ", seed, number) for number in range(256))
    return (block * (size // len(block) + 1))[:size]


def receive(end: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes, or what came before the end."""
    parts: list[bytes] = []
    while size > 0 and (data := end.recv(min(size, 1 << 16))):
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


def fill(end: socket.socket, data: bytes) -> int:
    """Sends as much as goes without waiting."""
    end.setblocking(False)
    sent = 0
    try:
        while sent < len(data):
            sent += end.send(data[sent : sent + 65536])
    except BlockingIOError:
        pass
    end.setblocking(True)
    return sent


def tcp_pair(family: int = socket.AF_INET) -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection over loopback."""
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with socket.create_server((host, 0), family=family) as server:
        one = socket.create_connection(server.getsockname()[:2])
        other, _ = server.accept()
    return one, other


def names(*ends: socket.socket) -> list[object]:
    """Local and remote addresses."""
    return [(end.getsockname(), end.getpeername()) for end in ends]


@case
def unix_pairs() -> None:
    """socketpair of the three types, with bytes and messages both ways, one nearly full."""
    stream = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    datagram = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    packet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    full = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    stream[0].sendall(b"left to right")
    stream[1].sendall(b"right to left")
    for text in (b"one", b"two", b"three"):
        datagram[0].send(text)
        packet[1].send(text)
    filled = fill(full[0], pattern(1 << 22, 1))
    frozen()
    equal("stream", (stream[1].recv(100), stream[0].recv(100)), (b"left to right", b"right to left"))
    equal("datagrams", [datagram[1].recv(100) for _ in range(3)], [b"one", b"two", b"three"])
    equal("packets", [packet[0].recv(100) for _ in range(3)], [b"one", b"two", b"three"])
    true(f"full: {filled} bytes", receive(full[1], filled) == pattern(filled, 1))
    full[0].sendall(b"more")
    equal("room again", full[1].recv(10), b"more")
    full[1].sendall(b"back")
    equal("and the other way", full[0].recv(10), b"back")


@case
def unix_half_closed() -> None:
    """Shut down for writing, shut down for reading, and a peer that has gone with bytes left behind."""
    half, deaf, left = (socket.socketpair() for _ in range(3))
    half[0].sendall(b"last")
    half[0].shutdown(socket.SHUT_WR)
    deaf[0].shutdown(socket.SHUT_RD)
    left[0].sendall(b"testament")
    left[0].close()
    frozen()
    equal("shut for writing", (half[1].recv(10), half[1].recv(10)), (b"last", b""))
    half[1].sendall(b"answer")
    equal("still hears", half[0].recv(10), b"answer")
    for name, end in (("half[0]", half[0]), ("deaf[1]", deaf[1]), ("left[1]", left[1])):
        try:
            end.send(b"x", socket.MSG_NOSIGNAL)
            bad(f"{name} could still send")
        except BrokenPipeError:
            pass
    equal("left behind", (left[1].recv(20), left[1].recv(20)), (b"testament", b""))


@case
def unix_named() -> None:
    """Servers with names in the file system and abstract; connections accepted and waiting; peers' names."""
    abstract_name = f"\0an abstract name {os.getpid()}"
    server = socket.socket(socket.AF_UNIX)
    server.bind("server.sock")
    server.listen(10)
    abstract = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    abstract.bind(abstract_name)
    abstract.listen(5)
    client = socket.socket(socket.AF_UNIX)
    client.connect("server.sock")
    accepted, _ = server.accept()
    client.sendall(b"question")
    waiting = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for one in waiting:
        one.connect("server.sock")
    packets = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    packets.connect(abstract_name)
    before = names(client, accepted, packets)
    frozen()
    equal("names", names(client, accepted, packets), before)
    equal("accepted", accepted.recv(20), b"question")
    accepted.sendall(b"answer")
    equal("client", client.recv(20), b"answer")
    for number, one in enumerate(waiting):
        late, _ = server.accept()
        one.sendall(b"in the queue %d" % number)
        equal("waiting", late.recv(20), b"in the queue %d" % number)
        late.sendall(b"welcome")
        equal("welcome", one.recv(10), b"welcome")
    late, _ = abstract.accept()
    packets.send(b"packet")
    equal("abstract", late.recv(10), b"packet")
    fresh = socket.socket(socket.AF_UNIX)
    fresh.connect("server.sock")
    late, _ = server.accept()
    fresh.sendall(b"new")
    equal("a new client", late.recv(10), b"new")


@case
def unix_datagrams() -> None:
    """Datagram sockets with names, connected and not, with queued messages that know their senders."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    server.bind("server")
    named = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    named.bind("client")
    named.connect("server")
    nameless = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    named.send(b"from a name")
    nameless.sendto(b"from nobody", "server")
    frozen()
    equal("first", server.recvfrom(100), (b"from a name", "client"))
    text, address = server.recvfrom(100)
    equal("second", (text, address or None), (b"from nobody", None))
    server.sendto(b"to the name", "client")
    equal("reply", named.recv(100), b"to the name")
    named.send(b"again")
    equal("connected still", server.recvfrom(100), (b"again", "client"))


@case
def unix_unlinked_name() -> None:
    """A listening socket whose name was removed keeps its connections, and its address."""
    server = socket.socket(socket.AF_UNIX)
    server.bind("name")
    server.listen(5)
    client = socket.socket(socket.AF_UNIX)
    client.connect("name")
    accepted, _ = server.accept()
    os.unlink("name")
    frozen()
    equal("addresses", (server.getsockname(), client.getpeername()), ("name", "name"))
    client.sendall(b"x")
    equal("connection", accepted.recv(5), b"x")
    equal("name is not there", os.path.exists("name"), False)


@case
def unix_options() -> None:
    """Buffer sizes, timeouts, credentials passing, peer credentials, nonblocking, owner's close-on-exec."""
    one, other = socket.socketpair()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 50000)
    other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 70000)
    other.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("qq", 3, 500000))
    one.setblocking(False)

    def facts() -> list[object]:
        return [
            one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF),
            other.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF),
            other.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED),
            one.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16),
            struct.unpack("3i", one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)),
            os.get_blocking(one.fileno()),
        ]

    before = facts()
    frozen()
    for name, got, wanted in zip(
        ("SNDBUF", "RCVBUF", "PASSCRED", "RCVTIMEO", "PEERCRED", "blocking"), facts(), before, strict=True
    ):
        equal(name, got, wanted)


def rights(*fds: int) -> list[tuple[int, int, bytes]]:
    """Descriptors to send along."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]


def received(end: socket.socket, size: int = 100) -> tuple[bytes, list[int]]:
    """A message, and the descriptors sent along."""
    data, control, _, _ = end.recvmsg(size, 1000)
    return data, [fd for _, kind, raw in control if kind == socket.SCM_RIGHTS for (fd,) in struct.iter_unpack("i", raw)]


def passed(kind: int) -> None:
    """Descriptors of all sorts on their way: held by nobody else, the receiver itself, sockets that hold more."""
    near, far = socket.socketpair(socket.AF_UNIX, kind)
    one, other = socket.socketpair()
    spare, lost = socket.socketpair()
    outer, inner = socket.socketpair(socket.AF_UNIX, kind)
    reading, writing = os.pipe()
    file = os.open("passed", os.O_RDWR | os.O_CREAT)
    os.write(file, b"0123456789")
    os.lseek(file, 4, os.SEEK_SET)
    server = socket.create_server(("127.0.0.1", 0))
    address = server.getsockname()
    epoll = select.epoll()
    epoll.register(reading, select.EPOLLIN)
    os.write(writing, b"in the pipe")
    spare.sendall(b"for the lost one")
    outer.sendmsg([b"nested"], rights(lost.fileno(), far.fileno()))
    near.send(b"before")
    near.sendmsg([b"two"], rights(other.fileno(), other.fileno()))
    near.send(b"between")
    near.sendmsg([b"all sorts"], rights(reading, file, server.fileno(), epoll.fileno()))
    near.sendmsg([b"itself"], rights(far.fileno()))
    near.sendmsg([b"nest"], rights(inner.fileno()))
    near.send(b"after")
    for end in (other, lost, outer, inner, server):
        end.close()
    os.close(reading)
    os.unlink("passed")
    epoll.close()
    frozen()
    if kind == socket.SOCK_STREAM:
        equal("bytes before", (received(far, 4), received(far, 2)), ((b"befo", []), (b"re", [])))
    else:
        equal("message before", received(far), (b"before", []))
    text, fds = received(far)
    equal("two", (text, len(fds)), (b"two", 2))
    for fd in fds:
        os.write(fd, b"hello")
    equal("both", one.recv(100), b"hellohello")
    equal("between", received(far, 7)[0], b"between")
    text, fds = received(far)
    equal("all sorts", (text, len(fds)), (b"all sorts", 4))
    equal("pipe", os.read(fds[0], 100), b"in the pipe")
    equal("unlinked file", os.read(fds[1], 100), b"456789")
    with socket.socket(fileno=fds[2]) as again:
        equal("listener", again.getsockname(), address)
        socket.create_connection(address)
        true("accepts", again.accept())
    with select.epoll.fromfd(fds[3]) as watching:
        os.write(writing, b"x")
        true("epoll", watching.poll(10))
    text, (fd,) = received(far)
    equal("itself", text, b"itself")
    itself = socket.socket(fileno=fd)
    text, (fd,) = received(itself)
    equal("nest", (text, received(itself)), (b"nest", (b"after", [])))
    with socket.socket(fileno=fd) as nest:
        text, fds = received(nest)
    equal("nested", (text, len(fds)), (b"nested", 2))
    equal("the lost one", os.read(fds[0], 100), b"for the lost one")
    os.write(fds[0], b"back")
    equal("the lost one answers", spare.recv(10), b"back")
    near.send(b"last")
    equal("the innermost is the outermost", os.read(fds[1], 10), b"last")


@case
def unix_passed_in_stream() -> None:
    """See passed: in a stream, at the bytes where they were sent."""
    passed(socket.SOCK_STREAM)


@case
def unix_passed_in_datagrams() -> None:
    """See passed: in datagrams."""
    passed(socket.SOCK_DGRAM)


@case
def unix_passed_in_packets() -> None:
    """See passed: in packets."""
    passed(socket.SOCK_SEQPACKET)


@case
def unix_senders_gone() -> None:
    """Who sent what waits, and who is at the other end, also when they have ended: their pids in this pod."""
    near, far = socket.socketpair()
    packets = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for end in (far, packets[1]):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    server = socket.create_server("pids.sock", family=socket.AF_UNIX)

    def body() -> None:
        near.send(b"stream")
        packets[0].send(b"packet")
        socket.socket(socket.AF_UNIX).connect("pids.sock")

    pids = [child(body) for _ in range(2)]
    for pid in pids:
        reap(pid)
    accepted, _ = server.accept()
    frozen()
    late, _ = server.accept()
    peers = [
        struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0] for end in (accepted, late)
    ]
    equal("peers", sorted(peers), sorted(pids))
    for name, end, text in (("stream", far, b"stream"), ("packets", packets[1], b"packet")):
        got = [end.recvmsg(6, 100) for _ in pids]
        equal(name, [data for data, *_ in got], [text, text])
        equal(f"{name}: pids", sorted(struct.unpack("3i", control[0][2])[0] for _, control, *_ in got), sorted(pids))


@case
def unix_own_messages() -> None:
    """Messages of this process that it has not read yet: its pid in this pod, which may be 1."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ends[1].setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    ends[0].send(b"packet")
    frozen()
    data, control, *_ = ends[1].recvmsg(10, 100)
    equal("data", data, b"packet")
    equal("pid", struct.unpack("3i", control[0][2])[0], os.getpid())


@case
def unix_relatives() -> None:
    """Pairs whose ends are held by parent and child, with a child blocked in recv."""
    mine, theirs = socket.socketpair()

    def body() -> None:
        mine.close()
        equal("first", theirs.recv(100), b"wake up")
        theirs.sendall(b"awake")
        equal("end", theirs.recv(100), b"")

    pid = child(body)
    theirs.close()
    time.sleep(0.2)
    frozen()
    mine.sendall(b"wake up")
    equal("answer", mine.recv(100), b"awake")
    mine.close()
    reap(pid)


@case
def tcp_established() -> None:
    """Connections with unread bytes both ways, over IPv4 and IPv6, a duplicate in a child."""
    pairs = [tcp_pair(), tcp_pair(socket.AF_INET6)]
    for one, other in pairs:
        one.sendall(pattern(20000, 2))
        other.sendall(pattern(30000, 3))
    before = [names(*pair) for pair in pairs]

    def body() -> None:
        wait_go()
        pairs[0][0].sendall(b"from the child")

    pid = child(body)
    time.sleep(0.2)
    frozen()
    reap(pid)
    equal("addresses", [names(*pair) for pair in pairs], before)
    for one, other in pairs:
        true("one way", receive(other, 20000) == pattern(20000, 2))
        true("other way", receive(one, 30000) == pattern(30000, 3))
    equal("the child's", pairs[0][1].recv(100), b"from the child")
    for one, other in pairs:
        one.sendall(b"go on")
        equal("goes on", other.recv(10), b"go on")
        other.close()
        equal("end is seen", one.recv(10), b"")


@case
def tcp_full() -> None:
    """A connection whose buffers are full on both sides of both directions: megabytes not yet delivered."""
    one, other = tcp_pair()
    there, back = fill(one, pattern(1 << 24, 4)), fill(other, pattern(1 << 24, 5))
    true(f"set-up: {there}, {back}", there > 100000 and back > 100000)
    frozen()
    true("there", receive(other, there) == pattern(there, 4))
    true("back", receive(one, back) == pattern(back, 5))
    one.sendall(b"again")
    equal("again", other.recv(10), b"again")


@case
def tcp_half_closed() -> None:
    """FIN sent and unread, FIN sent with bytes before it, both ways shut by now, peer closed."""
    first, second, third = tcp_pair(), tcp_pair(), tcp_pair()
    first[0].sendall(b"last words")
    first[0].shutdown(socket.SHUT_WR)
    second[1].shutdown(socket.SHUT_WR)
    third[0].sendall(b"testament")
    third[0].close()
    time.sleep(0.2)
    frozen()
    equal("first", (first[1].recv(100), first[1].recv(100)), (b"last words", b""))
    first[1].sendall(b"still answering")
    equal("half-closed still hears", first[0].recv(100), b"still answering")
    equal("second", second[0].recv(10), b"")
    second[0].sendall(b"x" * 100000)
    true("second hears", receive(second[1], 100000) == b"x" * 100000)
    equal("third", (third[1].recv(100), third[1].recv(100)), (b"testament", b""))
    first[1].close()
    equal("end of first", first[0].recv(10), b"")


@case
def tcp_listening() -> None:
    """Listening sockets: options, backlog, connections waiting, new clients, a blocked accept."""
    server = socket.create_server(("127.0.0.1", 0), backlog=33)
    address = server.getsockname()
    waiting = [socket.create_connection(address) for _ in range(4)]
    both = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    reused = [socket.create_server(("127.0.0.1", 7007), reuse_port=True) for _ in range(2)]
    blocked = socket.create_server(("127.0.0.1", 0))

    def acceptor() -> None:
        connection, _ = blocked.accept()
        connection.sendall(b"accepted")

    pid = child(acceptor)
    time.sleep(0.2)
    frozen()
    equal("address", server.getsockname(), address)
    texts = set()
    for number, one in enumerate(waiting):
        one.sendall(b"waiting %d" % number)
    for _ in waiting:
        late, _ = server.accept()
        texts.add(late.recv(20))
        late.sendall(b"welcome")
    equal("waiting connections", texts, {b"waiting %d" % number for number in range(4)})
    equal("welcomes", [one.recv(10) for one in waiting], [b"welcome"] * 4)
    fresh = socket.create_connection(address)
    late, peer = server.accept()
    equal("a new client", peer, fresh.getsockname())
    dual = socket.create_connection(("127.0.0.1", both.getsockname()[1]))
    late, peer = both.accept()
    equal("dual stack", peer[1], dual.getsockname()[1])
    for one in reused:
        equal("reuse port", one.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT), 1)
    equal("the blocked accept", socket.create_connection(blocked.getsockname()).recv(20), b"accepted")
    reap(pid)


@case
def tcp_options() -> None:
    """Options of a connection: no delay, cork, keep-alive, buffer sizes, linger, user timeout, MSS."""
    one, other = tcp_pair()
    options = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.SOL_SOCKET, socket.SO_SNDBUF, 123456),
        (socket.SOL_SOCKET, socket.SO_RCVBUF, 234567),
        (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),
        (socket.SOL_SOCKET, socket.SO_PRIORITY, 3),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, TCP_KEEPIDLE, 77),
        (socket.IPPROTO_TCP, TCP_KEEPINTVL, 7),
        (socket.IPPROTO_TCP, TCP_KEEPCNT, 5),
        (socket.IPPROTO_TCP, TCP_USER_TIMEOUT, 5555),
        (socket.IPPROTO_IP, socket.IP_TOS, 16),
        (socket.IPPROTO_IP, socket.IP_TTL, 42),
    ]
    for level, name, value in options:
        one.setsockopt(level, name, value)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 9))

    def facts() -> list[object]:
        values: list[object] = [(level, name, one.getsockopt(level, name)) for level, name, _ in options]
        return [*values, one.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)]

    before = facts()
    frozen()
    for got, wanted in zip(facts(), before, strict=True):
        equal("option (level, name, value)", got, wanted)
    one.setsockopt(socket.IPPROTO_TCP, TCP_CORK, 0)
    one.sendall(b"fine")
    equal("data", other.recv(10), b"fine")


@case
def tcp_stream() -> None:
    """A client and a server streaming both ways through the checkpoint; every byte is checked."""
    server = socket.create_server(("127.0.0.1", 0))
    chunk = pattern(40000, 6)

    def echo() -> None:
        connection, _ = server.accept()
        while data := connection.recv(30000):
            connection.sendall(data)

    def client() -> None:
        connection = socket.create_connection(server.getsockname())
        sent = threading.Event()
        rounds = [0]

        def send() -> None:
            while not os.path.exists("go") or rounds[0] < 50:
                connection.sendall(chunk)
                rounds[0] += 1
            sent.set()
            connection.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        got = 0
        while data := connection.recv(65536):
            at = got % len(chunk)
            if data != (chunk[at:] + chunk + chunk)[: len(data)]:
                bad(f"differs at byte {got}")
                os._exit(1)
            got += len(data)
        sender.join()
        equal("all came back", got, rounds[0] * len(chunk))

    pids = [child(echo), child(client)]
    server.close()
    frozen()
    for pid in pids:
        reap(pid)


@case
def tcp_across_processes() -> None:
    """One end in each of two children, one of them blocked in recv, the other in select."""
    one, other = tcp_pair()

    def reader() -> None:
        one.close()
        equal("heard", receive(other, 5), b"hello")
        other.sendall(b"there")

    def selector() -> None:
        other.close()
        ready, _, _ = select.select([one], [], [])
        equal("ready", ready, [one])
        equal("heard", receive(one, 5), b"there")

    pids = [child(reader), child(selector)]
    other.close()
    time.sleep(0.2)
    frozen()
    one.sendall(b"hello")
    for pid in pids:
        reap(pid)


@case
def tcp_urgent_states() -> None:
    """Bound but not listening, not even bound, refused before, and a connection whose reset has been seen."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    fresh = socket.socket()
    address = bound.getsockname()
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = server.getsockname()
    refused_before = socket.socket()
    reset = tcp_pair()
    reset[1].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    reset[1].close()
    for end in (refused_before, reset[0]):
        try:
            end.connect(nobody) if end is refused_before else end.recv(1)
            bad("set-up: no error")
        except (ConnectionRefusedError, ConnectionResetError):
            pass
    frozen()
    equal("bound", bound.getsockname(), address)
    bound.listen()
    fresh.connect(address)
    late, _ = bound.accept()
    late.sendall(b"x")
    equal("works", fresh.recv(1), b"x")
    equal("the reset connection has ended", reset[0].recv(1), b"")
    refused_before.connect(address)
    late, _ = bound.accept()
    late.sendall(b"y")
    equal("works after the refusal", refused_before.recv(1), b"y")


@case
def udp() -> None:
    """UDP: bound, connected, queued datagrams with their senders, broadcast option, IPv6."""
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 0))
    server.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.connect(server.getsockname())
    six = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    six.bind(("::1", 0))
    for text in (b"first", pattern(9000, 7)):
        client.send(text)
    six.sendto(b"to myself", six.getsockname())
    before = server.getsockname(), names(client), six.getsockname()
    frozen()
    equal("addresses", (server.getsockname(), names(client), six.getsockname()), before)
    sender = client.getsockname()
    equal("first", server.recvfrom(10000), (b"first", sender))
    equal("large", server.recvfrom(10000), (pattern(9000, 7), sender))
    equal("six", six.recvfrom(100)[0], b"to myself")
    equal("broadcast", server.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST), 1)
    server.sendto(b"back", sender)
    equal("back", client.recv(10), b"back")


@case
def empty_datagrams() -> None:
    """Messages without a byte between others, in a socket pair and over UDP."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 0))
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.connect(server.getsockname())
    texts = [b"one", b"", b"three"]
    for text in texts:
        one.send(text)
        client.send(text)
    frozen()
    for name, end in (("pair", other), ("UDP", server)):
        end.settimeout(5)
        got: list[object] = []
        for _ in texts:
            try:
                got.append(end.recv(100))
            except TimeoutError:
                got.append("nothing")
        equal(name, got, texts)


@case
def data_before_accept() -> None:
    """Data sent on connections that nobody has accepted yet."""
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    client.sendall(b"early")
    frozen()
    late, _ = server.accept()
    equal("early", late.recv(10), b"early")


def churn(family: int, address: object) -> None:
    """A server slower than its clients, who connect, send, and wait for the answer, a connection for each question.

    At every instant most of them wait to be accepted, with their question sent.
    """
    server = socket.socket(family)
    server.bind(address)
    server.listen(30)
    address = server.getsockname()

    def serve() -> None:
        while True:
            connection, _ = server.accept()
            question = receive(connection, 1 << 20)
            if not question:
                return
            time.sleep(0.01)
            connection.sendall(question[::-1])
            connection.close()

    def ask(number: int) -> None:
        rounds = 0
        while not os.path.exists("go") or rounds < 3:
            rounds += 1
            question = pattern((number * 7919 + rounds) % 100_000 + 1, rounds)
            with socket.socket(family) as client:
                client.connect(address)
                client.sendall(question)
                client.shutdown(socket.SHUT_WR)
                answer = receive(client, len(question) + 1)
            if answer != question[::-1]:
                bad(f"client {number}, round {rounds}: {len(answer)} bytes instead of {len(question)}")
                return

    def clients() -> None:
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    pids = [child(serve), child(clients), child(clients)]
    frozen()
    for pid in pids[1:]:
        reap(pid)
    with socket.socket(family) as last:
        last.connect(address)
        last.shutdown(socket.SHUT_WR)
        reap(pids[0])


@case
def tcp_churn() -> None:
    """See churn: over TCP."""
    churn(socket.AF_INET, ("127.0.0.1", 0))


@case
def unix_churn() -> None:
    """See churn: over a unix socket."""
    churn(socket.AF_UNIX, "churn.sock")


@case
def pending_error() -> None:
    """A reset that the program has not been told of yet."""
    one, other = tcp_pair()
    other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    other.close()
    frozen()
    try:
        one.recv(1)
        bad("the reset connection gave no error")
    except ConnectionResetError:
        pass


@case
def fresh_ports() -> None:
    """Ports that were taken are still taken, by us and nobody else."""
    server = socket.create_server(("127.0.0.1", 7011))
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind(("127.0.0.1", 7012))
    frozen()
    for kind, port in ((socket.SOCK_STREAM, 7011), (socket.SOCK_DGRAM, 7012)):
        other = socket.socket(socket.AF_INET, kind)
        try:
            other.bind(("127.0.0.1", port))
            bad(f"port {port} could be taken again")
        except OSError as error:
            equal("errno", error.errno, 98)
    datagrams.close()
    server.close()


@case
def names_on_the_volume() -> None:
    """A socket file's mode and owner stay, and the file is the socket: a stat by name finds its inode."""
    server = socket.socket(socket.AF_UNIX)
    server.bind("sock")
    os.chmod("sock", 0o622)
    os.chown("sock", 33, 44)
    server.listen()
    frozen()
    found = Path("sock").stat()
    equal("mode and owner", (found.st_mode & 0o7777, found.st_uid, found.st_gid), (0o622, 33, 44))
    client = socket.socket(socket.AF_UNIX)
    client.connect("sock")


if __name__ == "__main__":
    main()
