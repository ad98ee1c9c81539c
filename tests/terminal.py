"""A person at a terminal: a command under a pty, typed to and read from, with deadlines."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Sequence

from driver import SLOW, Pod


class Terminal:
    """A running command whose terminal we are; `text` is all that it has shown."""

    def __init__(self, command: Sequence[str], env: dict[str, str], rows: int = 40, columns: int = 120) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command, env={**env, "TERM": "dumb"}, stdin=slave, stdout=slave, stderr=slave, preexec_fn=take_terminal
        )
        os.close(slave)
        self.text = ""
        self._read_from = 0

    def type(self, text: str) -> None:
        """Types, without waiting for anything."""
        os.write(self.master, text.encode())

    def expect(self, pattern: str, seconds: float = 20) -> re.Match[str]:
        """Reads until `pattern` (a regular expression) appears after what was matched last."""
        deadline = time.monotonic() + seconds * SLOW
        while True:
            found = re.compile(pattern, re.MULTILINE).search(self.text, self._read_from)
            if found:
                self._read_from = found.end()
                return found
            left = deadline - time.monotonic()
            shown = self.text[self._read_from :]
            assert left > 0, f"no {pattern!r} on the terminal within {seconds:g} s; since the last match: {shown!r}"
            if not self._read_more(min(left, 1)):
                code = self.process.poll()
                raise AssertionError(f"the terminal's command ended ({code}) without {pattern!r}: {shown!r}")

    def _read_more(self, seconds: float) -> bool:
        if select.select([self.master], [], [], seconds)[0]:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # EIO: the other side is closed
                return False
            self.text += data.decode(errors="replace")
            return bool(data)
        return True

    def close(self) -> None:
        """Hangs up: the command gets SIGHUP, and is killed if it does not go."""
        os.close(self.master)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def attached(pod: Pod) -> Iterator[Terminal]:
    """`podtree attach` on a terminal; hung up at the end, which leaves the pod running."""
    terminal = Terminal([str(pod.podtree.program), "attach", pod.name], pod.podtree.env)
    try:
        yield terminal
    finally:
        terminal.close()
