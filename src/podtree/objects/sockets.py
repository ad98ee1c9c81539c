"""Sockets of every family: which module is responsible, and the order in which things happen.

All sockets of a pod are collected together and restored together, because a connection has two ends: what
one end sent and the other has not read belongs to the connection. A connection whose other end is not in
the pod is refused.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping

import msgspec

from podtree.errors import Damaged
from podtree.kernel import procfs
from podtree.kernel import sock as ksock
from podtree.kernel.namespaces import Clone, setns
from podtree.kernel.pidfd import pidfd_getfd, pidfd_open_living
from podtree.kernel.sockdiag import NetworkNamespace
from podtree.objects import netlink, raw, tcp, tcprestore, udp, udprestore, unix, unixoutside, unixrestore
from podtree.objects.context import CollectContext, FrozenProcess, RestoreContext
from podtree.objects.multicast import Groups
from podtree.objects.nesting import POD
from podtree.objects.socketcommon import Entry, Surroundings, make_entry
from podtree.objects.sockopts import Defaults

SocketState = (
    unix.UnixSocket | tcp.TcpSocket | udp.UdpSocket | raw.RawSocket | raw.PacketSocket | netlink.NetlinkSocket
)

_COLLECT: dict[str, Callable[[list[Entry], Surroundings], Mapping[int, SocketState]]] = {
    "tcp": tcp.collect,
    "unix": unix.collect,
    "udp": udp.collect,
    "raw": raw.collect,
    "packet": raw.collect_packet,
    "netlink": netlink.collect,
}

# The diagnosis socket stays open from checkpoint to checkpoint; a supervisor has one pod.
_namespace: NetworkNamespace | None = None


class SocketCollector:
    """Gathers the sockets of a frozen pod. `add` each open file description once, then `finish`.

    `passed` is told of each descriptor that is on its way in a queue (SCM_RIGHTS), as a duplicate in this process
    that becomes its own, with the process and the words that name it; it returns the file's id.
    """

    def __init__(self, ctx: CollectContext, passed: Callable[[int, FrozenProcess, str], int]) -> None:
        self._ctx = ctx
        self._passed = passed
        self._entries: list[Entry] = []

    def add(self, file_id: int, process: FrozenProcess, display: str, local_fd: int) -> None:
        """Note the socket behind `local_fd`, a duplicate in this process, which remains the caller's.

        `display` names it in refusals: "fd 7 (socket:[1234])".
        """
        entry = make_entry(file_id, process, display, local_fd)
        self._entries.append(entry)
        if entry.family == socket.AF_UNIX:
            for peeked in unix.peek(entry):
                where = f"descriptor on its way in {display}"
                entry.peeked.append((peeked, tuple(self._passed(fd, process, where) for fd in peeked.descriptors)))

    def finish(self) -> dict[int, SocketState]:
        """The states by file id; a socket that can't be saved is missing, and named in ctx.problems."""
        try:
            return self._collect() if self._entries else {}
        finally:
            for entry in self._entries:
                entry.sock.close()
            self._entries.clear()

    def _collect(self) -> dict[int, SocketState]:
        """One network namespace after the other: a connection from one to another is refused as one to the outside."""
        init = _init_of(self._ctx.processes).living
        left = {entry.file_id: entry for entry in self._entries}
        elsewhere = self._ctx.networks.items()
        spaces = {POD: (_network_namespace(init), init), **{n: (NetworkNamespace(pid), pid) for n, pid in elsewhere}}
        states: dict[int, SocketState] = {}
        try:
            known = {namespace.diag.cookie for namespace, _ in spaces.values()}
            for space, (namespace, host_pid) in spaces.items():
                found = self._collect_in(namespace, host_pid, left, known)
                states |= {i: msgspec.structs.replace(s, space=space) if space else s for i, s in found.items()}
        finally:
            for space, (namespace, _) in spaces.items():
                if space != POD:
                    namespace.close()
        self._refuse_passing_ahead(states)
        return states

    def _refuse_passing_ahead(self, states: dict[int, SocketState]) -> None:
        """A restore makes one namespace's sockets after the other's: none can be in a queue before it is there."""
        for entry in self._entries:
            passed = [states[i].space for _, ids in entry.peeked for i in ids if i in states]
            if entry.file_id in states and passed and max(passed) > states[entry.file_id].space:
                reason = "a socket of another network namespace is on its way in its queue"
                self._ctx.refuse(entry.process, entry.display, reason, "it passes by itself: try again")

    def _collect_in(
        self, namespace: NetworkNamespace, host_pid: int, left: dict[int, Entry], known: set[int]
    ) -> dict[int, SocketState]:
        """Those of one namespace, which are taken out of `left`; `host_pid` is in it. Those of none that is `known`
        are looked at with those of the pod's own, which is the first."""
        own = namespace.diag.cookie
        entries = [e for e in left.values() if (cookie := ksock.netns_cookie(e.sock)) == own or cookie not in known]
        if not entries:
            return {}
        for entry in entries:
            del left[entry.file_id]
        around = Surroundings(self._ctx, namespace, Defaults(namespace), Groups(host_pid))
        around.by_ino = {entry.ino: entry for entry in entries}
        families: dict[str, list[Entry]] = {family: [] for family in _COLLECT}
        for entry in entries:
            responsible = self._sort(entry, around)
            if responsible:
                families[responsible].append(entry)
        states: dict[int, SocketState] = {}
        for family, entries in families.items():
            try:
                states.update(_COLLECT[family](entries, around))
            except OSError as error:
                around.refuse(entries[0], f"{family} sockets can't be read: {error}")
        if groups := around.groups.unaccounted():
            reason = "are joined in the pod, and not by a socket that can be saved"
            self._ctx.refuse(None, f"multicast groups {', '.join(groups)}", reason)
        return states

    def _sort(self, entry: Entry, around: Surroundings) -> str:
        """Which module saves the socket; "" after refusing it."""
        strange = ksock.netns_cookie(entry.sock) != around.namespace.diag.cookie
        if strange and unixoutside.settle_strange(entry, around) == "refuse":
            return ""
        match entry.family, entry.type, entry.protocol:
            case (socket.AF_UNIX, _, _):
                return "unix"
            case (socket.AF_INET | socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP | tcp.IPPROTO_MPTCP):
                responsible = "tcp"
            case (socket.AF_INET | socket.AF_INET6, socket.SOCK_DGRAM, socket.IPPROTO_UDP | udp.IPPROTO_UDPLITE):
                responsible = "udp"
            case (socket.AF_INET | socket.AF_INET6, socket.SOCK_RAW, _):
                responsible = "raw"
            case (socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_DGRAM, _):
                responsible = "packet"
            case (socket.AF_NETLINK, _, _):
                responsible = "netlink"
            case _:
                around.refuse(entry, _unsupported(entry))
                return ""
        return responsible


