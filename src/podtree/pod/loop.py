"""The supervisor's event loop, and framed connections on it. One thread; nothing here knows what a pod is.

A frame is 4 bytes of length (little endian), then msgpack.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import selectors
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import msgspec

Callback = Callable[[], object]
_LONGEST_FRAME = 64 << 20
_LONGEST_WAIT_S = 1e6  # epoll_wait(2) counts milliseconds in an int
HIGH_WATER = 1 << 20  # bytes that wait for a pod that doesn't read before who writes to it is paused


class Timer:
    """A call in the future, until it is cancelled."""

    def __init__(self, call: Callback) -> None:
        self.call: Callback | None = call

    @property
    def pending(self) -> bool:
        """Whether it is still to be called."""
        return self.call is not None

    def cancel(self) -> None:
        self.call = None


class Loop:
    """Calls back when a descriptor is ready or a time has come."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._watched: dict[int, tuple[Callback | None, Callback | None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._count = itertools.count()
        self._running = True

    def watch(self, fd: int, *, read: Callback | None = None, write: Callback | None = None) -> None:
        """Call `read` and `write` whenever `fd` is ready for it, in place of what was set before."""
        events = (selectors.EVENT_READ if read else 0) | (selectors.EVENT_WRITE if write else 0)
        known = fd in self._watched
        if not events:
            if known:
                self._selector.unregister(fd)
                del self._watched[fd]
            return
        if known:
            self._selector.modify(fd, events)
        else:
            self._selector.register(fd, events)
        self._watched[fd] = (read, write)

    def forget(self, fd: int) -> None:
        """Stop watching `fd`; before it is closed."""
        self.watch(fd)

    def later(self, seconds: float, call: Callback) -> Timer:
        """Call once, `seconds` from now."""
        timer = Timer(call)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._count), timer))
        return timer

    def stop(self) -> None:
        """Make run() return."""
        self._running = False

    def run(self) -> None:
        """Until stop()."""
        while self._running:
            self.step(None)

    def step(self, longest: float | None) -> None:
        """Wait for something, at most `longest` seconds, and handle what is ready."""
        if self._timers:
            until = min(max(0.0, self._timers[0][0] - time.monotonic()), _LONGEST_WAIT_S)
            longest = until if longest is None else min(longest, until)
        for key, events in self._selector.select(longest):
            for event in (selectors.EVENT_READ, selectors.EVENT_WRITE):
                # An earlier callback may have forgotten this descriptor.
                read, write = self._watched.get(key.fd, (None, None))
                call = read if event == selectors.EVENT_READ else write
                if events & event and call is not None:
                    call()
        while self._timers and self._timers[0][0] <= time.monotonic():
            timer = heapq.heappop(self._timers)[2]
            call, timer.call = timer.call, None
            if call is not None:
                call()


class Connection:
    """One peer of the control socket. Never blocks, never raises for what the peer does."""

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        on_message: Callable[[Connection, dict[str, Any]], None],
        on_close: Callable[[Connection], None],
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.closed = False
        self.on_drain: Callback | None = None
        self._loop = loop
        self._on_message = on_message
        self._on_close = on_close
        self._in = bytearray()
        self._out = bytearray()
        self._paused = False
        self._closing = False
        self._watch()

    @property
    def waiting(self) -> int:
        """Bytes that the peer hasn't taken yet."""
        return len(self._out)

    def send(self, message: dict[str, Any]) -> None:
        """Queue a frame."""
        if not self.closed:
            data = msgspec.msgpack.encode(message)
            self._out += struct.pack("<I", len(data)) + data
            self._flush()

    def pause(self, paused: bool) -> None:
        """Stop, or start again, to read what the peer sends."""
        if paused != self._paused and not self.closed:
            self._paused = paused
            self._watch()

    def close(self, *, flush: bool = False) -> None:
        """Close now, or once all was sent."""
        if self.closed:
            return
        if flush and self._out:
            self._closing = True
            return
        self.closed = True
        self._loop.forget(self.sock.fileno())
        self.sock.close()
        self._on_close(self)

    def _watch(self) -> None:
        read = None if self._paused else self._readable
        self._loop.watch(self.sock.fileno(), read=read, write=self._flush if self._out else None)

    def _readable(self) -> None:
        try:
            part = self.sock.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        if not part:
            self.close()
            return
        self._in += part
        while not self.closed and len(self._in) >= 4:
            (size,) = struct.unpack_from("<I", self._in)
            if size > _LONGEST_FRAME:
                self.close()
                return
            if len(self._in) < 4 + size:
                return
            data = bytes(self._in[4 : 4 + size])
            del self._in[: 4 + size]
            message = None
            with contextlib.suppress(msgspec.DecodeError):
                message = msgspec.msgpack.decode(data)
            if not isinstance(message, dict):
                self.close()
                return
            self._on_message(self, message)

    def _flush(self) -> None:
        try:
            while self._out:
                sent = self.sock.send(self._out)
                del self._out[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._out.clear()
            self.close()
            return
        if not self._out and self._closing:
            self.close()
            return
        self._watch()
        if self.on_drain is not None and not self._out:
            self.on_drain()
