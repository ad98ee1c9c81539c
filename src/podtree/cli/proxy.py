"""This command's stdin, stdout, stderr and signals, joined to a pod's until its program ends.

With a terminal: raw mode, window size, the keys that detach; when the terminal goes away, that detaches too.
Without: bytes as they are, end of file on stdin passed on, signals passed on.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import termios
import time
from collections.abc import Callable, Iterator
from types import FrameType

import msgspec

from podtree.errors import NotFound, PodtreeError
from podtree.kernel import tty
from podtree.pod import control
from podtree.pod.control import Client
from podtree.pod.live import INIT
from podtree.pool.pool import Pool
from podtree.pool.records import PodRecord

_FORWARDED = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip
_WITH_TERMINAL = (signal.SIGWINCH, signal.SIGCONT, signal.SIGHUP, signal.SIGTERM)
_CHUNK = 1 << 16
_REPLACED_S = 10.0  # how long it may take until another supervisor answers


class Signals:
    """Catches what is to be passed on, from before the pod starts; `fd` is readable when there is something."""

    def __init__(self, *, terminal: bool) -> None:
        self.fd, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.caught: list[int] = []
        # With a terminal, ^C and the like are bytes; what else comes is meant for this command.
        numbers = _WITH_TERMINAL if terminal else _FORWARDED
        # What is ignored stays so, as for any program: nohup(1), background jobs of scripts.
        caught = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        self._old = {number: signal.signal(number, self._catch) for number in caught}
        for number in caught:
            signal.siginterrupt(number, False)  # tcsetattr(3) in the background is stopped, and goes on after fg
        # Written to at once: `_catch` is called only between two instructions of Python, and poll(2) may come first.
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)

    def _catch(self, number: int, _frame: FrameType | None) -> None:
        self.caught.append(number)

    def take(self) -> list[int]:
        """What was caught since the last time."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 4096)
        caught, self.caught = self.caught, []
        return caught

    def close(self) -> None:
        """Back to what was before."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self.fd)
        os.close(self._wake)


@contextlib.contextmanager
def raw_terminal(enabled: bool) -> Iterator[None]:
    """stdin in raw mode, for as long as the scope lasts."""
    if not enabled:
        yield
        return
    attributes = tty.make_raw(0)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, termios.error):  # it may be gone
            tty.restore(0, attributes)


class Proxy:
    """One attached client. `reconnect` gives a new one after the supervisor was replaced, or the exit code if
    the program has ended since, or raises. Without `stdin` nothing is read; `end_stdin`: the program is told so.
    """

    def __init__(
        self,
        client: Client,
        signals: Signals,
        *,
        terminal: bool,
        stdin: bool = True,
        end_stdin: bool = False,
        detach_keys: bytes = b"",
        reconnect: Callable[[], Client | int],
    ) -> None:
        self._client = client
        self._signals = signals
        self._terminal = terminal
        self._stdin = stdin
        self._ended = end_stdin
        self._keys = detach_keys if terminal else b""
        self._typed = b""  # of the detach keys
        self._reconnect = reconnect
        self._in = bytearray()
        self._out = bytearray()
        self._broken: set[int] = set()

    def run(self) -> int | None:
        """Until the program ends: its exit code. None: detached."""
        if self._ended:
            self._send({"eof": True})
        with raw_terminal(self._terminal and self._stdin):
            return self._run()

    def _run(self) -> int | None:
        while True:
            poll = select.poll()
            poll.register(self._signals.fd, select.POLLIN)
            poll.register(self._client.sock, select.POLLIN | (select.POLLOUT if self._out else 0))
            if self._stdin and not self._out:  # a pod that doesn't read makes stdin wait, and nothing else
                poll.register(0, select.POLLIN)
            outcome = None
            try:
                for fd, events in poll.poll():
                    if fd == self._signals.fd:
                        outcome = self._pass_signals()
                    elif fd == 0:
                        self._stdin = self._pass_input()
                    elif events & ~select.POLLOUT:
                        outcome = self._take()
                    else:
                        self._flush()
                    if outcome is not None:
                        return None if outcome < 0 else outcome
            except ConnectionError:
                outcome = self._take_rest()
                if outcome is None:
                    outcome = self._connect_again()
                if outcome is not None:
                    return None if outcome < 0 else outcome

    def _connect_again(self) -> int | None:
        """The supervisor died; another one takes over the pod. What the dead one had read is lost."""
        self._client.close()
        say("podtree: the pod's supervisor was replaced; some input or output may be missing here", self._terminal)
        again = self._reconnect()
        if isinstance(again, int):
            return again
        self._client = again
        self._in.clear()
        self._out.clear()
        if self._ended:
            self._send({"eof": True})
        return None

    def _send(self, message: dict[str, object]) -> None:
        data = msgspec.msgpack.encode(message)
        self._out += len(data).to_bytes(4, "little") + data
        self._flush()

    def _flush(self) -> None:
        try:
            while self._out:
                sent = self._client.sock.send(self._out, socket.MSG_DONTWAIT)
                del self._out[:sent]
        except BlockingIOError:
            pass
        except ConnectionError:  # what was received before comes first; then its end is noticed
            self._out.clear()

    def _pass_signals(self) -> int | None:
        """-1 when this command was told to go: the pod stays."""
        for number in self._signals.take():
            if number == signal.SIGWINCH:
                with contextlib.suppress(OSError):
                    self._send({"size": tty.get_size(0)})
            elif number == signal.SIGCONT:
                self._raw_again()
            elif self._terminal:
                return -1
            else:
                self._send({"signal": number})
        return None

    def _raw_again(self) -> None:
        """After a stop: the shell has given its terminal modes of its own meanwhile, and perhaps a size."""
        with contextlib.suppress(OSError, termios.error):
            if self._stdin:
                tty.make_raw(0)
            self._send({"size": tty.get_size(0)})

    def _pass_input(self) -> bool:
        """False at the end of stdin."""
        try:
            data = os.read(0, _CHUNK)
        except OSError:
            data = b""
        if not data:
            self._ended = True
            self._send({"eof": True})
            return False
        if self._keys:
            data = self._look_for_keys(data)
        if data:
            self._send({"in": data})
        return True

    def _look_for_keys(self, data: bytes) -> bytes:
        """What is to be passed on; the keys so far are kept back until they are complete or not them."""
        passed = bytearray()
        for byte in data:
            self._typed += bytes([byte])
            if self._typed == self._keys:
                self._send({"in": bytes(passed)})
                self._send({"detach": True})
                self._typed = b""
                return b""
            while self._typed and not self._keys.startswith(self._typed):
                passed.append(self._typed[0])
                self._typed = self._typed[1:]
        return bytes(passed)

    def _take(self) -> int | None:
        """Handle what came from the supervisor: an exit code, -1 for detached, or None to go on."""
        part = self._client.sock.recv(_CHUNK)
        if not part:
            raise ConnectionResetError
        return self._parse(part)

    def _take_rest(self) -> int | None:
        """What had arrived before the connection broke: perhaps the exit code."""
        with contextlib.suppress(OSError):
            while part := self._client.sock.recv(_CHUNK):
                if (outcome := self._parse(part)) is not None:
                    return outcome
        return None

    def _parse(self, part: bytes) -> int | None:
        self._in += part
        while len(self._in) >= 4:
            size = int.from_bytes(self._in[:4], "little")
            if len(self._in) < 4 + size:
                break
            message = msgspec.msgpack.decode(bytes(self._in[4 : 4 + size]))
            del self._in[: 4 + size]
            if "out" in message:
                self._write(message["fd"], message["out"])
            elif "exit" in message:
                return int(message["exit"])
            elif "detached" in message:
                return -1
        return None

    def _write(self, fd: int, data: bytes) -> None:
        if fd in self._broken:
            return
        try:
            while data:
                data = data[os.write(fd, data) :]
        except BrokenPipeError:
            self._broken.add(fd)
            self._send({"closed": fd})

    def linger(self, seconds: float = 5.0) -> None:
        """Wait until the supervisor has put everything away."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            while (left := deadline - time.monotonic()) > 0:
                self._client.sock.settimeout(left)
                if not self._client.sock.recv(_CHUNK):
                    return


def is_terminal() -> bool:
    """Whether this command has a terminal to give."""
    return sys.stdin is not None and os.isatty(0) and os.isatty(1)


def outputs_are_one() -> bool:
    """Whether stdout and stderr go to the same place, as after 2>&1."""
    one, other = os.fstat(1), os.fstat(2)
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def say(text: str, raw: bool = False) -> None:
    """A line for the user, who may have hung up; `raw`: on a terminal in raw mode."""
    with contextlib.suppress(OSError):
        os.write(2, f"\r\n{text}\r\n".encode() if raw else f"{text}\n".encode())


def come_back(pool: Pool, pod: PodRecord, name: str = INIT) -> Client | int:
    """Attach again to the stdio `name` of a pod, of which the supervisor was replaced; or the pod's exit code."""
    deadline = time.monotonic() + _REPLACED_S
    while True:
        try:
            client = control.connect(pool, pod)
            client.call("attach", name=name)
            return client
        except PodtreeError:
            running = _runs(pool, pod)
            if not running and name == INIT:
                return control.exit_code(pool, pod)
            if not running or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _runs(pool: Pool, pod: PodRecord) -> bool:
    try:
        return pool.pod(pod.id).is_running
    except NotFound:  # it was run with --rm
        return False