def _unsupported(entry: Entry) -> str:
    if entry.protocol in (socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6):
        return "an ICMP socket can't be saved"
    try:
        family = socket.AddressFamily(entry.family).name
    except ValueError:
        family = str(entry.family)
    return f"sockets of this family (family {family}, type {entry.type}, protocol {entry.protocol}) can't be saved"


def _init_of(processes: list[FrozenProcess]) -> FrozenProcess:
    return next((process for process in processes if process.pid == 1), processes[0])


def _network_namespace(host_pid: int) -> NetworkNamespace:
    global _namespace
    ino = os.stat(f"/proc/{host_pid}/ns/net").st_ino  # not reused while _namespace keeps it alive
    if _namespace is None or _namespace.ino != ino:
        if _namespace is not None:
            _namespace.close()
        _namespace = NetworkNamespace(host_pid)
    return _namespace


def forget_namespace() -> None:
    """Close what is kept from checkpoint to checkpoint (the pod ended, or this process was forked)."""
    global _namespace
    if _namespace is not None:
        _namespace.close()
        _namespace = None


def restore_sockets(
    states: dict[int, SocketState], ctx: RestoreContext, others: Callable[[int], int]
) -> dict[int, int]:
    """Make all sockets of a pod, in the builder: in the pod's mount namespace, as root, / its root; first those of
    its own net namespace, in which the builder is. One that passes a socket of another can only be of that.

    `others` gives the descriptor of an open file that is no socket, by its id: it may be on its way in a queue.
    Returns a close-on-exec descriptor for each file id. O_NONBLOCK and the other file flags are the
    caller's to set. Everything is connected to the pod's other sockets, with its queues filled, before it
    returns. Raises RestoreFailed or Damaged.
    """
    found: dict[int, int] = {}

    def file(number: int) -> int:
        return found[number] if number in found else others(number)

    for space in sorted({state.space for state in states.values()}):
        own = {i: state for i, state in states.items() if state.space == space}
        with _in_network(space, ctx):
            found |= _restore_in_one(own, file)
    return found


