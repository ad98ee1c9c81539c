"""Calls on sockets that Python's socket module lacks: looking into queues without consuming, TCP_REPAIR, states.

Source: socket(7), unix(7), tcp(7), recv(2); include/uapi/linux/{tcp,un,sockios}.h,
include/uapi/asm-generic/socket.h, net/ipv4/tcp.c, net/unix/af_unix.c (Linux 6.18).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import enum
import errno
import fcntl
import os
import select
import socket
import struct
from collections.abc import Iterable, Iterator

SO_TYPE, SO_PROTOCOL, SO_DOMAIN = 3, 38, 39
SO_PEEK_OFF = 42
SO_NETNS_COOKIE = 71
SO_PEERGROUPS = 59
SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27
SO_MEMINFO = 55
SO_ATTACH_REUSEPORT_CBPF, SO_DETACH_REUSEPORT_BPF = 51, 68
BPF_RET_K, BPF_MAXINSNS = 0x06, 4096  # linux/bpf_common.h
SCM_PIDFD = 4
SIOCINQ = 0x541B
SIOCOUTQ = 0x5411
SIOCUNIXFILE = 0x89E0
MSG_ERRQUEUE = 0x2000
SHUT_RCV = 1  # RCV_SHUTDOWN, SEND_SHUTDOWN: include/net/sock.h
SHUT_SEND = 2
POLLRDHUP = 0x2000

TCP_INFO = 11
TCP_REPAIR = 19
TCP_REPAIR_QUEUE = 20
TCP_QUEUE_SEQ = 21
TCP_SAVE_SYN, TCP_SAVED_SYN = 27, 28
TCPI_OPT_TIMESTAMPS = 1
TCP_REPAIR_ON = 1
TCP_REPAIR_OFF_NO_WP = -1  # leaves repair mode without sending a window probe
TCP_NO_QUEUE, TCP_RECV_QUEUE, TCP_SEND_QUEUE = 0, 1, 2


class TcpState(enum.IntEnum):
    """include/net/tcp_states.h; unix sockets use ESTABLISHED, CLOSE and LISTEN of it."""

    ESTABLISHED = 1
    SYN_SENT = 2
    SYN_RECV = 3
    FIN_WAIT1 = 4
    FIN_WAIT2 = 5
    TIME_WAIT = 6
    CLOSE = 7
    CLOSE_WAIT = 8
    LAST_ACK = 9
    LISTEN = 10
    CLOSING = 11
    NEW_SYN_RECV = 12


@dataclasses.dataclass(slots=True, frozen=True)
class Peeked:
    """One message (or, of a stream, one run of bytes from one writer) that is still in the queue."""

    data: bytes
    address: object  # as Python's socket module gives it
    controls: tuple[tuple[int, int, bytes], ...]
    descriptors: tuple[int, ...]  # duplicates, in this process, of those sent along (SCM_RIGHTS)


def adopt(fd: int) -> socket.socket:
    """A socket object for a descriptor, which becomes its own. By itself Python asks for a name, which not all have."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=fd)
    family, kind, protocol = (sock.getsockopt(socket.SOL_SOCKET, what) for what in (SO_DOMAIN, SO_TYPE, SO_PROTOCOL))
    return socket.socket(family, kind, protocol, fileno=sock.detach())


def events(fd: int) -> int:
    """What poll(2) says now, of all that it can say; consumes nothing (unlike SO_ERROR)."""
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLPRI | select.POLLOUT | POLLRDHUP)
    answer = poll.poll(0)
    return answer[0][1] if answer else 0


def queued(fd: int) -> int:
    """SIOCINQ: bytes that can be received (of datagram sockets: in the first datagram)."""
    return int(struct.unpack("i", fcntl.ioctl(fd, SIOCINQ, bytes(4)))[0])


def unsent(fd: int) -> int:
    """SIOCOUTQ: bytes not yet acknowledged (TCP; a FIN counts 1), memory of messages not yet read (others)."""
    return int(struct.unpack("i", fcntl.ioctl(fd, SIOCOUTQ, bytes(4)))[0])


