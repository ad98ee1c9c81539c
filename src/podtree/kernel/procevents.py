"""The process connector: the kernel tells of processes that end with an error.

linux/cn_proc.h, linux/connector.h; drivers/connector/cn_proc.c (Linux 6.18). PROC_EVENT_NONZERO_EXIT, which nothing but
such ends gets through, came with Linux 6.6. The kernel listens to the initial pid and user namespaces only.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

NETLINK_CONNECTOR = 11  # linux/netlink.h
_CN_IDX_PROC = _CN_VAL_PROC = 1
_LISTEN = 1  # PROC_CN_MCAST_LISTEN
_EXIT, _NONZERO_EXIT = 0x80000000, 0x20000000
_NLMSG_DONE = 3
_HEADERS = struct.Struct("=IHHII IIIIHH")  # struct nlmsghdr, struct cn_msg
_INPUT = struct.Struct("=II")  # struct proc_input
_EVENT = struct.Struct("=IIQ IIIIII")  # struct proc_event with exit_proc_event
_BUFFER = 1 << 16


@dataclass(frozen=True, slots=True)
class ErrorExit:
    """A process that ended with an error; host pids. `status`: as wait(2) gives it."""

    pid: int
    parent: int
    status: int


def listen() -> socket.socket:
    """A nonblocking socket on which such events come. Raises OSError."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, NETLINK_CONNECTOR)
    try:
        sock.bind((0, _CN_IDX_PROC))
        wanted = _INPUT.pack(_LISTEN, _NONZERO_EXIT)
        size = _HEADERS.size + len(wanted)
        head = _HEADERS.pack(size, _NLMSG_DONE, 0, 0, 0, _CN_IDX_PROC, _CN_VAL_PROC, 0, 0, len(wanted), 0)
        sock.send(head + wanted)
    except BaseException:
        sock.close()
        raise
    return sock


def read(sock: socket.socket) -> Iterator[ErrorExit]:
    """What has come. Events that came too fast are lost (ENOBUFS)."""
    with contextlib.suppress(BlockingIOError):
        while True:
            try:
                data = sock.recv(_BUFFER)
            except BlockingIOError:
                return
            except OSError:
                continue
            if len(data) < _HEADERS.size + _EVENT.size:
                continue
            what, _cpu, _time, tid, pid, status, _signal, _ppid, parent = _EVENT.unpack_from(data, _HEADERS.size)
            if what == _EXIT and tid == pid and status:
                yield ErrorExit(pid, parent, status)
