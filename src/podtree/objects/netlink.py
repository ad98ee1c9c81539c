"""Netlink sockets that are idle: bound, member of groups, with nothing to read. Source: netlink(7).

What the kernel knows of such a socket is its address and its options, so it is simply made again. A request
under way, or answers not read, would have to be asked for again by the program: they are refused.
"""

from __future__ import annotations

import socket

from podtree.errors import Damaged, RestoreFailed
from podtree.kernel import sock as ksock
from podtree.objects.socketcommon import RETRY, Entry, SocketBase, Surroundings, finish
from podtree.objects.sockopts import SOL_NETLINK

NETLINK_ADD_MEMBERSHIP = 1
NETLINK_LIST_MEMBERSHIPS = 9
MAX_GROUPS = 1024
# Those where the kernel binds nothing to a socket but its groups. Not so: NETLINK_NETFILTER (queues and logs),
# NETLINK_CONNECTOR (a filter of events). Of NETLINK_AUDIT's daemon it does, but none can run in a pod.
PROTOCOLS = {
    0: "NETLINK_ROUTE",
    2: "NETLINK_USERSOCK",
    4: "NETLINK_SOCK_DIAG",
    6: "NETLINK_XFRM",
    7: "NETLINK_SELINUX",
    9: "NETLINK_AUDIT",
    10: "NETLINK_FIB_LOOKUP",
    15: "NETLINK_KOBJECT_UEVENT",
    16: "NETLINK_GENERIC",
    21: "NETLINK_CRYPTO",
}


class NetlinkSocket(SocketBase, frozen=True, kw_only=True, tag="netlink"):
    """One netlink socket."""

    protocol: int
    port_id: int = 0  # 0: not bound
    groups: tuple[int, ...] = ()  # numbers, from 1
    peer: tuple[int, int] = (0, 0)  # of connect(2): port id, mask of groups


def collect(entries: list[Entry], around: Surroundings) -> dict[int, NetlinkSocket]:
    """States of these sockets by file id."""
    if not entries:
        return {}
    known = around.namespace.diag.netlink()
    states = {}
    for entry in entries:
        diag = known.get(entry.ino)
        if entry.protocol not in PROTOCOLS:
            around.refuse(entry, f"a netlink socket of protocol {entry.protocol} can't be saved")
        elif ksock.events(entry.sock.fileno()) & 0x9 or (diag and diag.dump_running):  # POLLIN, POLLERR
            around.refuse(entry, f"{PROTOCOLS[entry.protocol]} answers wait to be read", RETRY)
        else:
            states[entry.file_id] = _collect(entry, around)
    return states


def _collect(entry: Entry, around: Surroundings) -> NetlinkSocket:
    mask = entry.sock.getsockopt(SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, MAX_GROUPS // 8)
    bits = int.from_bytes(mask, "little")
    return NetlinkSocket(
        **entry.base(around),  # type: ignore[arg-type]
        protocol=entry.protocol,
        port_id=entry.sock.getsockname()[0],
        groups=tuple(bit + 1 for bit in range(bits.bit_length()) if bits >> bit & 1),
        peer=entry.sock.getpeername(),
    )


def restore(states: dict[int, NetlinkSocket]) -> dict[int, socket.socket]:
    """All netlink sockets of a pod by file id, in this network namespace."""
    made: dict[int, socket.socket] = {}
    try:
        for file_id, state in states.items():
            if state.protocol not in PROTOCOLS or state.socktype not in (socket.SOCK_RAW, socket.SOCK_DGRAM):
                raise Damaged(f"a netlink socket of type {state.socktype} and protocol {state.protocol}")
            made[file_id] = sock = socket.socket(socket.AF_NETLINK, state.socktype, state.protocol)
            if state.port_id:
                sock.bind((state.port_id, 0))
            for group in state.groups:
                sock.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
            if any(state.peer):
                sock.connect(state.peer)
            finish(sock, state, f"netlink socket {state.port_id}")
    except OSError as error:
        for sock in made.values():
            sock.close()
        raise RestoreFailed(f"netlink sockets: {error}") from error
    return made
