"""Raw IP and packet sockets that are idle: with nothing to read. Source: raw(7), packet(7).

What waits in such a socket can't be sent again to it alone: every other one, and the kernel itself, would hear it.
"""

from __future__ import annotations

import os
import socket
import struct

import msgspec

from podtree.errors import Damaged, RestoreFailed
from podtree.kernel import procfs
from podtree.kernel import sock as ksock
from podtree.kernel.namespaces import loopback_up
from podtree.kernel.sockdiag import PacketDiag
from podtree.objects import multicast
from podtree.objects.inet import Address, local_address
from podtree.objects.multicast import Membership
from podtree.objects.socketcommon import RETRY, Entry, SocketBase, Surroundings, finish
from podtree.objects.sockopts import BEFORE_BIND, SOL_PACKET, set_option

PACKET_ADD_MEMBERSHIP = 1
PACKET_TYPES = (socket.SOCK_RAW, socket.SOCK_DGRAM)
MAX_COUNT = 1000
POLLIN, POLLERR = 0x1, 0x8


class RawSocket(SocketBase, frozen=True, kw_only=True, tag="raw"):
    """One raw IP socket."""

    family: int
    protocol: int
    local: Address
    remote: Address | None = None
    memberships: tuple[Membership, ...] = ()


class Listener(msgspec.Struct, frozen=True):
    """PACKET_ADD_MEMBERSHIP: what an interface is to let through besides its own, `count` times asked for."""

    interface: int
    kind: int  # PACKET_MR_*
    address: bytes
    count: int


class PacketSocket(SocketBase, frozen=True, kw_only=True, tag="packet"):
    """One packet socket."""

    protocol: int  # ETH_P_*
    interface: str = ""  # "": of all
    listeners: tuple[Listener, ...] = ()


def _idle(entry: Entry, around: Surroundings) -> bool:
    """Whether nothing waits; refuses it otherwise."""
    events = ksock.events(entry.sock.fileno())
    if events & (POLLIN | POLLERR):
        around.refuse(entry, "packets or an error wait to be read: they can't be sent again to it alone", RETRY)
    elif ksock.unsent(entry.sock.fileno()):
        around.refuse(entry, "a packet is not sent yet", RETRY)
    else:
        return True
    return False


def collect(entries: list[Entry], around: Surroundings) -> dict[int, RawSocket]:
    """States of these raw sockets by file id."""
    peers = _peers(entries[0].process.living) if entries else {}
    return {
        entry.file_id: RawSocket(
            **entry.base(around),  # type: ignore[arg-type]
            family=entry.family,
            protocol=entry.protocol,
            local=local_address(entry.sock),
            remote=peers.get(entry.ino),
            memberships=around.groups.of(entry.sock),
        )
        for entry in entries
        if _idle(entry, around)
    }


def _peers(host_pid: int) -> dict[int, Address]:
    """By inode number: whom raw sockets are connected to. getpeername(2) tells only those with a port."""
    found = {}
    for name, family in (("raw", socket.AF_INET), ("raw6", socket.AF_INET6)):
        path = f"/proc/{host_pid}/net/{name}"
        for line in procfs.read_text(path).splitlines()[1:] if os.path.exists(path) else []:
            words = line.split()
            host, port = words[2].split(":")
            packed = struct.pack(f"={len(host) // 8}I", *(int(host[at : at + 8], 16) for at in range(0, len(host), 8)))
            if any(packed):
                found[int(words[9])] = Address(socket.inet_ntop(family, packed), int(port, 16))
    return found


def collect_packet(entries: list[Entry], around: Surroundings) -> dict[int, PacketSocket]:
    """States of these packet sockets by file id."""
    if not entries:
        return {}
    known = around.namespace.diag.packet()
    states = {}
    for entry in entries:
        diag = known.get(entry.ino)
        if diag is None:
            around.refuse(entry, "a packet socket that the kernel's socket diagnosis does not list")
        elif any(count > MAX_COUNT for *_, count in diag.listeners):
            around.refuse(entry, f"a packet socket that asked more than {MAX_COUNT} times for the same")
        elif diag.ring or diag.fanout:
            what = "a ring" if diag.ring else "a fan-out group"
            around.refuse(entry, f"a packet socket with {what} can't be saved", "end the program that captures packets")
        elif _idle(entry, around):
            states[entry.file_id] = _packet(entry, around, diag)
    return states


def _packet(entry: Entry, around: Surroundings, diag: PacketDiag) -> PacketSocket:
    return PacketSocket(
        **entry.base(around),  # type: ignore[arg-type]
        protocol=entry.sock.getsockname()[1],
        interface=entry.sock.getsockname()[0],
        listeners=tuple(Listener(*one) for one in diag.listeners),
    )


# --- restore -----------------------------------------------------------------------------------------


def restore(states: dict[int, RawSocket | PacketSocket]) -> dict[int, socket.socket]:
    """All raw and packet sockets of a pod by file id; the caller is in the pod's network namespace.

    The last of all sockets, or they would hear how others are restored.
    """
    if not states:
        return {}
    loopback_up()
    made: dict[int, socket.socket] = {}
    try:
        for file_id, state in states.items():
            made[file_id] = sock = _raw(state) if isinstance(state, RawSocket) else _captured(state)
            finish(sock, state, "raw socket" if isinstance(state, RawSocket) else "packet socket")
    except BaseException as error:
        for sock in made.values():
            sock.close()
        if isinstance(error, OSError):
            raise RestoreFailed(f"raw sockets: {error}") from error
        raise
    return made


def _raw(state: RawSocket) -> socket.socket:
    if state.family not in (socket.AF_INET, socket.AF_INET6):
        raise Damaged(f"raw socket of family {state.family}")
    sock = socket.socket(state.family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, state.protocol)
    os.fchown(sock.fileno(), state.uid, state.gid)
    for name in BEFORE_BIND:
        if name in state.options:
            set_option(sock, name, state.options[name])
    if state.local.host not in ("0.0.0.0", "::"):
        sock.bind(Address(state.local.host, 0, state.local.flow, state.local.scope).raw(state.family))
    if state.remote is not None:
        sock.connect(state.remote.raw(state.family))
    multicast.join(sock, state.memberships)
    return sock


def _captured(state: PacketSocket) -> socket.socket:
    kind = state.socktype | socket.SOCK_CLOEXEC
    if not 0 <= state.protocol < 1 << 16 or state.socktype not in PACKET_TYPES or "\0" in state.interface:
        raise Damaged(f"packet socket of type {state.socktype}, protocol {state.protocol}")
    if state.interface:
        sock = socket.socket(socket.AF_PACKET, kind, 0)
        sock.bind((state.interface, state.protocol))
    else:
        sock = socket.socket(socket.AF_PACKET, kind, socket.htons(state.protocol))
    for one in state.listeners:
        if len(one.address) > 8 or one.interface >> 31 or one.kind >> 16 or not 0 < one.count <= MAX_COUNT:
            raise Damaged("a packet socket that listens for an impossible address")
        request = struct.pack("=iHH8s", one.interface, one.kind, len(one.address), one.address)
        for _ in range(one.count):
            sock.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, request)
    return sock