def netns_cookie(sock: socket.socket) -> int:
    """A number that identifies the network namespace of the socket."""
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), "little")


def bound_file(sock: socket.socket) -> int | None:
    """An O_PATH descriptor of the file that a unix socket is bound to (SIOCUNIXFILE), None without one."""
    try:
        return int(fcntl.ioctl(sock.fileno(), SIOCUNIXFILE, 0))
    except FileNotFoundError:
        return None


def memory_used(sock: socket.socket) -> int:
    """Bytes of kernel memory that what waits in the receive queue takes (SK_MEMINFO_RMEM_ALLOC): more than 0 each."""
    return int(struct.unpack("I", sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 4))[0])


def peer_groups(sock: socket.socket) -> tuple[int, ...]:
    """SO_PEERGROUPS: the supplementary groups of who made the other end of a unix connection."""
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024)
    except OSError:  # ENODATA: nobody
        return ()
    return struct.unpack(f"{len(raw) // 4}I", raw)


def advertised_segment(sock: socket.socket) -> int:
    """The segment size that this end of a connection has asked for: tcpi_advmss, less what time stamps take."""
    raw = sock.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 104)
    stamps = 12 if raw[5] & TCPI_OPT_TIMESTAMPS else 0
    return int(struct.unpack_from("I", raw, 84)[0]) + stamps


def has_saved_syn(sock: socket.socket) -> bool:
    """Whether the packet that made the connection can be had by TCP_SAVED_SYN, which gives it only once."""
    try:
        sock.getsockopt(socket.IPPROTO_TCP, TCP_SAVED_SYN, 1)
    except OSError as error:  # EINVAL: there is more than one byte of it
        return error.errno == errno.EINVAL
    return False


def tcp_info(sock: socket.socket) -> tuple[TcpState, int, int]:
    """(state, tcpi_unacked, tcpi_sacked); of a listener the last two are its queue's length and limit."""
    raw = sock.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 104)
    unacked, sacked = struct.unpack_from("II", raw, 24)
    return TcpState(raw[0]), unacked, sacked


def attach_program(sock: socket.socket, option: int, program: bytes) -> None:
    """Set SO_ATTACH_FILTER or SO_ATTACH_REUSEPORT_CBPF to an array of struct sock_filter; OSError if that is none."""
    if len(program) > 8 * BPF_MAXINSNS:
        raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
    code = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("@HxxxxxxQ", len(program) // 8, ctypes.addressof(code))  # struct sock_fprog
    sock.setsockopt(socket.SOL_SOCKET, option, fprog)


@contextlib.contextmanager
def reuseport_index(sock: socket.socket, index: int) -> Iterator[None]:
    """Within, the socket number `index` of the SO_REUSEPORT group of `sock` gets all that comes."""
    attach_program(sock, SO_ATTACH_REUSEPORT_CBPF, struct.pack("=HBBI", BPF_RET_K, 0, 0, index))
    try:
        yield
    finally:
        sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_REUSEPORT_BPF, 0)


# --- looking into receive queues ---------------------------------------------------------------------


def _peek(sock: socket.socket, size: int) -> tuple[Peeked, bool]:
    """One recvmsg(MSG_PEEK). The bool tells that the message goes on behind `size` (MSG_TRUNC)."""
    flags = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    data, ancillary, got, address = sock.recvmsg(size, 4096, flags)
    controls = []
    descriptors: list[int] = []
    for level, kind, value in ancillary:
        numbers = [fd for (fd,) in struct.iter_unpack("i", value[: len(value) // 4 * 4])]
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors += numbers
        elif level == socket.SOL_SOCKET and kind == SCM_PIDFD:
            _close_all(numbers)
        else:
            controls.append((level, kind, value))
    if got & socket.MSG_CTRUNC:
        _close_all(descriptors)
        raise OSError(errno.EMFILE, "what is sent along with a message can't be looked at")
    return Peeked(data, address, tuple(controls), tuple(descriptors)), bool(got & socket.MSG_TRUNC)


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)


@contextlib.contextmanager
def _peek_offset(sock: socket.socket) -> Iterator[None]:
    """Let successive peeks walk the queue (SO_PEEK_OFF, socket(7)); the offset is put back at the end."""
    before = sock.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF)
    sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    try:
        yield
    finally:
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, before)


