"""Unix sockets come back as they were: pairs, names, queues, how far they are closed, who made them."""

from __future__ import annotations

import array
import errno
import json
import os
import random
import select
import socket
import struct

import pytest

from podtree.kernel.namespaces import Clone, clone_python, unshare
from podtree.objects import insight, sockets
from podtree.objects.context import RestoreContext
from socketcell import HOME, PATIENCE_S, Sockets, child, frozen, join, refused, restored, transplant

STREAM, DGRAM, SEQPACKET = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET


def unix(kind: int = STREAM) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.settimeout(PATIENCE_S)
    return sock


def pair(kind: int = STREAM) -> Sockets:
    a, b = socket.socketpair(socket.AF_UNIX, kind)
    a.settimeout(PATIENCE_S)
    b.settimeout(PATIENCE_S)
    return {"a": a, "b": b}


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while chunk := sock.recv(1 << 16):
        data += chunk
    return data


def test_stream_pair_with_bytes_both_ways() -> None:
    def setup() -> Sockets:
        made = pair()
        made["a"].sendall(b"to b " * 1000)
        made["b"].sendall(b"to a")
        return made

    def check(made: Sockets) -> None:
        made["a"].sendall(b"more")
        assert made["a"].recv(100) == b"to a"
        made["a"].shutdown(socket.SHUT_WR)
        assert read_all(made["b"]) == b"to b " * 1000 + b"more"
        made["b"].close()
        assert made["a"].recv(1) == b""

    transplant(setup, check)


@pytest.mark.parametrize("kind", [DGRAM, SEQPACKET])
def test_message_bounds(kind: int) -> None:
    messages = [b"one", b"", b"x" * 20000, b"two", b"", b"three"]

    def setup() -> Sockets:
        made = pair(kind)
        for message in messages:
            made["a"].send(message)
        return made

    def check(made: Sockets) -> None:
        made["a"].send(b"last")
        assert [made["b"].recv(100000) for _ in range(7)] == [*messages, b"last"]
        made["b"].send(b"back")
        assert made["a"].recv(10) == b"back"

    transplant(setup, check)


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])
@pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
def test_half_closed(kind: int, how: int) -> None:
    def setup() -> Sockets:
        made = pair(kind)
        made["a"].send(b"before")
        made["b"].send(b"answer")
        made["a"].shutdown(how)
        return made

    def check(made: Sockets) -> None:
        assert made["b"].recv(10) == b"before"
        assert made["a"].recv(10) == b"answer"
        if how != socket.SHUT_RD:
            assert made["b"].recv(10) == b""
            with pytest.raises(BrokenPipeError):
                made["a"].send(b"x")
        if how != socket.SHUT_WR:
            assert made["a"].recv(10) == b""
            with pytest.raises(BrokenPipeError):
                made["b"].send(b"x")
        if how == socket.SHUT_RD:
            made["a"].send(b"still")
            assert made["b"].recv(10) == b"still"

    transplant(setup, check)


@pytest.mark.parametrize("unread", [False, True])
def test_other_end_gone(unread: bool) -> None:
    def setup() -> Sockets:
        made = pair()
        made["b"].sendall(b"last words")
        if unread:
            made["a"].sendall(b"never read")
        made.pop("b").close()
        return made

    def check(made: Sockets) -> None:
        poll = select.poll()
        poll.register(made["a"], select.POLLIN)
        events = poll.poll(0)[0][1]
        assert bool(events & select.POLLERR) == unread and events & select.POLLHUP
        assert made["a"].recv(100) == b"last words"
        if unread:
            with pytest.raises(ConnectionResetError):
                made["a"].recv(1)
        assert made["a"].recv(1) == b""
        with pytest.raises(BrokenPipeError):
            made["a"].send(b"x")

    transplant(setup, check)


