"""Socket options of all families: one table, read and set in one way.

A socket's state holds the options in which it differs from a fresh socket of its kind in the same network
namespace. Source: socket(7), ip(7), ipv6(7), tcp(7), udp(7), unix(7), netlink(7);
include/uapi/asm-generic/socket.h, include/uapi/linux/{in,in6,tcp,udp,netlink}.h (Linux 6.18).
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import socket
from typing import NamedTuple, Protocol

from podtree.errors import Damaged, RestoreFailed

SOL_UDP, SOL_UDPLITE = 17, 136
SOL_RAW = 255
SOL_PACKET = 263
SOL_NETLINK = 270
SO_BUF_LOCK = 72
SO_LOCK_FILTER = 44
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
SO_GET_FILTER = 26
SNDBUF_LOCK, RCVBUF_LOCK = 1, 2

OptionValue = int | bytes
Options = dict[str, OptionValue]


class Kind(enum.Enum):
    """The shape of an option's value."""

    INT = enum.auto()
    STRING = enum.auto()  # a name, NUL-terminated or not
    RAW = enum.auto()  # a structure, kept as bytes


class Family(enum.Flag):
    """Which sockets have the option."""

    UNIX = enum.auto()
    TCP = enum.auto()
    UDP = enum.auto()
    RAW = enum.auto()
    PACKET = enum.auto()
    NETLINK = enum.auto()
    DATAGRAM = UDP | RAW
    INET = TCP | UDP | RAW
    INET6 = enum.auto()  # besides: only if AF_INET6
    ALL = UNIX | TCP | UDP | RAW | PACKET | NETLINK


class Option(NamedTuple):
    """One row: where it is, and what shape it has. `buffer`: bytes to offer getsockopt(2)."""

    name: str
    level: int
    number: int
    of: Family
    kind: Kind = Kind.INT
    buffer: int = 0
    #: Of a connection the value is the connection's, not the program's wish: kept for other sockets only.
    unconnected_only: bool = False


def _rows(level: int, of: Family, names: dict[str, int]) -> list[Option]:
    return [Option(name, level, number, of) for name, number in names.items()]


