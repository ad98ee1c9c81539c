"""What a network namespace holds beside sockets, in a form that two of them can be compared by.

Dumps of rtnetlink(7), netfilter and xfrm, without counters and ages, and the settings below /proc/sys/net.
Source: include/uapi/linux/{rtnetlink,if_link,if_addr,neighbour,xfrm}.h, linux/netfilter/{nfnetlink,nf_tables}.h.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator

from podtree.kernel.namespaces import IFF_UP

NETLINK_ROUTE, NETLINK_XFRM, NETLINK_NETFILTER = 0, 6, 12
NLM_F_REQUEST, NLM_F_DUMP = 0x1, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
RTM_NEWLINK = 16
NUD_PERMANENT = 0x80
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_LOOPBACK = 1  # its index in every namespace

#: name for people -> protocol, type of the request, its body, length of the answers' fixed part, volatile attributes
_DUMPS: dict[str, tuple[int, int, bytes, int, frozenset[int]]] = {
    # IFLA_STATS, _STATS64, _AF_SPEC (counters; what can be set is below /proc/sys/net)
    "links": (NETLINK_ROUTE, 18, bytes(16), 16, frozenset({7, 23, 26})),
    "addresses": (NETLINK_ROUTE, 22, bytes(8), 8, frozenset({6})),  # IFA_CACHEINFO
    "routes": (NETLINK_ROUTE, 26, bytes(12), 12, frozenset({12})),  # RTA_CACHEINFO
    "neighbours": (NETLINK_ROUTE, 30, bytes(12), 12, frozenset({3})),  # NDA_CACHEINFO
    "routing rules": (NETLINK_ROUTE, 34, bytes(12), 12, frozenset()),
    "queueing disciplines": (NETLINK_ROUTE, 38, bytes(20), 20, frozenset({3, 7})),  # TCA_STATS, TCA_STATS2
    "next hops": (NETLINK_ROUTE, 106, bytes(8), 8, frozenset()),
    "nftables": (NETLINK_NETFILTER, 10 << 8 | 1, bytes(4), 4, frozenset()),  # NFT_MSG_GETTABLE
    "IPsec associations": (NETLINK_XFRM, 0x12, b"", 0, frozenset()),  # XFRM_MSG_GETSA
    "IPsec policies": (NETLINK_XFRM, 0x15, b"", 0, frozenset()),  # XFRM_MSG_GETPOLICY
}
_TABLES = ("ip_tables_names", "ip6_tables_names", "arp_tables_names", "ip_vs")

_COUNTERS = ("nf_conntrack_count", "fib_multipath_hash_seed")  # settings that aren't

SETTINGS = "settings (sysctl)"

State = dict[str, frozenset[bytes]]


def look() -> tuple[bool, State]:
    """Whether the loopback of the calling thread's network namespace is up, and what else there is in it."""
    state: State = {}
    up = False
    for name, (protocol, kind, body, fixed, volatile) in _DUMPS.items():
        found = set()
        for answer, payload in _dump(protocol, kind, body):
            if answer == RTM_NEWLINK and protocol == NETLINK_ROUTE:
                index, flags = struct.unpack_from("=iI", payload, 4)
                up = up or (index == _LOOPBACK and bool(flags & IFF_UP))
            if name == "neighbours" and not struct.unpack_from("=H", payload, 8)[0] & NUD_PERMANENT:
                continue
            found.add(payload[:fixed] + b"".join(_attributes(payload, fixed, volatile)))
        state[name] = frozenset(found)
    for name in _TABLES:
        with contextlib.suppress(FileNotFoundError), open(f"/proc/thread-self/net/{name}", "rb") as file:
            state[name] = frozenset({file.read()}) - {b""}
    settings = sysctls("/proc/sys/net")
    state[SETTINGS] = frozenset(path.encode() + b"=" + value for path, value in settings.items())
    return up, state


def differences(state: State, fresh: State) -> list[str]:
    """What is not as in a new namespace of the host, for people.

    One that belongs to another user namespace doesn't show all settings; those nobody has changed in it.
    """
    none: frozenset[bytes] = frozenset()
    found = {name for name in state.keys() | fresh.keys() if state.get(name, none) != fresh.get(name, none)}
    if state[SETTINGS] <= fresh[SETTINGS]:
        found.discard(SETTINGS)
    return sorted(found)


def sysctls(top: str, names: tuple[str, ...] | None = None) -> dict[str, bytes]:
    """The settings below a directory of /proc/sys that can be read; with `names` only these, right in it."""
    found = {}
    for directory, _, files in os.walk(top):
        for name in files if names is None else names:
            path = f"{directory}/{name}"
            if name in _COUNTERS:
                continue
            with contextlib.suppress(OSError), open(path, "rb") as file:
                found[path] = file.read()
        if names is not None:
            break
    return found


def _dump(protocol: int, kind: int, body: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, payload) of all answers; nothing where the kernel doesn't know the protocol or the request."""
    try:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    except OSError:
        return
    with sock:
        sock.send(_HEADER.pack(_HEADER.size + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, 1, 0) + body)
        while True:
            data = sock.recv(1 << 18)
            at = 0
            while at + _HEADER.size <= len(data):
                length, answer, _, _, _ = _HEADER.unpack_from(data, at)
                if answer in (NLMSG_DONE, NLMSG_ERROR):
                    return
                yield answer, data[at + _HEADER.size : at + length]
                at += (length + 3) & ~3


def _attributes(payload: bytes, at: int, volatile: frozenset[int]) -> Iterator[bytes]:
    """The attributes behind the fixed part, but for those that change by themselves."""
    while at + 4 <= len(payload):
        length, kind = struct.unpack_from("=HH", payload, at)
        if length < 4:
            return
        if kind & 0x3FFF not in volatile:
            yield payload[at : at + length]
        at += (length + 3) & ~3