@pytest.mark.parametrize("name", ["\0abstract", "server.sock", str(HOME / "sub/server.sock"), "sub/../rel.sock"])
@pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
def test_listener_and_connections(name: str, kind: int) -> None:
    def prepare() -> None:
        (HOME / "sub").mkdir()
        if not name.startswith("\0"):  # as the volume has it
            sock = unix(kind)
            sock.bind(name)
            os.utime(name, ns=(1_000_000_000, 2_000_000_000))
        os.utime(HOME, ns=(3, 4))

    def setup() -> Sockets:
        (HOME / "sub").mkdir()
        listener = unix(kind)
        listener.bind(name)
        listener.listen(3)
        if not name.startswith("\0"):
            os.chmod(name, 0o640)
            os.chown(name, 7, 8)
            os.utime(name, ns=(1_000_000_000, 2_000_000_000))
        client = unix(kind)
        client.connect(name)
        server, _ = listener.accept()
        named = unix(kind)
        named.bind("\0named client")
        named.connect(name)
        server2, _ = listener.accept()
        client.send(b"request")
        waiting = unix(kind)
        waiting.connect(name)
        os.utime(HOME, ns=(3, 4))
        return {"l": listener, "c": client, "s": server, "n": named, "s2": server2, "w": waiting}

    def check(made: Sockets) -> None:
        if not name.startswith("\0"):
            info = os.stat(name)
            assert (info.st_mode & 0o7777, info.st_uid, info.st_gid) == (0o640, 7, 8)
            assert info.st_mtime_ns == 2_000_000_000  # connecting touches the other time
            assert os.stat(HOME).st_mtime_ns == 4
        shown = name.encode() if name.startswith("\0") else name
        assert made["l"].getsockname() == made["s"].getsockname() == made["s2"].getsockname() == shown
        assert made["c"].getpeername() == made["w"].getpeername() == shown
        assert made["c"].getsockname() == "" and made["s2"].getpeername() == b"\0named client"
        assert made["s"].recv(10) == b"request"
        made["s"].send(b"response")
        assert made["c"].recv(10) == b"response"
        made["w"].send(b"hello")
        late, _ = made["l"].accept()
        late.settimeout(PATIENCE_S)
        assert late.recv(10) == b"hello"
        fresh = unix(kind)
        fresh.connect(name)
        assert made["l"].accept()
        made["s2"].close()
        assert made["n"].recv(1) == b""

    transplant(setup, check, prepare)


def test_unlinked_and_moved_names() -> None:
    def setup() -> Sockets:
        moved, unlinked = unix(), unix()
        moved.bind("old")
        moved.listen()
        os.rename("old", "new")
        unlinked.bind("gone")
        unlinked.listen()
        client = unix()
        client.connect("gone")
        os.unlink("gone")
        return {"moved": moved, "unlinked": unlinked, "client": client}

    def check(made: Sockets) -> None:
        assert made["moved"].getsockname() == "old" and made["unlinked"].getsockname() == "gone"
        assert os.path.exists("new") and not os.path.exists("old") and not os.path.exists("gone")
        client = unix()
        client.connect("new")
        assert made["moved"].accept()
        made["client"].send(b"x")
        server, _ = made["unlinked"].accept()
        assert server.recv(1) == b"x"

    transplant(setup, check)


def test_datagrams_from_all_over() -> None:
    def setup() -> Sockets:
        target, named, abstract, gone, nobody = (unix(DGRAM) for _ in range(5))
        target.bind("target")
        named.bind("named")
        abstract.bind("\0sender")
        gone.bind("gone")
        for number, sock in enumerate([named, gone, nobody, abstract, target, named]):
            sock.sendto(f"message {number}".encode(), "target")
        gone.close()
        os.unlink("gone")
        named.connect("target")
        abstract.connect("target")
        target.connect("named")  # from now on only `named` may send
        return {"target": target, "named": named, "abstract": abstract}

    def check(made: Sockets) -> None:
        assert made["named"].send(b"seventh") == 7
        with pytest.raises(PermissionError):
            made["abstract"].send(b"x")
        got = [made["target"].recvfrom(100) for _ in range(7)]
        assert [data for data, _ in got] == [f"message {n}".encode() for n in range(6)] + [b"seventh"]
        assert [sender or "" for _, sender in got] == [
            "named", "gone", "", b"\0sender", "target", "named", "named"]  # fmt: skip
        assert made["target"].getpeername() == "named" and made["named"].getpeername() == "target"
        made["target"].send(b"back")
        assert made["named"].recv(10) == b"back"

    transplant(setup, check)


