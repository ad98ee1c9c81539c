"""Pseudo terminals: pty(7), ioctl_tty(2); include/uapi/asm-generic/ioctls.h."""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from typing import Any

TIOCGPTN = 0x80045430
TIOCSPTLCK = 0x40045431
TIOCGPTPEER = 0x5441


def open_master(ptmx: str, access: int = os.O_RDWR) -> tuple[int, int]:
    """A new pty of the devpts instance that `ptmx` belongs to: (master descriptor, pty number), unlocked."""
    master = os.open(ptmx, access | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(master, TIOCSPTLCK, struct.pack("i", 0))
        return master, pty_number(master)
    except OSError:
        os.close(master)
        raise


def pty_number(master: int) -> int:
    """N of /dev/pts/N."""
    (number,) = struct.unpack("I", fcntl.ioctl(master, TIOCGPTN, b"\0" * 4))
    return int(number)


def open_slave(master: int) -> int:
    """The other end, opened through the master and not by a path: TIOCGPTPEER (Linux 4.13)."""
    return fcntl.ioctl(master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)


def set_size(fd: int, rows: int, columns: int) -> None:
    """Window size; the foreground process group gets SIGWINCH when it changes."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))


def get_size(fd: int) -> tuple[int, int]:
    """(rows, columns)."""
    rows, columns, _, _ = struct.unpack("4H", fcntl.ioctl(fd, termios.TIOCGWINSZ, b"\0" * 8))
    return rows, columns


def make_controlling(fd: int) -> None:
    """Make `fd` the controlling terminal of the calling session leader."""
    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)


def make_raw(fd: int) -> list[Any]:
    """Put a terminal in raw mode (cfmakeraw(3)); returns the attributes to give back to `restore`."""
    old = termios.tcgetattr(fd)
    new = termios.tcgetattr(fd)
    new[0] &= ~(
        termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
        | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON
    )  # fmt: skip
    new[1] &= ~termios.OPOST
    new[2] = new[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    new[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    new[6][termios.VMIN], new[6][termios.VTIME] = 1, 0
    termios.tcsetattr(fd, termios.TCSADRAIN, new)
    return old


def restore(fd: int, attributes: list[Any]) -> None:
    """Undo make_raw."""
    termios.tcsetattr(fd, termios.TCSADRAIN, attributes)