def peek_stream(sock: socket.socket) -> list[Peeked]:
    """All bytes in the receive queue of a stream, in runs; the caller closes their descriptors.

    A run ends behind a message with descriptors, which are the run's; plain bytes before that are joined with it.
    The caller has made sure that no error is pending: a receive with nothing in the queue would consume it.
    The usual case needs no SO_PEEK_OFF, so a checkpointer killed at any instant leaves no trace.
    """
    size = queued(sock.fileno())
    if not size:
        return []
    if sock.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF) < 0:
        first, _ = _peek(sock, size)
        if len(first.data) == size and not first.descriptors:
            return [first]
        _close_all(first.descriptors)
    runs = []
    with _peek_offset(sock):
        while size > 0:
            run, _ = _peek(sock, size)
            if not run.data:
                break
            runs.append(run)
            size -= len(run.data)
    return runs


def peek_messages(sock: socket.socket, ends: int | None = None) -> list[Peeked]:
    """All datagrams in the receive queue, first to come first; no error may be pending.

    `ends`: total bytes queued, where the end of the queue can't be told from an empty message (a
    SOCK_SEQPACKET socket shut down for receiving gives 0 bytes instead of EAGAIN). The caller closes their
    descriptors. An empty message that was peeked at before is missing: with an offset the kernel skips it.
    """
    messages: list[Peeked] = []
    with _peek_offset(sock):
        while ends is None or sum(len(m.data) for m in messages) < ends:
            try:
                message, more = _peek(sock, 1 << 17)
            except BlockingIOError:
                break
            while more:  # the next peek goes on inside of the same datagram
                rest, more = _peek(sock, 1 << 20)
                _close_all(rest.descriptors)
                message = dataclasses.replace(message, data=message.data + rest.data)
            messages.append(message)
    return messages


# --- TCP in repair mode ------------------------------------------------------------------------------


@contextlib.contextmanager
def repair(sock: socket.socket) -> Iterator[None]:
    """TCP_REPAIR for the while: queues and sequence numbers can be read; bind(2) never finds a port taken.

    Leaving says nothing to the peer. TCP_REPAIR also sets sk_reuse to SK_FORCE_REUSE (2) and then to 0
    (do_tcp_setsockopt, net/ipv4/tcp.c), so SO_REUSEADDR is put back.
    """
    reuse = sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_ON)
    try:
        yield
    finally:
        leave_repair(sock, reuse)


def leave_repair(sock: socket.socket, reuse: int) -> None:
    """Leave repair mode without a window probe; SO_REUSEADDR becomes `reuse`."""
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_OFF_NO_WP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)


def in_repair(sock: socket.socket) -> bool:
    """Whether repair mode is on."""
    return bool(sock.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR))


def queue_sequence(sock: socket.socket, queue: int) -> int:
    """In repair mode: rcv_nxt (TCP_RECV_QUEUE) or write_seq (TCP_SEND_QUEUE), unsigned 32 bits.

    The queue stays the chosen one: peeking in repair mode looks into that one.
    """
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
    return sock.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ) & 0xFFFFFFFF


def peek_send_queue(sock: socket.socket, size: int) -> bytes:
    """In repair mode: the first `size` bytes from the first unacknowledged one on (tcp_peek_sndq)."""
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE)
    # With this queue chosen the kernel takes segments for sent without sending them (tcp_write_xmit()).
    data = sock.recv(size, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_NO_QUEUE)
    return data