def test_datagram_ends_gone() -> None:
    def setup() -> Sockets:
        a, b = socket.socketpair(socket.AF_UNIX, DGRAM)
        b.send(b"bye")
        b.close()
        server, client = unix(DGRAM), unix(DGRAM)
        server.bind("\0gone")
        client.connect("\0gone")
        server.close()
        return {"a": a, "client": client}

    def check(made: Sockets) -> None:
        assert made["a"].recv(10) == b"bye"
        assert made["client"].getpeername() == b"\0gone"
        for sock in made.values():
            with pytest.raises(ConnectionRefusedError):
                sock.send(b"x")
            with pytest.raises(OSError) as error:
                sock.send(b"x")
            assert error.value.errno == errno.ENOTCONN

    transplant(setup, check)


def test_credentials() -> None:
    """SO_PEERCRED and the credentials in queued messages: the users; pids need a pid namespace."""

    def creds(sock: socket.socket) -> tuple[int, int]:
        return struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1:]

    def setup() -> Sockets:
        made = pair(DGRAM)
        made["b"].setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        made["a"].send(b"as root")
        os.setresgid(50, 50, 0)
        os.setresuid(60, 60, 0)
        listener = unix()
        listener.bind("\0l")
        listener.listen()
        made["a"].send(b"as 60")
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        client = unix()
        client.connect("\0l")
        server, _ = listener.accept()
        return made | {"l": listener, "c": client, "s": server}

    def check(made: Sockets) -> None:
        assert creds(made["a"]) == creds(made["b"]) == (0, 0)
        assert creds(made["c"]) == creds(made["l"]) == (60, 50)
        assert creds(made["s"]) == (0, 0)
        for data, user in ((b"as root", 0), (b"as 60", 60)):
            got, control, _, _ = made["b"].recvmsg(100, 100)
            assert got == data and struct.unpack("iII", control[0][2])[1] == user

    transplant(setup, check)


def test_pids_of_who_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pid namespace that has its pid 1, also the pids are right: as the processes of the pod see them."""
    monkeypatch.setenv(insight.SWITCH, "off")  # it knows better than that the cell's process is number 77
    insight.forget()

    def setup() -> Sockets:
        made = pair(DGRAM)
        made["b"].setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        made["a"].send(b"hello")
        return made

    def seen(made: Sockets) -> tuple[int, int]:
        peer, _, _ = struct.unpack("iII", made["a"].getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        _, control, _, _ = made["b"].recvmsg(100, 100)
        return peer, struct.unpack("iII", control[0][2])[0]

    def in_a_pid_namespace() -> None:
        """The builder's way: pid 1 exists, and waits, before the sockets are made; it shares the descriptors."""
        unshare(Clone.NEWPID)
        told, tell = os.pipe()
        pid = clone_python(Clone.FILES)
        if pid == 0:
            os.read(told, 1)
            numbers = json.loads(os.read(told, 1000))
            made = {name: socket.socket(fileno=fd) for name, fd in numbers.items()}
            os._exit(0 if seen(made) == (77, 77) else 1)
        fds = sockets.restore_sockets(states, RestoreContext(-1, -1, -1, -1), lambda number: number)
        os.write(tell, b"g" + json.dumps({name: fds[number] for name, number in cell.names.items()}).encode())
        join(pid, "pid 1")

    with frozen(setup, pod_pid=77) as cell:
        states = cell.states
        join(child(in_a_pid_namespace), "the builder")