_SOCKET = {
    "SO_DEBUG": 1, "SO_REUSEADDR": 2, "SO_DONTROUTE": 5, "SO_BROADCAST": 6, "SO_KEEPALIVE": 9,
    "SO_OOBINLINE": 10, "SO_NO_CHECK": 11, "SO_REUSEPORT": 15, "SO_PASSCRED": 16,
    "SO_RCVLOWAT": 18, "SO_TIMESTAMP_OLD": 29, "SO_PASSSEC": 34, "SO_TIMESTAMPNS_OLD": 35, "SO_MARK": 36,
    "SO_TIMESTAMPING_OLD": 37, "SO_RXQ_OVFL": 40, "SO_WIFI_STATUS": 41, "SO_PEEK_OFF": 42,
    "SO_NOFCS": 43, "SO_SELECT_ERR_QUEUE": 45, "SO_BUSY_POLL": 46, "SO_ZEROCOPY": 60,
    "SO_TIMESTAMP_NEW": 63, "SO_TIMESTAMPNS_NEW": 64, "SO_TIMESTAMPING_NEW": 65, "SO_PREFER_BUSY_POLL": 69,
    "SO_RESERVE_MEM": 73, "SO_TXREHASH": 74, "SO_RCVMARK": 75, "SO_PASSPIDFD": 76, "SO_RCVPRIORITY": 82,
    "SO_PASSRIGHTS": 83, "SO_INQ": 84,
}  # fmt: skip
_IP = {
    "IP_TOS": 1, "IP_TTL": 2, "IP_RECVOPTS": 6, "IP_RETOPTS": 7, "IP_PKTINFO": 8, "IP_MTU_DISCOVER": 10,
    "IP_RECVERR": 11, "IP_RECVTTL": 12, "IP_RECVTOS": 13, "IP_FREEBIND": 15, "IP_PASSSEC": 18,
    "IP_TRANSPARENT": 19, "IP_RECVORIGDSTADDR": 20, "IP_MINTTL": 21, "IP_CHECKSUM": 23,
    "IP_BIND_ADDRESS_NO_PORT": 24, "IP_RECVERR_RFC4884": 26,
    "IP_MULTICAST_LOOP": 34, "IP_MULTICAST_ALL": 49, "IP_UNICAST_IF": 50, "IP_LOCAL_PORT_RANGE": 51,
}  # fmt: skip
_IPV6 = {
    "IPV6_UNICAST_HOPS": 16, "IPV6_MULTICAST_LOOP": 19, "IPV6_MTU_DISCOVER": 23,
    "IPV6_RECVERR": 25, "IPV6_V6ONLY": 26, "IPV6_MULTICAST_ALL": 29, "IPV6_RECVERR_RFC4884": 31,
    "IPV6_FLOWINFO_SEND": 33, "IPV6_RECVPKTINFO": 49, "IPV6_RECVHOPLIMIT": 51, "IPV6_RECVHOPOPTS": 53,
    "IPV6_RECVRTHDR": 56, "IPV6_RECVDSTOPTS": 58, "IPV6_RECVPATHMTU": 60, "IPV6_DONTFRAG": 62,
    "IPV6_RECVTCLASS": 66, "IPV6_TCLASS": 67, "IPV6_AUTOFLOWLABEL": 70, "IPV6_ADDR_PREFERENCES": 72,
    "IPV6_MINHOPCOUNT": 73, "IPV6_RECVORIGDSTADDR": 74, "IPV6_TRANSPARENT": 75, "IPV6_UNICAST_IF": 76,
    "IPV6_RECVFRAGSIZE": 77, "IPV6_FREEBIND": 78,
}  # fmt: skip
_TCP = {
    "TCP_NODELAY": 1, "TCP_CORK": 3, "TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 6, "TCP_SYNCNT": 7,
    "TCP_LINGER2": 8, "TCP_DEFER_ACCEPT": 9, "TCP_QUICKACK": 12, "TCP_THIN_LINEAR_TIMEOUTS": 16, "TCP_USER_TIMEOUT": 18,
    "TCP_FASTOPEN": 23, "TCP_NOTSENT_LOWAT": 25, "TCP_SAVE_SYN": 27, "TCP_INQ": 36, "TCP_TX_DELAY": 37,
    "TCP_RTO_MAX_MS": 44, "TCP_RTO_MIN_US": 45, "TCP_DELACK_MAX_US": 46,
}  # fmt: skip
_UDP = {
    "UDP_CORK": 1, "UDP_ENCAP": 100, "UDP_NO_CHECK6_TX": 101, "UDP_NO_CHECK6_RX": 102, "UDP_SEGMENT": 103,
    "UDP_GRO": 104,
}  # fmt: skip
_PACKET = {
    "PACKET_AUXDATA": 8, "PACKET_ORIGDEV": 9, "PACKET_VERSION": 10, "PACKET_RESERVE": 12, "PACKET_LOSS": 14,
    "PACKET_VNET_HDR": 15, "PACKET_TIMESTAMP": 17, "PACKET_QDISC_BYPASS": 20, "PACKET_IGNORE_OUTGOING": 23,
}  # fmt: skip
_NETLINK = {
    "NETLINK_PKTINFO": 3, "NETLINK_BROADCAST_ERROR": 4, "NETLINK_NO_ENOBUFS": 5, "NETLINK_LISTEN_ALL_NSID": 8,
    "NETLINK_CAP_ACK": 10, "NETLINK_EXT_ACK": 11, "NETLINK_GET_STRICT_CHK": 12,
}  # fmt: skip

