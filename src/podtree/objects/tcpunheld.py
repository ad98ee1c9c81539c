"""Ends of TCP connections that no process holds: waiting for accept(2), or closed with data still under way.

The kernel's socket diagnosis lists them, with the lengths of their queues; what is in those only its memory
shows (podtree.kernel.sockmem). Where that can't be read, such an end can be saved only if nothing is in it.
"""

from __future__ import annotations

import socket

from podtree.kernel.sock import TcpState
from podtree.kernel.sockdiag import DiagSocket, InetDiag
from podtree.kernel.sockmem import SocketMemory, TcpEnd
from podtree.objects import insight
from podtree.objects.inet import Address, Key, pack

HALF_MADE = (TcpState.SYN_RECV, TcpState.NEW_SYN_RECV)
UNACCEPTED = (TcpState.ESTABLISHED, TcpState.CLOSE_WAIT)
ORPHANS = (TcpState.FIN_WAIT1, TcpState.FIN_WAIT2, TcpState.CLOSING, TcpState.LAST_ACK, TcpState.TIME_WAIT)


class Unheld:
    """What is known of such ends in one network namespace; `fd`: a TCP socket there."""

    def __init__(self, diag: DiagSocket, fd: int) -> None:
        self._diag = diag
        self._fd = fd
        self._ends: dict[tuple[bytes, int, bytes, int], int] | None = None

    @property
    def memory(self) -> SocketMemory | None:
        """None where kernel memory can't be read, or not yet."""
        return insight.sockets()

    def lookup(self, family: int, local: Address, remote: Address) -> InetDiag | None:
        """The end at `local` of a connection with `remote`, by the socket diagnosis."""
        here, there = (pack(family, local.host), local.port), (pack(family, remote.host), remote.port)
        found = self._diag.inet_lookup(family, socket.IPPROTO_TCP, here, there)
        if found is None or found.state == TcpState.LISTEN or found.remote[1] != remote.port:
            return None
        return found

    def unaccepted(self, family: int) -> list[InetDiag]:
        """All ends of an address family that have no descriptor and may be waiting for accept(2)."""
        mask = sum(1 << state for state in UNACCEPTED)
        return [found for found in self._diag.inet(family, socket.IPPROTO_TCP, mask) if not found.ino]

    def end(self, local: Key, remote: Key) -> TcpEnd | None:
        """Such an end with what is in its queues; None if it is gone. Kernel memory must be open."""
        assert self.memory is not None
        if self._ends is None:
            self._ends = self.memory.tcp_sockets(self._fd)
        address = self._ends.get((*local, *remote))
        return self.memory.tcp_end(address) if address else None