def test_options() -> None:
    def setup() -> Sockets:
        made = pair()
        made["a"].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 50000)
        made["a"].setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 3, 250000))
        made["b"].setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        made["b"].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 9))
        return made

    def check(made: Sockets) -> None:
        assert made["a"].getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 100000
        assert made["b"].getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) != 100000
        assert made["b"].getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == 1
        assert made["b"].getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == struct.pack("ii", 1, 9)

    cell = transplant(setup, check)
    assert cell.named("a").options["SO_RCVTIMEO"] == struct.pack("ll", 3, 252000)  # in ticks of 4 ms


def test_bound_and_idle() -> None:
    def setup() -> Sockets:
        bound, fresh = unix(), unix(DGRAM)
        bound.bind("bound")
        fresh.shutdown(socket.SHUT_RD)
        return {"bound": bound, "fresh": fresh}

    def check(made: Sockets) -> None:
        made["bound"].listen()
        unix().connect("bound")
        made["fresh"].settimeout(None)
        assert made["bound"].accept() and made["fresh"].recv(1) == b""

    transplant(setup, check)


def test_refuses_descriptors_under_way_without_kernel_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stream: peeking doesn't tell at which byte they are."""
    monkeypatch.setenv(insight.SWITCH, "off")
    insight.forget()

    def setup() -> Sockets:
        made = pair()
        made["a"].sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [made["a"].fileno()]))])
        return made

    def check(made: Sockets) -> None:
        _, control, _, _ = made["b"].recvmsg(10, 100)
        os.close(struct.unpack("i", control[0][2])[0])

    try:
        refused(setup, "SCM_RIGHTS", check)
    finally:
        insight.forget()


def test_refuses_messages_with_pidfds() -> None:
    def setup() -> Sockets:
        made = pair(DGRAM)
        made["b"].setsockopt(socket.SOL_SOCKET, 76, 1)  # SO_PASSPIDFD
        made["a"].send(b"x")
        return made

    def check(made: Sockets) -> None:
        _, control, _, _ = made["b"].recvmsg(10, 100)
        assert (control[0][0], control[0][1]) == (socket.SOL_SOCKET, 4)  # SCM_PIDFD

    refused(setup, "SO_PASSPIDFD", check)


@pytest.mark.parametrize("kind", [SEQPACKET, DGRAM])
def test_empty_messages(kind: int) -> None:
    """Messages without a byte, looked at more than once, in front of others and behind, with who sent them."""

    def setup() -> Sockets:
        made = pair(kind)
        made["b"].setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        for text in (b"", b"one", b"", b"", b"two", b""):
            made["a"].send(text)
        return made

    def check(made: Sockets) -> None:
        got = [made["b"].recvmsg(10, 100) for _ in range(6)]
        assert [data for data, *_ in got] == [b"", b"one", b"", b"", b"two", b""]
        assert {struct.unpack("iII", control[0][2])[1] for _, control, *_ in got} == {0}

    with frozen(setup, check) as cell:
        cell.collect()
        restored(cell, check)


@pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
def test_data_before_accept(kind: int) -> None:
    """Connections come out of accept(2) in their order, with what was sent, also by clients that have gone since."""
    large = random.Random(3).randbytes(150_000)
    plans = [("0", [b"one", b"two"], "here"), ("1", [], "gone"), ("2", [large, b"x"], "gone"), ("3", [], "shut"),
             ("4", [b"last"], "shut"), ("5", [], "here"), ("6", [large], "here")]  # fmt: skip

    def creds(sock: socket.socket) -> tuple[int, int]:
        return struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1:]

    def setup() -> Sockets:
        listener = unix(kind)
        listener.bind("listener")
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        listener.listen(len(plans))
        made = {"l": listener}
        for name, messages, how in plans:
            client = unix(kind)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            if name != "5":
                client.bind(f"client {name}")
            os.setresgid(0, 50 + int(name), 0)
            client.connect("listener")
            os.setresgid(0, 0, 0)
            for message in messages:
                client.send(message)
            if how == "shut":
                client.shutdown(socket.SHUT_WR)
            if how == "gone":
                client.close()
            else:
                made[name] = client
        return made

    def check(made: Sockets) -> None:
        for name, messages, how in plans:
            server, address = made["l"].accept()
            server.settimeout(PATIENCE_S)
            assert address == ("" if name == "5" else f"client {name}")
            assert creds(server) == (0, 50 + int(name))
            assert server.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == 1
            if how == "here":
                made[name].send(b"more")
                made[name].shutdown(socket.SHUT_WR)
                messages = [*messages, b"more"]
            if kind == STREAM:
                assert read_all(server) == b"".join(messages)
            else:
                assert [server.recv(1 << 18) for _ in messages] == messages
                assert server.recv(1) == b""
            if how != "gone":
                server.send(b"answer")
                assert made[name].recv(10) == b"answer"

    transplant(setup, check)


def test_refused_without_kernel_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was sent on a connection not accepted yet is refused where nobody can look at it."""
    monkeypatch.setenv(insight.SWITCH, "off")
    insight.forget()

    def setup() -> Sockets:
        listener, client = unix(), unix()
        listener.bind("\0l")
        listener.listen()
        client.connect("\0l")
        client.send(b"early")
        return {"l": listener, "c": client}

    try:
        refused(setup, "not accepted yet", lambda made: made["l"].accept()[0].recv(5) == b"early" or 1 / 0)
        test_listener_and_connections("\0abstract", STREAM)
    finally:
        insight.forget()


def test_refuses_a_peer_outside() -> None:
    def setup() -> Sockets:
        made = pair()
        globals()["kept"] = made.pop("b")
        return made

    refused(setup, "not held by any process of the pod")


@pytest.mark.parametrize("seed", range(25))
def test_random_histories(seed: int) -> None:
    """Sends, closes and shutdowns at random; every byte and every end arrives exactly once."""
    dice = random.Random(seed)
    kinds = [dice.choice([STREAM, SEQPACKET]) for _ in range(6)]
    expected: dict[str, bytes] = {}
    closed: set[str] = set()
    steps = [(dice.randrange(6), dice.choice("ab"), dice.choice(["send"] * 8 + ["shut", "close"]), dice.randbytes(
        dice.choice([1, 100, 5000]))) for _ in range(80)]  # fmt: skip
    for number, end, action, data in steps:
        me, other = f"{number}{end}", f"{number}{'b' if end == 'a' else 'a'}"
        if action == "send" and me not in closed and other + "x" not in closed:
            expected[other] = expected.get(other, b"") + data
        elif action == "shut":
            closed.add(me)
        elif action == "close" and other + "x" not in closed and not expected.get(me):
            closed |= {me, me + "x"}

    def setup() -> Sockets:
        made: Sockets = {}
        for number, kind in enumerate(kinds):
            made[f"{number}a"], made[f"{number}b"] = socket.socketpair(socket.AF_UNIX, kind)
        shut: set[str] = set()
        for number, end, action, data in steps:
            me, other = f"{number}{end}", f"{number}{'b' if end == 'a' else 'a'}"
            if action == "send" and me in made and me not in shut and other in made:
                made[me].send(data)
            elif action == "shut" and me in made:
                shut.add(me)
                made[me].shutdown(socket.SHUT_WR)
            elif action == "close" and me in made and other in made and not got(made[me]):
                made.pop(me).close()
        return made

    def got(sock: socket.socket) -> bool:
        return bool(select.select([sock], [], [], 0)[0]) and bool(
            sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))  # fmt: skip

    def check(made: Sockets) -> None:
        for sock in made.values():
            try:
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass
        for name, sock in made.items():
            assert read_all(sock) == expected.get(name, b""), name

    transplant(setup, check)
