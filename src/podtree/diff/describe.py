"""An open file in a few words: its kind, what tells it apart, and what waits in it."""

from __future__ import annotations

from typing import Any

import msgspec

from podtree.objects.descriptors import OpenFile
from podtree.objects.epoll import Epoll
from podtree.objects.eventfd import EventFd
from podtree.objects.held import path_bytes
from podtree.objects.inet import Address
from podtree.objects.kinds import FileState
from podtree.objects.pipes import Pipe, StdioPipe
from podtree.objects.tcp import TcpSocket
from podtree.objects.timerfd import TimerFd
from podtree.objects.udp import UdpSocket
from podtree.objects.unix import UnixSocket

_TELLING = ("path", "name", "index", "protocol", "mask")  # fields that tell one object of a kind from another


def open_file(file: OpenFile) -> str:
    """Such as "file /srv/data @52", "pipe, 5 bytes wait"."""
    text = _state(file.what)
    return f"{text} @{file.pos}" if file.pos else text


def _state(what: FileState) -> str:
    match what:
        case Pipe():
            return _waiting(f"pipe {_path(what.path)}".rstrip(), sum(len(chunk.data) for chunk in what.chunks))
        case StdioPipe():
            return _waiting(f"stdio {what.index % 3}", sum(len(chunk.data) for chunk in what.chunks))
        case EventFd():
            return f"eventfd, count {what.count}"
        case TimerFd():
            return f"timerfd, {what.ticks} ticks" if what.remaining or what.ticks else "timerfd"
        case Epoll():
            return f"epoll, {len(what.watches)} watched"
        case UnixSocket():
            own = what.name.removeprefix(b"\0").decode(errors="backslashreplace") or "without a name"
            state = "listening" if what.listening else "connected" if what.connected else "unconnected"
            return _waiting(f"unix socket {own}, {state}", sum(len(message.data) for message in what.queue))
        case TcpSocket():
            ends = _ends("tcp", what.local, what.remote)
            return _waiting(f"{ends}, {what.role}", len(what.incoming) + len(what.outgoing))
        case UdpSocket():
            return _waiting(_ends("udp", what.local, what.remote), sum(len(one.data) for one in what.queue))
    return _generic(what)


def _generic(what: FileState) -> str:
    data: dict[str, Any] = msgspec.to_builtins(what)
    kind = str(data.pop("type", type(what).__name__)).replace("_", " ")
    for name in _TELLING:
        if data.get(name) not in (None, ""):
            return f"{kind} {_path(data[name]) if name == 'path' else data[name]}"
    return kind


def _path(path: str) -> str:
    """A path as a manifest has it, in characters that can be shown."""
    return path_bytes(path).decode(errors="backslashreplace") if path else ""


def _ends(kind: str, local: Address, remote: Address | None) -> str:
    return f"{kind} {local.host}:{local.port}" + (f" - {remote.host}:{remote.port}" if remote else "")


def _waiting(text: str, count: int) -> str:
    return f"{text}, {count} bytes wait" if count else text