@contextlib.contextmanager
def _in_network(space: int, ctx: RestoreContext) -> Iterator[None]:
    """Scope in which the builder is in one of the net namespaces that programs had made; 0: in the pod's, as always."""
    if space == 0:
        yield
        return
    if space not in ctx.networks:
        raise Damaged(f"the image has a socket in network namespace {space}, which is not in it")
    home = os.open("self/ns/net", os.O_RDONLY | os.O_CLOEXEC, dir_fd=ctx.host_proc_fd)
    away = os.open(f"{ctx.networks[space]}/ns/net", os.O_RDONLY | os.O_CLOEXEC, dir_fd=ctx.host_proc_fd)
    try:
        setns(away, Clone.NEWNET)
        yield
    finally:
        setns(home, Clone.NEWNET)
        os.close(home)
        os.close(away)


def _restore_in_one(
    states: dict[int, SocketState], others: Callable[[int], int]
) -> dict[int, int]:
    """The sockets of the net namespace that the caller is in."""
    made: dict[int, socket.socket] = {}
    made |= tcprestore.restore({i: s for i, s in states.items() if isinstance(s, tcp.TcpSocket)})
    made |= udprestore.restore({i: s for i, s in states.items() if isinstance(s, udp.UdpSocket)})
    made |= raw.restore({i: s for i, s in states.items() if isinstance(s, raw.RawSocket | raw.PacketSocket)})
    made |= netlink.restore({i: s for i, s in states.items() if isinstance(s, netlink.NetlinkSocket)})

    def file(number: int) -> int:
        return made[number].fileno() if number in made else others(number)

    made |= unixrestore.restore({i: s for i, s in states.items() if isinstance(s, unix.UnixSocket)}, file)
    return {file_id: sock.detach() for file_id, sock in made.items()}


def recover(pids: list[int]) -> None:
    """Put right what a killed checkpointer may have left on the pod's sockets; the pod may be running.

    `pids`: host pids of all its processes. A socket in TCP_REPAIR mode leaves it, and a peek offset (-1
    unless a program looks into queues with SO_PEEK_OFF) goes back to -1 where messages are queued. For a
    socket found in repair mode SO_REUSEADDR is not known any more and is set, as servers do.
    """
    for pid in pids:
        try:
            tid = procfs.living_thread(pid)
            numbers = [int(name) for name in os.listdir(f"/proc/{tid}/fd")]
            pidfd = pidfd_open_living(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
        try:
            for number in numbers:
                _recover_fd(tid, pidfd, number)
        finally:
            os.close(pidfd)


def _recover_fd(pid: int, pidfd: int, number: int) -> None:
    try:
        if not os.readlink(f"/proc/{pid}/fd/{number}").startswith("socket:"):
            return
        fd = pidfd_getfd(pidfd, number)
    except (FileNotFoundError, ProcessLookupError):
        return
    except OSError:  # EBADF: closed meanwhile
        return
    with ksock.adopt(fd) as sock:
        tcp_like = sock.family in (socket.AF_INET, socket.AF_INET6) and sock.proto == socket.IPPROTO_TCP
        if tcp_like:
            if ksock.in_repair(sock):
                ksock.leave_repair(sock, 1)
        elif sock.family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6) and (
            sock.getsockopt(socket.SOL_SOCKET, ksock.SO_PEEK_OFF) >= 0 and ksock.events(fd) & 1
        ):
            sock.setsockopt(socket.SOL_SOCKET, ksock.SO_PEEK_OFF, -1)
