"""Sockets as the kernel has them in its memory: also those that nobody has a descriptor for, and errors unread.

TCP connections that nobody has accepted yet, or whose program has closed them while data is on its way; unix
connections not accepted yet; errors that the next call will report. Asking for any of these from a program
would consume them. Everything read is checked: sequence numbers must follow one another, lengths must add up.

Source: include/linux/skbuff.h, include/net/{sock,tcp,request_sock,inet_hashtables,af_unix}.h (Linux 6.18).
"""

from __future__ import annotations

import dataclasses
import socket
import struct
from array import array
from collections.abc import Iterator

from podtree.kernel.kmem import MAX_LIST, WINDOW, KernelMemory, Unreadable, View
from podtree.kernel.sock import SHUT_RCV, SHUT_SEND, TcpState

MASK = 0xFFFFFFFF
FIN = 0x01  # of tcp_skb_cb.tcp_flags
ETH_P_IPV6 = 0x86DD  # linux/if_ether.h
UDP_HEADER = 8
IPPROTO_MPTCP = 262  # linux/in.h
ATTEMPTS = 5  # at what changes while it is read
_MOVING = ("rcv_nxt", "copied_seq", "snd_una", "write_seq")  # when these stay, so do the queues
_MAPPED = bytes(10) + b"\xff\xff"  # what an IPv4 address begins with as an IPv6 one

Host = bytes  # a packed address


_FIN_RECEIVED = (TcpState.CLOSE_WAIT, TcpState.CLOSING, TcpState.LAST_ACK)
_SMALL = (TcpState.TIME_WAIT, TcpState.NEW_SYN_RECV)


def _plain(host: Host) -> Host:
    return host[12:] if host[:12] == _MAPPED else host


@dataclasses.dataclass(slots=True, frozen=True)
class TcpEnd:
    """One end of a connection. Addresses are packed, ports numbers; sequence numbers don't count a FIN."""

    address: int  # of its struct sock
    state: TcpState
    local: tuple[bytes, int]
    remote: tuple[bytes, int]
    received: bytes  # and not read
    received_end: int  # the sequence number that it waits for
    fin_received: bool
    sent: bytes  # and not acknowledged
    sent_end: int  # the sequence number behind `sent`
    fin_sent: bool