#: In the order of setting: SO_RCVLOWAT may enlarge the receive buffer, so the buffers come later.
TABLE: tuple[Option, ...] = (
    *_rows(socket.SOL_SOCKET, Family.ALL, _SOCKET),
    Option("SO_LINGER", socket.SOL_SOCKET, 13, Family.ALL, Kind.RAW, 8),
    Option("SO_RCVTIMEO", socket.SOL_SOCKET, 20, Family.ALL, Kind.RAW, 16),
    Option("SO_SNDTIMEO", socket.SOL_SOCKET, 21, Family.ALL, Kind.RAW, 16),
    Option("SO_BINDTODEVICE", socket.SOL_SOCKET, 25, Family.INET, Kind.STRING, 16),
    Option("SO_MAX_PACING_RATE", socket.SOL_SOCKET, 47, Family.ALL, Kind.RAW, 8),
    Option("SO_TXTIME", socket.SOL_SOCKET, 61, Family.DATAGRAM, Kind.RAW, 8),
    *_rows(socket.IPPROTO_IP, Family.INET, _IP),
    Option("IP_OPTIONS", socket.IPPROTO_IP, 4, Family.INET, Kind.RAW, 64),
    Option("IP_HDRINCL", socket.IPPROTO_IP, 3, Family.RAW),
    Option("IP_NODEFRAG", socket.IPPROTO_IP, 22, Family.RAW),
    Option("IP_MULTICAST_IF", socket.IPPROTO_IP, 32, Family.DATAGRAM, Kind.RAW, 4),
    Option("IP_MULTICAST_TTL", socket.IPPROTO_IP, 33, Family.DATAGRAM),
    Option("IP_RECVFRAGSIZE", socket.IPPROTO_IP, 25, Family.DATAGRAM),
    *_rows(socket.IPPROTO_IPV6, Family.INET6 | Family.INET, _IPV6),
    Option("IPV6_HDRINCL", socket.IPPROTO_IPV6, 36, Family.INET6 | Family.RAW),
    Option("IPV6_CHECKSUM", socket.IPPROTO_IPV6, 7, Family.INET6 | Family.RAW),
    Option("IPV6_MULTICAST_IF", socket.IPPROTO_IPV6, 17, Family.INET6 | Family.DATAGRAM),
    Option("IPV6_MULTICAST_HOPS", socket.IPPROTO_IPV6, 18, Family.INET6 | Family.DATAGRAM),
    Option("ICMP_FILTER", SOL_RAW, 1, Family.RAW, Kind.RAW, 4),
    Option("ICMPV6_FILTER", socket.IPPROTO_ICMPV6, 1, Family.INET6 | Family.RAW, Kind.RAW, 32),
    *_rows(socket.IPPROTO_TCP, Family.TCP, _TCP),
    Option("SO_PRIORITY", socket.SOL_SOCKET, 12, Family.ALL),  # after IP_TOS, which changes it
    Option("TCP_CONGESTION", socket.IPPROTO_TCP, 13, Family.TCP, Kind.STRING, 16),
    Option("TCP_MAXSEG", socket.IPPROTO_TCP, 2, Family.TCP, unconnected_only=True),
    Option("TCP_FASTOPEN_CONNECT", socket.IPPROTO_TCP, 30, Family.TCP, unconnected_only=True),
    Option("TCP_FASTOPEN_NO_COOKIE", socket.IPPROTO_TCP, 34, Family.TCP, unconnected_only=True),
    *_rows(SOL_UDP, Family.UDP, _UDP),
    *_rows(SOL_UDPLITE, Family.UDP, {"UDPLITE_SEND_CSCOV": 10, "UDPLITE_RECV_CSCOV": 11}),
    *_rows(SOL_PACKET, Family.PACKET, _PACKET),
    *_rows(SOL_NETLINK, Family.NETLINK, _NETLINK),
    Option("SO_SNDBUF", socket.SOL_SOCKET, 7, Family.ALL),
    Option("SO_RCVBUF", socket.SOL_SOCKET, 8, Family.ALL),
    Option("TCP_WINDOW_CLAMP", socket.IPPROTO_TCP, 10, Family.TCP),  # which a larger buffer would raise
    Option("SO_BUF_LOCK", socket.SOL_SOCKET, SO_BUF_LOCK, Family.ALL),
)
_BY_NAME = {option.name: option for option in TABLE}
_FORCED = {"SO_SNDBUF": SO_SNDBUFFORCE, "SO_RCVBUF": SO_RCVBUFFORCE}
#: Must be set before bind(2), or matter only then.
BEFORE_BIND = ("IPV6_V6ONLY", "SO_BINDTODEVICE", "IP_FREEBIND", "IPV6_FREEBIND", "IP_TRANSPARENT",
               "IPV6_TRANSPARENT", "SO_REUSEPORT", "IP_BIND_ADDRESS_NO_PORT")  # fmt: skip
_libc = ctypes.CDLL(None, use_errno=True)
_MISSING = {errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.ENOTCONN, errno.EINVAL, errno.ENODATA}


def kinds(family: int, kind: int, protocol: int) -> Family:
    """Which rows of the table a socket has."""
    if family == socket.AF_UNIX:
        return Family.UNIX
    if family == socket.AF_NETLINK:
        return Family.NETLINK
    if family == socket.AF_PACKET:
        return Family.PACKET
    base = Family.TCP if kind == socket.SOCK_STREAM else Family.RAW if kind == socket.SOCK_RAW else Family.UDP
    return base | Family.INET6 if family == socket.AF_INET6 else base


def _rows_of(which: Family) -> list[Option]:
    six = Family.INET6
    return [option for option in TABLE if option.of & which & ~six and (not option.of & six or which & six)]


def read_option(sock: socket.socket, option: Option) -> OptionValue:
    """One option as getsockopt(2) reports it."""
    if option.kind is Kind.INT:
        return sock.getsockopt(option.level, option.number)
    raw = sock.getsockopt(option.level, option.number, option.buffer)
    return raw.split(b"\0")[0] if option.kind is Kind.STRING else raw


def read_options(sock: socket.socket, which: Family) -> Options:
    """Every option of the table that the socket has; those which this kernel lacks are left out."""
    values: Options = {}
    for option in _rows_of(which):
        try:
            values[option.name] = read_option(sock, option)
        except OSError as error:
            if error.errno not in _MISSING:
                raise
    return values


