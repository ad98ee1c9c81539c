"""Between a process tree's stdio and whoever is attached to it; what comes out goes to the log as well.

A client that doesn't read makes the pod's output wait, a pod that doesn't read makes its clients wait.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable

from podtree.kernel import tty
from podtree.pod.live import StdioEnds
from podtree.pod.loop import HIGH_WATER, Connection, Loop, Timer

_CHUNK = 1 << 16
_REDRAW_S = 0.05  # long enough for a program to look at its window's size


class Stdio:
    """The supervisor's side of one set of StdioEnds, whose descriptors it closes at the end."""

    def __init__(
        self, loop: Loop, ends: StdioEnds, log_fd: int | None, on_closed: Callable[[], None]
    ) -> None:
        """`log_fd` is closed with the rest; `on_closed` is called when some of `ends` were closed early."""
        self.ends = ends
        self.clients: list[Connection] = []
        self._loop = loop
        self._log_fd = log_fd
        self._on_closed = on_closed
        self._input = bytearray()
        self._end_of_input = False
        self._held = False
        self._resize_back: Timer | None = None
        self._sources: dict[int, int] = {}  # read end or master: 1 for stdout (and a terminal), 2 for stderr
        for fd in ends.fds():
            os.set_blocking(fd, False)
        if ends.console is not None:
            self._sources[ends.console] = 1
        for number, source in enumerate(ends.pipes):
            if source is not None and number > 0:
                self._sources[source] = number
        self._watch()

    @property
    def stdin(self) -> int | None:
        """Where input goes."""
        return self.ends.console if self.ends.mode == "tty" else self.ends.pipes[0]

    def attach(self, client: Connection, size: tuple[int, int] | None) -> None:
        """Send everything that comes out from now on to `client`."""
        self.clients.append(client)
        client.on_drain = self._watch
        if size:
            rows, columns = size
            if self.ends.console is not None and tty.get_size(self.ends.console) == (rows, columns):
                self.resize(rows, columns + 1)  # a change makes a full-screen program draw anew
                self._resize_back = self._loop.later(_REDRAW_S, functools.partial(self.resize, rows, columns))
            else:
                self.resize(rows, columns)

    def detach(self, client: Connection) -> None:
        """The reverse."""
        if client in self.clients:
            self.clients.remove(client)
            client.on_drain = None
            self._watch()

    def hold(self, held: bool) -> None:
        """Let what comes out wait in the pod, or not any more."""
        self._held = held
        self._watch()

    def resize(self, rows: int, columns: int) -> None:
        """Tell the terminal its size; no terminal: nothing."""
        if self._resize_back is not None:
            self._resize_back.cancel()
            self._resize_back = None
        if self.ends.console is not None and 0 < rows < 1 << 16 and 0 < columns < 1 << 16:
            tty.set_size(self.ends.console, rows, columns)

    def write(self, data: bytes) -> None:
        """Queue input; lost when there is nobody to read it."""
        if self.stdin is not None and not self._end_of_input:
            self._input += data
            self._feed()

    def end_input(self) -> None:
        """End of file on stdin, after what is queued. For a terminal: nothing."""
        if self.ends.mode == "pipes" and not self._end_of_input:
            self._end_of_input = True
            self._feed()

    def _feed(self) -> None:
        fd = self.stdin
        if fd is None:
            return
        try:
            while self._input:
                written = os.write(fd, self._input[:_CHUNK])
                del self._input[:written]
        except BlockingIOError:
            pass
        except OSError:  # EPIPE: nobody will read it; EIO: a terminal without a slave
            self._input.clear()
            self._end_of_input = self._end_of_input or self.ends.mode == "pipes"
        if self._end_of_input and not self._input and self.ends.mode == "pipes":
            self._loop.forget(fd)
            os.close(fd)
            self.ends.pipes = (None, *self.ends.pipes[1:])
            self._on_closed()
        self._watch()

    def _watch(self) -> None:
        """What is to be waited for, by what is queued in which direction."""
        # A reader that is behind makes the pod wait at once: what is queued here is lost with this process.
        full = self._held or any(client.waiting for client in self.clients)
        for client in self.clients:
            client.pause(len(self._input) > HIGH_WATER)
        for fd, number in self._sources.items():
            read = None if full else functools.partial(self._pump, fd, number)
            write = self._feed if fd == self.stdin and self._input else None
            self._loop.watch(fd, read=read, write=write)
        if self.stdin is not None and self.stdin not in self._sources:
            self._loop.watch(self.stdin, write=self._feed if self._input else None)

    def _pump(self, fd: int, number: int) -> bool:
        """Pass on one piece; False at the end of what there is."""
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            data = b""  # pty(7): no process has the slave open, for the moment at least
        if not data:
            if self.ends.mode == "tty":
                self._rest(fd, number)
            else:
                self._loop.forget(fd)
                self._sources.pop(fd, None)
            return False
        self._keep(data)
        for client in list(self.clients):
            client.send({"out": data, "fd": number})
        if self.clients:
            self._watch()
        return True

    def _rest(self, fd: int, number: int) -> None:
        """A terminal that nobody has open is always "readable": look again in a while."""
        self._loop.forget(fd)
        self._sources.pop(fd, None)

        def again() -> None:
            if self.ends.console == fd:
                self._sources[fd] = number
                self._watch()

        self._loop.later(0.05, again)

    def _keep(self, data: bytes) -> None:
        if self._log_fd is not None:
            try:
                while data:
                    data = data[os.write(self._log_fd, data) :]
            except OSError:  # a full disk must not stop the pod; what is lost is this piece of the log
                pass

    def end_output(self, number: int) -> None:
        """Whoever was to read stdout (1) or stderr (2) is gone: a program that writes on gets EPIPE."""
        fd = self.ends.pipes[number] if self.ends.mode == "pipes" and number in (1, 2) else None
        if fd is not None:
            self._loop.forget(fd)
            self._sources.pop(fd, None)
            os.close(fd)
            in_w, out_r, err_r = self.ends.pipes
            self.ends.pipes = (in_w, None, err_r) if number == 1 else (in_w, out_r, None)
            self._on_closed()

    def drain(self) -> None:
        """Pass on all that is there now: the processes have ended."""
        for fd in self.ends.fds():
            number = 1 if fd == self.ends.console else self.ends.pipes.index(fd)
            if number > 0:
                while self._pump(fd, number):
                    pass

    def close(self) -> None:
        """Close the descriptors; the clients stay."""
        for fd in self.ends.fds():
            self._loop.forget(fd)
            os.close(fd)
        if self._log_fd is not None:
            os.close(self._log_fd)
            self._log_fd = None
        self.ends.console, self.ends.pipes = None, (None, None, None)
        self._sources.clear()
        self._input.clear()