@dataclasses.dataclass(slots=True, frozen=True)
class Sender:
    """Who sent a message, or made a connection. `pid`: in the wanted pid namespace; 0: of none of it."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


@dataclasses.dataclass(slots=True, frozen=True)
class UnixMessage:
    """A message, or a piece of a stream, in the queue of a unix socket; `files`: addresses of passed files."""

    data: bytes
    name: bytes  # of the socket that sent it, as in sun_path
    sender: Sender | None
    files: tuple[int, ...]


@dataclasses.dataclass(slots=True, frozen=True)
class UnixEmbryo:
    """A unix connection that waits for accept(2): what the accepted socket will be like."""

    client: int  # address of the client's struct sock
    client_name: bytes
    client_gone: bool
    made_by: Sender | None  # SO_PEERCRED
    shutdown: int  # SHUT_*
    error: int
    queue: tuple[UnixMessage, ...]


@dataclasses.dataclass(slots=True, frozen=True)
class Datagram:
    """A UDP datagram in a queue. Hosts are packed, IPv4 or IPv6 as it came.

    `merged`: several, by UDP_GRO. `extended`: its header has IP options, or others stand between.
    """

    data: bytes
    source: tuple[Host, int]
    destination: Host
    ttl: int
    tos: int
    merged: bool
    extended: bool


@dataclasses.dataclass(slots=True, frozen=True)
class Group:
    """A socket's place in its SO_REUSEPORT group, and the program that chooses among the members.

    b"" without one; None for one that can't be read back (SO_ATTACH_REUSEPORT_EBPF).
    """

    index: int
    program: bytes | None


class SocketMemory:
    """Looks at sockets through kernel memory. All methods raise OSError (Unreadable) or KeyError."""

    def __init__(self, memory: KernelMemory) -> None:
        self.memory = memory
        self._frag = "skb_frag" if memory.btf.has("skb_frag", "netmem") else "bio_vec"  # before Linux 6.10

    def error(self, fd: int) -> tuple[int, bool]:
        """The errno that the next call will report (0: none), and whether the error queue has messages."""
        sk = self.memory.view("sock", self.memory.sock(fd))
        return sk.number("sk_err"), bool(sk.number("sk_error_queue.qlen"))

    def _offset(self, name: str, path: str) -> int:
        return self.memory.btf.member(name, path).offset

    def group(self, fd: int) -> Group | None:
        """The SO_REUSEPORT group of a socket; None without one."""
        address = self.memory.sock(fd)
        at = self.memory.view("sock", address).pointer("sk_reuseport_cb")
        if not at:
            return None
        group = self.memory.view("sock_reuseport", at)
        members = array("Q", self.memory.read(group.at("socks"), 8 * group.number("num_socks")))
        if address not in members:
            return None
        program: bytes | None = b""
        if attached := group.pointer("prog"):
            original = self.memory.view("bpf_prog", attached).pointer("orig_prog")
            program = self._instructions(original) if original else None
        return Group(members.index(address), program)

    def _instructions(self, address: int) -> bytes:
        """The struct sock_filters of a struct sock_fprog_kern."""
        program = self.memory.view("sock_fprog_kern", address)
        return self.memory.read(program.pointer("filter"), 8 * program.number("len"))

    # --- buffers

    def bytes_of(self, skb: View, start: int = 0) -> bytes:
        """What a struct sk_buff holds, from `start` on."""
        length, paged = skb.number("len"), skb.number("data_len")
        parts = []
        if length > paged:
            parts.append(self.memory.read(skb.pointer("data"), length - paged))
        if paged:
            parts += self._paged(skb)
        data = b"".join(parts)
        if len(data) != length:
            raise Unreadable(f"a buffer of {length} bytes has {len(data)}")
        return data[start:]

    def _paged(self, skb: View) -> Iterator[bytes]:
        shared = self.memory.view("skb_shared_info", skb.pointer("head") + skb.number("end"))
        for index in range(shared.number("nr_frags")):
            yield self._fragment(shared.cast(self._frag, "frags", index))
        at = shared.pointer("frag_list")
        for _ in range(MAX_LIST):
            if not at:
                return
            piece = self.memory.view("sk_buff", at)
            yield self.bytes_of(piece)
            at = piece.pointer("next")

    def _fragment(self, frag: View) -> bytes:
        prefix = "bv_" if self._frag == "bio_vec" else ""
        page = frag.pointer(prefix + "page" if prefix else "netmem")
        if page & 1:
            raise Unreadable("data in a device's memory")
        at = self.memory.page_address(page) + frag.number(prefix + "offset")
        return self.memory.read(at, frag.number(prefix + "len"))

    # --- TCP

    def waiting(self, listener: int) -> list[TcpEnd]:
        """The connections in a listener's accept queue, first come first; `listener`: the caller's descriptor."""
        address = self.memory.sock(listener)
        if self.memory.view("sock", address).number("sk_protocol") == IPPROTO_MPTCP:
            address = self.memory.view("mptcp_sock", address).pointer("first")
        sock = self.memory.view("inet_connection_sock", address)
        found = []
        at = sock.pointer("icsk_accept_queue.rskq_accept_head")
        while at:
            request = self.memory.view("request_sock", at)
            found.append(self.tcp_end(request.pointer("sk")))
            at = request.pointer("dl_next")
            if len(found) > MAX_LIST:
                raise Unreadable("an accept queue without an end")
        return found

    def tcp_end(self, address: int) -> TcpEnd:
        """The TCP socket whose struct sock is at `address`. Its kernel timers may be at work meanwhile."""
        for _ in range(ATTEMPTS):
            before = self.memory.view("tcp_sock", address)
            try:
                end = self._tcp_end(before)
            except Unreadable:
                continue
            after = self.memory.view("tcp_sock", address)
            if all(before.number(name) == after.number(name) for name in _MOVING):
                return end
        raise Unreadable("a TCP socket that does not come to rest")

    def _tcp_end(self, tcp: View) -> TcpEnd:
        sock = tcp.cast("sock")
        state = TcpState(sock.number("__sk_common.skc_state"))
        if tcp.number("urg_data"):
            raise Unreadable("urgent data")
        queue = self._received(tcp)
        fin_received = state in _FIN_RECEIVED or (
            state == TcpState.CLOSE and bool(queue) and self._control(queue[-1]).number("tcp_flags") & FIN > 0
        )
        received_end = tcp.number("rcv_nxt") - fin_received & MASK
        received = b""
        if tcp.number("copied_seq") != tcp.number("rcv_nxt"):  # else all is read, a FIN included
            received = self._run_of(queue, tcp.number("copied_seq"), received_end)
        fin_sent = state in (TcpState.FIN_WAIT1, TcpState.FIN_WAIT2, TcpState.CLOSING, TcpState.LAST_ACK)
        sent_end = tcp.number("write_seq") - fin_sent & MASK
        unacknowledged = tcp.number("snd_una")
        if unacknowledged == tcp.number("write_seq"):
            unacknowledged = sent_end  # the FIN, too, has arrived
        sent = self._run_of(self._sent(tcp), unacknowledged, sent_end)
        local, remote = self._addresses(tcp)
        return TcpEnd(
            tcp.address, state, local, remote, received, received_end, fin_received, sent, sent_end, fin_sent
        )

    @staticmethod
    def _addresses(tcp: View) -> tuple[tuple[Host, int], tuple[Host, int]]:
        """(host, port) of its own and of the other end."""
        common = tcp.cast("sock_common")
        own = tcp.cast("inet_sock").raw("inet_sport")  # skc_num goes with the port, when the connection is over
        ports = int.from_bytes(own, "big"), int.from_bytes(common.raw("skc_dport"), "big")
        if common.number("skc_family") == socket.AF_INET6:
            hosts = common.raw("skc_v6_rcv_saddr"), common.raw("skc_v6_daddr")
        else:
            hosts = common.raw("skc_rcv_saddr"), common.raw("skc_daddr")
        return (hosts[0], ports[0]), (hosts[1], ports[1])

    @staticmethod
    def _control(buffer: View) -> View:
        """TCP's notes on a buffer."""
        return buffer.cast("tcp_skb_cb", "cb")

    def _received(self, tcp: View) -> list[View]:
        return list(self.memory.each(tcp.cast("sock").at("sk_receive_queue"), "sk_buff", "next"))

    def _sent(self, tcp: View) -> list[View]:
        """What was sent and is not acknowledged, then what is still to be sent."""
        sock = tcp.cast("sock")
        queue = self.memory.each(sock.at("sk_write_queue"), "sk_buff", "next")
        return [*self._tree(sock.pointer("tcp_rtx_queue.rb_node")), *queue]

    def _tree(self, node: int, depth: int = 0) -> Iterator[View]:
        """The buffers of a red-black tree, in order."""
        if not node:
            return
        if depth > 64:
            raise Unreadable("a tree without leaves")
        buffer = self.memory.container("sk_buff", "rbnode", node)
        yield from self._tree(buffer.pointer("rbnode.rb_left"), depth + 1)
        yield buffer
        yield from self._tree(buffer.pointer("rbnode.rb_right"), depth + 1)

    def _run_of(self, buffers: list[View], start: int, end: int) -> bytes:
        """The bytes from sequence number `start` to `end`, of buffers that must have all of them."""
        parts, at = [], start
        for buffer in buffers:
            first = self._control(buffer).number("seq")
            length = buffer.number("len")
            skip = at - first & MASK
            if skip > 1 << 31:
                raise Unreadable(f"{first - at & MASK} bytes are missing in a TCP queue")
            if skip < length:
                parts.append(self.bytes_of(buffer, skip))
                at = first + length & MASK
        if at != end:
            raise Unreadable(f"a TCP queue ends {end - at & MASK} bytes too early")
        return b"".join(parts)

    def tcp_sockets(self, fd: int) -> dict[tuple[Host, int, Host, int], int]:
        """Addresses of the struct socks of all TCP connections in a socket's network namespace.

        By (local host, local port, remote host, remote port), IPv4-mapped hosts as IPv4. Those in TIME_WAIT or
        half made are left out: they are smaller structures. `fd`: one of the caller's TCP sockets there.
        """
        own = self.memory.view("sock", self.memory.sock(fd))
        net = own.pointer("__sk_common.skc_net.net")
        table = self.memory.view(
            "inet_hashinfo", self.memory.pointer(net + self._offset("net", "ipv4.tcp_death_row.hashinfo"))
        )
        start, size = table.pointer("ehash"), (table.number("ehash_mask") + 1) * 8
        found = {}
        for at in range(0, size, WINDOW):
            heads = array("Q", self.memory.read(start + at, min(WINDOW, size - at)))
            for head in [head for head in heads if not head & 1]:  # a quarter of a million, most of them empty
                for sock in self._chain(head):
                    common = sock.cast("sock_common")
                    if common.pointer("skc_net.net") == net and common.number("skc_state") not in _SMALL:
                        (host, port), (other, other_port) = self._addresses(sock)
                        found[_plain(host), port, _plain(other), other_port] = sock.address
        return found

    def _chain(self, node: int) -> Iterator[View]:
        """The sockets of a hash bucket. A list ends in an odd number (include/linux/list_nulls.h)."""
        while not node & 1:
            sock = self.memory.view("tcp_sock", node - self._offset("sock", "__sk_common.skc_nulls_node"))
            yield sock
            node = sock.cast("sock_common").pointer("skc_nulls_node.next")

    # --- UDP

    def datagrams(self, fd: int) -> list[Datagram]:
        """What waits in a UDP socket (the caller's descriptor), empty ones included, first come first."""
        sock = self.memory.view("udp_sock", self.memory.sock(fd))
        queues = sock.at("reader_queue"), sock.cast("sock").at("sk_receive_queue")
        return [self._datagram(skb) for head in queues for skb in self.memory.each(head, "sk_buff", "next")]

    def _datagram(self, skb: View) -> Datagram:
        head, start, end = skb.pointer("head"), skb.number("network_header"), skb.number("transport_header")
        (port,) = struct.unpack("!H", self.memory.read(head + end, 2))
        if int.from_bytes(skb.raw("protocol"), "big") == ETH_P_IPV6:
            size, layout = 40, "!I3xB16s16s"
            first, ttl, source, destination = struct.unpack(layout, self.memory.read(head + start, size))
            tos = first >> 20 & 0xFF
        else:
            size, layout = 20, "!xB6xB3x4s4s"
            tos, ttl, source, destination = struct.unpack(layout, self.memory.read(head + start, size))
        shared = self.memory.view("skb_shared_info", head + skb.number("end"))
        merged, extended = shared.number("gso_size") > 0, end - start != size
        return Datagram(self.bytes_of(skb), (source, port), destination, ttl, tos, merged, extended)

    def held_back(self, fd: int) -> tuple[bytes, tuple[Host, int]] | None:
        """A datagram that is not sent yet (UDP_CORK, MSG_MORE), and where it goes to; None without one."""
        udp = self.memory.view("udp_sock", self.memory.sock(fd))
        if not udp.number("pending"):
            return None
        parts: list[bytes] = []
        for skb in self.memory.each(udp.cast("sock").at("sk_write_queue"), "sk_buff", "next"):
            header = skb.pointer("head") + skb.number("transport_header") - skb.pointer("data")
            parts.append(self.bytes_of(skb, header + (0 if parts else UDP_HEADER)))
        data = b"".join(parts)
        if len(data) + UDP_HEADER != udp.number("len"):
            raise Unreadable(f"a datagram of {udp.number('len')} bytes has {len(data)}")
        inet = udp.cast("inet_sock")
        if udp.number("pending") == socket.AF_INET6:
            host, port = inet.raw("cork.fl.u.ip6.daddr"), inet.raw("cork.fl.u.ip6.uli.ports.dport")
        else:
            host, port = inet.raw("cork.fl.u.ip4.daddr"), inet.raw("cork.fl.u.ip4.uli.ports.dport")
        return data, (host, int.from_bytes(port, "big"))

    # --- unix

    def pid_level(self, pidfd: int) -> int:
        """How deep the pid namespace of a process is nested."""
        task = self.memory.task(pidfd)
        return self.memory.view("pid", task.pointer("thread_pid")).number("level")

    def pid_number(self, pid: int, level: int) -> int:
        """The number of a struct pid in the namespace of that level, also if its process has ended; 0 without one."""
        if not pid:
            return 0
        found = self.memory.view("pid", pid)
        if found.number("level") < level:
            return 0
        at = found.at("numbers") + level * self.memory.btf.size("upid")
        return self.memory.view("upid", at).number("nr")

    def peer_pid(self, fd: int, level: int) -> int:
        """The pid of SO_PEERCRED in the namespace of that level, also of a process that has ended."""
        sock = self.memory.view("sock", self.memory.sock(fd))
        return self.pid_number(sock.pointer("sk_peer_pid"), level)

    def embryos(self, listener: int, level: int) -> list[UnixEmbryo]:
        """The connections that wait at a unix listener (the caller's descriptor), first come first."""
        queue = self.memory.sock(listener) + self._offset("sock", "sk_receive_queue")
        return [self._embryo(buffer.pointer("sk"), level) for buffer in self.memory.each(queue, "sk_buff", "next")]

    def unix_queue(self, fd: int, level: int) -> list[UnixMessage]:
        """What waits in a unix socket (the caller's descriptor), message by message, empty ones included."""
        queue = self.memory.sock(fd) + self._offset("sock", "sk_receive_queue")
        return [self._unix_message(buffer, level) for buffer in self.memory.each(queue, "sk_buff", "next")]

    def _embryo(self, address: int, level: int) -> UnixEmbryo:
        unix = self.memory.view("unix_sock", address)
        sock = unix.cast("sock")
        if unix.pointer("oob_skb"):
            raise Unreadable("an out-of-band byte")
        client = unix.pointer("peer")
        queue = self.memory.each(sock.at("sk_receive_queue"), "sk_buff", "next")
        return UnixEmbryo(
            client=client,
            client_name=self._unix_name(client),
            client_gone=not self.memory.view("sock", client).pointer("sk_socket"),
            made_by=self._peer(sock, level),
            shutdown=sock.number("sk_shutdown") & (SHUT_RCV | SHUT_SEND),
            error=sock.number("sk_err"),
            queue=tuple(self._unix_message(buffer, level) for buffer in queue),
        )

    def _unix_name(self, address: int) -> bytes:
        """As in sun_path: without the NUL at the end of a path."""
        name = self.memory.view("unix_sock", address).pointer("addr")
        if not name:
            return b""
        bound = self.memory.view("unix_address", name)
        raw = self.memory.read(bound.at("name"), bound.number("len"))[2:]
        return raw if raw.startswith(b"\0") else raw.rstrip(b"\0")

    def _peer(self, sock: View, level: int) -> Sender | None:
        cred = sock.pointer("sk_peer_cred")
        if not cred:
            return None
        who = self.memory.view("cred", cred)
        groups: tuple[int, ...] = ()
        if listed := who.pointer("group_info"):
            info = self.memory.view("group_info", listed)
            if count := info.number("ngroups"):
                groups = tuple(array("I", self.memory.read(info.at("gid"), 4 * count)))
        pid = self.pid_number(sock.pointer("sk_peer_pid"), level)
        return Sender(pid, who.number("euid.val"), who.number("egid.val"), groups)

    def _unix_message(self, buffer: View, level: int) -> UnixMessage:
        cb = buffer.cast("unix_skb_parms", "cb")
        sender = None
        if cb.pointer("pid"):
            sender = Sender(self.pid_number(cb.pointer("pid"), level), cb.number("uid.val"), cb.number("gid.val"))
        files: tuple[int, ...] = ()
        if passed := cb.pointer("fp"):
            rights = self.memory.view("scm_fp_list", passed)
            files = tuple(array("Q", self.memory.read(rights.at("fp"), 8 * rights.number("count"))))
        name = self._unix_name(buffer.pointer("sk"))
        return UnixMessage(self.bytes_of(buffer, cb.number("consumed")), name, sender, files)
