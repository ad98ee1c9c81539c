"""Bringing unix sockets back: podtree.objects.unix holds the states and how they are collected.

The order follows from what the kernel allows (net/unix/af_unix.c, Linux 6.18):

1. stream and SOCK_SEQPACKET connections, through socketpair(2) or a passing listener of the right name,
   filled by sending, then shut down or left by an end that is gone;
2. listeners, and the clients that wait to be accepted; idle sockets;
3. datagram sockets: all named ones are bound; then queues are filled, since a connected socket takes
   messages only from its peer; then they are connected, in an order in which nobody is refused for the same
   reason;
4. of the first, those with descriptors in their queues: these may be any of the others, or themselves;
5. the files of bound sockets move to their places, all at once; options and owners.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from podtree.errors import Damaged, RestoreFailed
from podtree.kernel import mount
from podtree.objects import unixoutside
from podtree.objects.held import path_bytes
from podtree.objects.impersonate import Credentials, pids_available, run_as
from podtree.objects.socketcommon import finish
from podtree.objects.sockopts import set_option
from podtree.objects.unix import SocketFile, UnixMessage, UnixSocket, UnixWaiting

BATCH = 1000  # connections through one passing listener; net.core.somaxconn is 4096
ROOM = 1 << 28  # SO_SNDBUF while queues are filled


def restore(states: dict[int, UnixSocket], file: Callable[[int], int]) -> dict[int, socket.socket]:
    """All unix sockets of a pod by file id; the caller is in the pod's net and mount namespaces, / its root.

    `file` gives the descriptor of any other open file by its id.
    """
    if not states:
        return {}
    restorer = _Restorer(states, file)
    try:
        return restorer.run()
    except OSError as error:
        raise RestoreFailed(f"unix sockets: {error}") from error
    finally:
        restorer.close()


class Place(NamedTuple):
    """Where a bound socket can be reached: by the name in a directory, or (no directory) an abstract name."""

    directory: int | None
    name: bytes


class _Kept(NamedTuple):
    file: SocketFile
    place: Place
    parent: int


class Names:
    """Gives sockets their names without regard to where their files are now.

    bind(2) resolves the name when it is called and getsockname(2) shows it ever after, while the file may be
    renamed or unlinked. So each socket is bound in an empty directory that is its root for the moment, and its
    file, if it still has one, is moved to where it was: absolute and relative names, moved and unlinked files
    come out of the same few lines, and nobody can meet a half-made socket.
    """

    def __init__(self) -> None:
        self._root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._home = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._fds = [self._root, self._home]
        self._nowhere: int | None = None  # a tmpfs that is attached nowhere
        self._kept: list[_Kept] = []
        self._gone: list[Place] = []  # whose files were unlinked, and are again at the end
        self._beside: list[tuple[int, str]] = []  # directories made beside kept files
        self._times: dict[bytes, tuple[int, int, int]] = {}  # parent: descriptor, atime, mtime
        self._count = 0

    def bind(self, sock: socket.socket, name: bytes, file: SocketFile | None = None) -> Place:
        """Bind to `name`; the socket's file will be `file` after settle(), or none."""
        if name.startswith(b"\0"):
            sock.bind(name)
            return Place(None, name)
        self._count += 1
        if file is None:
            if self._nowhere is None:
                self._nowhere = self._keep(mount.make_mount("tmpfs", {"mode": "0755"}))
            place = self._bind_below(self._directory(self._nowhere, str(self._count)), sock, name)
            self._gone.append(place)
            return place
        parent = self._parent(os.path.dirname(path_bytes(file.path)))
        scratch = f".podtree-{secrets.token_hex(16)}"  # no file of the pod has that name
        self._beside.append((parent, scratch))
        place = self._bind_below(self._directory(parent, scratch), sock, name)
        self._kept.append(_Kept(file, place, parent))
        return place

    @contextlib.contextmanager
    def near(self, place: Place) -> Iterator[bytes]:
        """Be where the yielded address leads to the socket."""
        if place.directory is None:
            yield place.name
            return
        os.fchdir(place.directory)
        try:
            yield place.name
        finally:
            os.fchdir(self._home)

    def settle(self) -> None:
        """Put the files of bound sockets to their places, in the stead of what is there."""
        for file, place, parent in self._kept:
            name = os.path.basename(path_bytes(file.path))
            os.chown(place.name, file.uid, file.gid, dir_fd=place.directory, follow_symlinks=False)
            os.chmod(place.name, file.mode, dir_fd=place.directory)
            times = (file.atime_ns, file.mtime_ns)
            os.utime(place.name, ns=times, dir_fd=place.directory, follow_symlinks=False)
            os.rename(place.name, name, src_dir_fd=place.directory, dst_dir_fd=parent)
        self._sweep()
        for fd, atime, mtime in self._times.values():
            os.utime(fd, ns=(atime, mtime))

    def close(self) -> None:
        """Leave nothing behind but what settle() put in place."""
        self._sweep()
        for place in self._gone:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(place.name, dir_fd=place.directory)
        self._gone.clear()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def _sweep(self) -> None:
        for parent, name in self._beside:
            shutil.rmtree(name, ignore_errors=True, dir_fd=parent)
        self._beside.clear()

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def _parent(self, path: bytes) -> int:
        if path not in self._times:
            try:
                fd = self._keep(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            except OSError as error:
                raise RestoreFailed(f"a socket was bound in {os.fsdecode(path)}: {error.strerror}") from error
            info = os.fstat(fd)
            self._times[path] = fd, info.st_atime_ns, info.st_mtime_ns
        return self._times[path][0]

    def _directory(self, parent: int, name: str) -> int:
        os.mkdir(name, 0o755, dir_fd=parent)
        os.chmod(name, 0o755, dir_fd=parent)
        return self._keep(os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent))

    def _bind_below(self, top: int, sock: socket.socket, name: bytes) -> Place:
        parent, _, leaf = name.rpartition(b"/")
        os.fchdir(top)
        os.chroot(".")
        try:
            if not name.startswith(b"/"):  # so deep that the name's ".." stay below
                for _ in range(name.split(b"/").count(b"..")):
                    os.mkdir(b"d", 0o755)
                    os.chdir(b"d")
            walked = b"/" if name.startswith(b"/") else b"."
            for part in parent.split(b"/"):
                walked = os.path.join(walked, part)
                if part not in (b"", b".", b"..") and not os.path.isdir(walked):
                    os.mkdir(walked, 0o755)
            sock.bind(name)
            os.chmod(name, 0o777)
            return Place(self._keep(os.open(walked, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)), leaf)
        except OSError as error:
            raise RestoreFailed(f"cannot bind a socket to {os.fsdecode(name)}: {error}") from error
        finally:
            os.fchdir(self._root)
            os.chroot(".")
            os.fchdir(self._home)