class SocketMaker(Protocol):
    """Where fresh sockets come from: podtree.kernel.sockdiag.NetworkNamespace is one."""

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A new socket."""


class Defaults:
    """Reads what a program has set on sockets: the difference to a fresh socket of the same kind."""

    def __init__(self, namespace: SocketMaker) -> None:
        self._namespace = namespace
        self._fresh: dict[tuple[int, int, int], list[tuple[Option, OptionValue]]] = {}

    def changed(self, sock: socket.socket, family: int, kind: int, protocol: int, connected: bool) -> Options:
        """Options of `sock` that differ from a fresh socket's, as the kernel reports them.

        A TCP connection's buffers grow by themselves; they are kept too, with SO_BUF_LOCK telling that
        they may go on growing.
        """
        options: Options = {}
        plain, integer = sock.getsockopt, Kind.INT  # the hottest loop of a collection: some 80 times a socket
        for option, fresh in self._defaults(family, kind, protocol):
            value = plain(option[1], option[2]) if option[4] is integer else read_option(sock, option)
            if value != fresh and not (connected and option.unconnected_only):
                options[option.name] = value
        if "IP_TOS" in options or "IPV6_TCLASS" in options:  # setting those changes it
            options["SO_PRIORITY"] = read_option(sock, _BY_NAME["SO_PRIORITY"])
        return options

    def _defaults(self, family: int, kind: int, protocol: int) -> list[tuple[Option, OptionValue]]:
        key = (family, kind, protocol)
        if key not in self._fresh:
            with self._namespace.socket(*key) as fresh:
                values = read_options(fresh, kinds(*key))
            self._fresh[key] = [(_BY_NAME[name], value) for name, value in values.items()]
        return self._fresh[key]


def apply_options(sock: socket.socket, options: Options, what: str) -> None:
    """Set saved options; `what` names the socket in errors. SO_PEEK_OFF and the buffers come last."""
    unknown = options.keys() - _BY_NAME.keys()
    if unknown:
        raise Damaged(f"{what}: unknown socket options {', '.join(sorted(unknown))}")
    for option in TABLE:
        # Once bound, IPV6_V6ONLY can't be set any more, not even to what it is.
        if option.name in options and not _already(sock, option, options[option.name]):
            try:
                set_option(sock, option.name, options[option.name])
            except (OSError, TypeError, OverflowError) as error:
                raise RestoreFailed(f"{what}: cannot set {option.name} to {options[option.name]!r}: {error}") from error


def _already(sock: socket.socket, option: Option, value: OptionValue) -> bool:
    """MPTCP knows SO_BUF_LOCK, but doesn't let it be set."""
    return option.name in ("IPV6_V6ONLY", "SO_BUF_LOCK") and sock.getsockopt(option.level, option.number) == value


def set_option(sock: socket.socket, name: str, value: OptionValue) -> None:
    """Set one option to what getsockopt(2) reported."""
    option = _BY_NAME[name]
    if name in _FORCED:
        # The kernel doubles what it is given (socket(7)); forcing goes beyond net.core.{r,w}mem_max and sets
        # the lock that stops automatic tuning, which SO_BUF_LOCK then puts right.
        assert isinstance(value, int)
        locks = sock.getsockopt(socket.SOL_SOCKET, SO_BUF_LOCK)
        sock.setsockopt(socket.SOL_SOCKET, _FORCED[name], value // 2)
        with contextlib.suppress(OSError):  # MPTCP: it stays locked, as after any setting of the program's
            sock.setsockopt(socket.SOL_SOCKET, SO_BUF_LOCK, locks)
    elif option.kind is Kind.STRING:
        assert isinstance(value, bytes)
        sock.setsockopt(option.level, option.number, value + b"\0")
    else:
        sock.setsockopt(option.level, option.number, value)


def read_filter(sock: socket.socket) -> bytes | None:
    """The BPF program that filters what the socket receives (SO_ATTACH_FILTER), an array of struct sock_filter.

    b"" without one, None for one that can't be read back (SO_ATTACH_BPF).
    """
    # The length is one of instructions, not of bytes; 0 asks for it. Python can't pass that through.
    length = ctypes.c_uint(0)
    if _libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, SO_GET_FILTER, None, ctypes.byref(length)) < 0:
        return None if ctypes.get_errno() == errno.EACCES else b""
    program = ctypes.create_string_buffer(length.value * 8)
    if _libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, SO_GET_FILTER, program, ctypes.byref(length)) < 0:
        return None
    return program.raw