class _Link(NamedTuple):
    """A connection to make through a passing listener; ids of the two ends, None for one that is gone."""

    client: int | None
    server: int | None
    client_name: bytes
    connecting: Credentials | None  # who connects: what the accepted end is told


class _Restorer:
    def __init__(self, states: dict[int, UnixSocket], file: Callable[[int], int]) -> None:
        self.states = states
        self.file = file
        self.late: list[tuple[int, int | None]] = []  # connections with descriptors in their queues
        self.made: dict[int, socket.socket] = {}
        self.gone: dict[int, socket.socket] = {}  # stand-ins for ends that are gone, by the id of the other end
        self.passing: list[socket.socket] = []
        self.places: dict[int, Place] = {}
        self.stranger_places: dict[bytes, Place] = {}  # of datagram sockets that are gone
        self.names = Names()
        self.done = False
        self._check()

    def run(self) -> dict[int, socket.socket]:
        self._to_outside()
        self._connections()
        self._listeners()
        for file_id, state in self.states.items():
            if state.socktype != socket.SOCK_DGRAM:
                if file_id not in self.made:
                    self.made[file_id] = self._new(state.socktype)
                if state.name and file_id not in self.places and not state.accepted:
                    self._bind(file_id)
        self._datagrams()
        for one, two in self.late:
            self._fill(one, two)
        for file_id, state in self.states.items():
            if state.shutdown and not (state.connected and state.socktype != socket.SOCK_DGRAM):
                self.made[file_id].shutdown(state.shutdown - 1)
        self.names.settle()
        for file_id, state in self.states.items():
            if not state.listening:
                finish(self.made[file_id], state, self._what(file_id))
        self.done = True
        return self.made

    def close(self) -> None:
        """Close what is not the result."""
        for sock in [*self.gone.values(), *self.passing, *([] if self.done else self.made.values())]:
            sock.close()
        self.names.close()

    # the small ones

    def _what(self, file_id: int) -> str:
        name = self.states[file_id].name
        return f"unix socket {os.fsdecode(name.replace(bytes(1), b'@'))}" if name else "unix socket"

    def _check(self) -> None:
        """An image may be damaged: every reference must lead somewhere sensible."""
        waiting: set[int] = set()
        for file_id, state in self.states.items():
            refs = [m.sender_id for m in state.queue if m.sender_id is not None]
            for client in (w.client for w in state.waiting if w.client is not None):
                found = self.states.get(client)
                if found is None or found.peer != file_id or found.listening or client in waiting:
                    raise Damaged("a unix listener with a client that does not wait for it")
                waiting.add(client)
            if state.peer is not None:
                refs.append(state.peer)
            if any(ref not in self.states for ref in refs):
                raise Damaged("a unix socket refers to one that is not in the image")
            if state.socktype not in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
                raise Damaged(f"unix socket of type {state.socktype}")
            if not 0 <= state.shutdown <= 3:
                raise Damaged("unix socket with an impossible shutdown state")

    @staticmethod
    def _new(kind: int) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        return sock

    def _pass(self, kind: int) -> socket.socket:
        sock = self._new(kind)
        self.passing.append(sock)
        return sock

    def _bind(self, file_id: int) -> None:
        state = self.states[file_id]
        self.places[file_id] = self.names.bind(self.made[file_id], state.name, state.file)

    def _put(self, file_id: int | None, other: int | None, sock: socket.socket) -> None:
        """`sock` is the socket `file_id`, or else stands for the end of `other` that is gone."""
        if file_id is not None:
            self.made[file_id] = sock
        elif other is not None:
            self.gone[other] = sock

    def _pairs(self, kind: int, credentials: Credentials | None, ends: list[tuple[int, int | None]]) -> None:
        """Make these pairs with socketpair(2)."""

        def make() -> list[int]:
            fds: list[int] = []
            for _ in ends:
                fds += (sock.detach() for sock in socket.socketpair(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC))
            return fds

        fds = run_as(credentials, make)
        socks = [socket.socket(socket.AF_UNIX, kind, 0, fileno=fd) for fd in fds]
        for sock in socks:
            sock.setblocking(False)
        for at, (one, two) in enumerate(ends):
            self._put(one, None, socks[2 * at])
            self._put(two, one, socks[2 * at + 1])

    # to others than the pod's

    def _to_outside(self) -> None:
        for file_id, state in self.states.items():
            if state.outside:
                self.made[file_id] = sock = self._new(state.socktype)
                if state.name and state.socktype != socket.SOCK_DGRAM:
                    self._bind(file_id)
                unixoutside.connect(sock, state.outside, state.user)

    # streams

    def _connections(self) -> None:
        pairs: dict[tuple[int, Credentials | None], list[tuple[int, int | None]]] = defaultdict(list)
        links: dict[tuple[int, bytes, Credentials | None], list[_Link]] = defaultdict(list)
        ends: list[tuple[int, int | None]] = []
        for one, state in self.states.items():
            if state.socktype == socket.SOCK_DGRAM or not state.connected or state.outside:
                continue
            two = state.peer
            if two is not None and self.states[two].listening:
                continue  # not accepted yet
            if two is not None and (self.states[two].peer != one or one == two):
                raise Damaged("a unix connection whose two ends disagree")
            if two is not None and two < one:
                continue
            ends.append((one, two))
            self._sort(one, two, pairs, links)
        for (kind, who), members in pairs.items():
            self._pairs(kind, who, members)
        for (kind, name, who), group in links.items():
            for at in range(0, len(group), BATCH):
                self._link(kind, name, who, group[at : at + BATCH])
        for one, two in ends:
            for file_id in [one] if two is None else [one, two]:
                state = self.states[file_id]
                if state.name and not state.accepted and file_id not in self.places:
                    self._bind(file_id)
            queues = self.states[one].queue + (self.states[two].queue if two is not None else ())
            if any(message.files for message in queues):
                self.late.append((one, two))
            else:
                self._fill(one, two)

    def _sort(
        self,
        one: int,
        two: int | None,
        pairs: dict[tuple[int, Credentials | None], list[tuple[int, int | None]]],
        links: dict[tuple[int, bytes, Credentials | None], list[_Link]],
    ) -> None:
        """How the connection came about decides how it is made."""
        a = self.states[one]
        b = self.states[two] if two is not None else None
        b_name = b.name if b else a.lost_name
        b_sees = b.credentials if b else None
        if a.accepted:
            link = _Link(two, one, b_name, a.credentials)
            links[a.socktype, a.name, b_sees].append(link)
        elif (b.accepted if b else bool(a.lost_name)) and b_name:
            links[a.socktype, b_name, a.credentials].append(_Link(one, two, a.name, b_sees))
        else:
            pairs[a.socktype, a.credentials].append((one, two))

    def _link(self, kind: int, name: bytes, listening: Credentials | None, group: list[_Link]) -> None:
        listener = self._new(kind)
        with listener:
            place = self.names.bind(listener, name)
            run_as(listening, _listening(listener, len(group)))
            by: dict[Credentials | None, list[_Link]] = defaultdict(list)
            for link in group:
                by[link.connecting].append(link)
            for who, links in by.items():
                clients = [self._new(kind) for _ in links]
                for link, client in zip(links, clients, strict=True):
                    if link.client_name and (link.client is None or not self.states[link.client].accepted):
                        self._name_client(link, client)
                run_as(who, self._connecting(place, clients))
                for link, client in zip(links, clients, strict=True):
                    server = listener.accept()[0]
                    server.setblocking(False)
                    self._put(link.client, link.server, client)
                    self._put(link.server, link.client, server)

    def _name_client(self, link: _Link, client: socket.socket) -> None:
        place = self.names.bind(client, link.client_name)
        if link.client is not None:
            self.places[link.client] = place

    def _connecting(self, place: Place, clients: list[socket.socket]) -> Callable[[], list[int]]:
        def work() -> list[int]:
            with self.names.near(place) as address:
                for client in clients:
                    client.connect(address)
            return []

        return work

    def _fill(self, one: int, two: int | None) -> None:
        """Queues, then how far the connection has been closed."""
        a = self.states[one]
        other = self.made[two] if two is not None else self.gone[one]
        self._send(other, a.queue, None)
        if two is not None:
            self._send(self.made[one], self.states[two].queue, None)
            if a.shutdown:
                self.made[one].shutdown(a.shutdown - 1)
            return
        if a.reset:  # left unread there: unix_release_sock() then tells this end ECONNRESET
            self.made[one].send(b"\0")
        self.gone.pop(one).close()

    # sending

    def _send(self, sender: socket.socket, messages: tuple[UnixMessage, ...], to: Place | None) -> None:
        """Send `messages` again, each as who sent it."""
        at = 0
        while at < len(messages):
            who = messages[at].credentials
            run = at
            while run < len(messages) and messages[run].credentials == who:
                run += 1
            self._send_run(sender, messages[at:run], who, to)
            at = run

    def _send_run(
        self, sender: socket.socket, messages: tuple[UnixMessage, ...], who: Credentials | None, to: Place | None
    ) -> None:
        inside = pids_available()

        def work() -> list[int]:
            stamp: list[tuple[int, int, bytes]] = []
            if who is not None:  # a number that lives already, as 1 does, can be named by who may do anything: unix(7)
                pid = who.pid if inside and who.pid else os.getpid()
                raw = struct.pack("iII", pid, who.uid, who.gid)
                stamp = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, raw)]
            with self.names.near(to) if to else contextlib.nullcontext(b"") as address:
                for message in messages:
                    rest, ancillary = memoryview(message.data), stamp + self._rights(message)
                    while True:
                        count = sender.sendmsg([rest], ancillary, socket.MSG_NOSIGNAL, address or None)
                        rest, ancillary = rest[count:], stamp
                        if not rest:
                            break
            return []

        with _room(sender):
            run_as(who, work)

    def _rights(self, message: UnixMessage) -> list[tuple[int, int, bytes]]:
        """SCM_RIGHTS, if descriptors were sent along."""
        if not message.files:
            return []
        fds = [self.made[one].fileno() if one in self.made else self.file(one) for one in message.files]
        return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]

    # datagrams

    def _datagrams(self) -> None:
        ids = [i for i, state in self.states.items() if state.socktype == socket.SOCK_DGRAM]
        paired = {one for one in ids if self.states[one].outside}
        for one in ids:
            paired |= self._pair_datagrams(one, paired)
        for one in ids:
            if one not in self.made:
                self.made[one] = self._new(socket.SOCK_DGRAM)
        for one in ids:
            if self.states[one].name:
                self._bind(one)
        to_connect = {
            one: self.states[one].peer for one in ids if self.states[one].connected and one not in paired
        }
        strangers: dict[bytes, socket.socket] = {}
        for one in ids:
            for message in self.states[one].queue:
                self._deliver(one, message, strangers, to_connect)
        for one in ids:  # ends that are gone and had a name
            state = self.states[one]
            if one in to_connect and state.peer is None:
                self.gone[one] = strangers.get(state.lost_name) or self._stranger(state.lost_name)
        self._connect_all(to_connect)
        for sock in [*strangers.values(), *(self.gone.pop(one) for one in ids if one in self.gone)]:
            sock.close()

    def _pair_datagrams(self, one: int, paired: set[int]) -> set[int]:
        """Make socketpair(2)s of ends that can't have been connected otherwise."""
        state = self.states[one]
        if one in paired or not state.connected:
            return set()
        two = state.peer
        if two is None:
            if state.lost_name and not state.credentials:
                return set()
            self._pairs(state.socktype, state.credentials, [(one, None)])
            if state.lost_name:
                self.names.bind(self.gone[one], state.lost_name)
            return {one}
        other = self.states[two]
        if two == one or two in paired or other.peer != one or (state.name and other.name and not state.credentials):
            return set()
        self._pairs(state.socktype, state.credentials, [(one, two)])
        return {one, two}

    def _stranger(self, name: bytes) -> socket.socket:
        sock = self._pass(socket.SOCK_DGRAM)
        if name:
            self.stranger_places[name] = self.names.bind(sock, name)
        return sock

    def _deliver(
        self,
        one: int,
        message: UnixMessage,
        strangers: dict[bytes, socket.socket],
        to_connect: dict[int, int | None],
    ) -> None:
        state = self.states[one]
        partner = self.gone.get(one)
        if message.sender_id is not None:
            sender = self.made[message.sender_id]
        elif partner is not None and message.sender == state.lost_name:
            sender = partner
        else:
            if message.sender not in strangers:
                strangers[message.sender] = self._stranger(message.sender)
            sender = strangers[message.sender]
        to = self.places.get(one)
        try:
            self._send(sender, (message,), to)
        except (BlockingIOError, RestoreFailed):
            # More than net.unix.max_dgram_qlen: only a socket that is connected to its sender takes so many.
            if message.sender_id is None or to_connect.get(one) != message.sender_id:
                raise
            self._connect_datagram(one, message.sender_id)
            del to_connect[one]
            self._send(sender, (message,), to)

    def _connect_datagram(self, one: int, two: int | None) -> None:
        place = self.places.get(two) if two is not None else self.stranger_places.get(self.states[one].lost_name)
        if place is None:
            raise Damaged(f"{self._what(one)} is connected to a socket that has no name")
        with self.names.near(place) as address:
            self.made[one].connect(address)

    def _connect_all(self, to_connect: dict[int, int | None]) -> None:
        """Connect so that nobody connects to a socket that is already connected to a third one (EPERM)."""
        while to_connect:
            ready = [
                one
                for one, two in to_connect.items()
                if not any(target == one and other != two for other, target in to_connect.items())
            ]
            if not ready:
                raise Damaged("datagram sockets connected in a circle")
            for one in ready:
                self._connect_datagram(one, to_connect.pop(one))

    # listeners

    def _listeners(self) -> None:
        for one, state in self.states.items():
            if not state.listening:
                continue
            self.made[one] = listener = self._new(state.socktype)
            self._bind(one)
            run_as(state.credentials, _listening(listener, len(state.waiting) + state.backlog))
            finish(listener, state, self._what(one))  # what it accepts inherits its options
            for waiting in state.waiting:
                self._wait_at(self.places[one], state, waiting)
            run_as(state.credentials, _listening(listener, state.backlog))

    def _wait_at(self, listener: Place, state: UnixSocket, waiting: UnixWaiting) -> None:
        """Make a connection that is yet to be accepted."""
        if waiting.client is None:
            sock = self._pass(state.socktype)
            if waiting.name:
                self.names.bind(sock, waiting.name)
        else:
            self.made[waiting.client] = sock = self._new(state.socktype)
            if self.states[waiting.client].name:
                self._bind(waiting.client)
        run_as(waiting.credentials, self._connecting(listener, [sock]))
        self._send(sock, waiting.queue, None)
        if waiting.client is not None and self.states[waiting.client].shutdown:
            sock.shutdown(self.states[waiting.client].shutdown - 1)


def _listening(sock: socket.socket, backlog: int) -> Callable[[], list[int]]:
    def work() -> list[int]:
        sock.listen(backlog)
        return []

    return work


@contextlib.contextmanager
def _room(sock: socket.socket) -> Iterator[None]:
    """A send buffer that takes everything; how large it was is put back."""
    before = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    set_option(sock, "SO_SNDBUF", ROOM)
    try:
        yield
    finally:
        set_option(sock, "SO_SNDBUF", before)
