"""Bytes under way in a pty: typed and not yet read, written and not yet shown.

They can be read but not looked at, so while the pod is frozen they are read and put back at once. The slave's line
discipline keeps more than bytes: in canonical mode the ends of lines, and an unfinished line that only shows in raw
mode (drivers/tty/n_tty.c). Bytes go back with TIOCSTI, which passes them through the line discipline synchronously,
with every special character switched off, so that each stands for itself.

Whoever is killed half-way must not have eaten them: they are read straight into a mapped journal file, where a
successor finds them (`recover`).
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import struct
import termios
from collections.abc import Iterator
from pathlib import Path

import msgspec

from podtree.kernel import fdops

TCGETS2, TCSETS2 = 0x802C542A, 0x402C542B  # include/uapi/asm-generic/ioctls.h
TERMIOS2_SIZE = 44  # struct termios2: c_iflag, c_oflag, c_cflag, c_lflag, c_line, c_cc[19], 2 speeds
LFLAG, CC = 12, 17  # offsets in it
EXTPROC = 0o200000
VMIN, VTIME = termios.VMIN, termios.VTIME
QUEUE_SIZE = 4096  # N_TTY_BUF_SIZE: what a line discipline holds
SAFE_QUEUE = 3900  # fuller ones may hide more behind them
MAX_LINES = 512
JOURNAL = "tty.journal"


class Queues(msgspec.Struct, frozen=True):
    """`lines`: each is what one read gives (without "\\n" at the end: ended by an end-of-file character).

    `partial`: the unfinished line, or in raw mode everything. `output`: for the master to read.
    """

    lines: tuple[bytes, ...] = ()
    partial: bytes = b""
    output: bytes = b""

    def __bool__(self) -> bool:
        return bool(self.lines or self.partial or self.output)


class Unreadable(Exception):
    """The queues can't be saved now; the text says why."""


# --------------------------------------------------------------------------------------------------- journal

_HEAD = struct.Struct("=IIII44s")  # index, slave (1) or master (0) side, bytes wanted, bytes put back, termios2
_READING = 0xFFFFFFFF  # in place of the bytes put back: none yet
_LINES_AT = 128
_DATA_AT = _LINES_AT + 4 * (MAX_LINES + 1)
_SIZE = _DATA_AT + 3 * QUEUE_SIZE


class Journal:
    """A mapped file: what was read is in it when read(2) returns, and outlives this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, _SIZE)
            self.map = mmap.mmap(fd, _SIZE)
        finally:
            os.close(fd)

    def begin(self, index: int, slave: bool, settings: bytes) -> None:
        """Note which side of which pty is about to be read, and the settings to put back."""
        self.map[_LINES_AT:] = bytes(_SIZE - _LINES_AT)
        _HEAD.pack_into(self.map, 0, index, slave, 0, _READING, settings)

    def take(self, fd: int, count: int) -> bytes:
        """Read up to `count` bytes behind what was read before."""
        used = sum(self.lengths())
        count = min(count, _SIZE - _DATA_AT - used)
        struct.pack_into("=I", self.map, 8, count)
        view = memoryview(self.map)[_DATA_AT + used : _DATA_AT + used + count]
        try:
            got = os.readv(fd, [view])
        finally:
            view.release()
        number = len(self.lengths())
        if number >= MAX_LINES:
            raise Unreadable("it has more lines waiting than can be saved")
        struct.pack_into("=I", self.map, _LINES_AT + 4 * number, got + 1)  # 0 ends the list
        struct.pack_into("=I", self.map, 8, 0)
        return self.map[_DATA_AT + used : _DATA_AT + used + got]

    def lengths(self) -> list[int]:
        """Of the pieces read so far."""
        found = []
        for (length,) in struct.iter_unpack("=I", self.map[_LINES_AT:_DATA_AT]):
            if not length:
                break
            found.append(length - 1)
        return found

    def count_back(self, number: int) -> None:
        """`number` bytes have been put back."""
        struct.pack_into("=I", self.map, 12, number)

    def end(self) -> None:
        """All is as it was."""
        self.map.close()
        self.path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ look and put


def is_canonical(settings: bytes) -> bool:
    """Whether input is in lines: ICANON, unless EXTPROC leaves that to the other side."""
    (flags,) = struct.unpack_from("I", settings, LFLAG)
    return bool(flags & termios.ICANON) and not flags & EXTPROC


def literal_settings(settings: bytes, end_of_file: int, used: set[int]) -> bytes:
    """Settings under which all bytes in `used` stand for themselves, and only `end_of_file` and "\\n" end a line.

    Lines stay lines and raw stays raw, since switching would join all lines into one; IXON stays, since switching it
    would start stopped output, and its characters do if they can, since a master in packet mode is told of them.
    """
    iflag, _, cflag, lflag = struct.unpack_from("4I", settings)
    control = bytearray(19)
    control[termios.VEOF] = end_of_file
    if not lflag & termios.ICANON:
        control = bytearray(19)
        control[VMIN], control[VTIME] = settings[CC + VMIN], settings[CC + VTIME]
    for which in (termios.VSTART, termios.VSTOP):
        if settings[CC + which] not in used:
            control[which] = settings[CC + which]
    head = struct.pack("4I", iflag & termios.IXON, 0, cflag, lflag & (termios.ICANON | EXTPROC))
    return head + settings[16:17] + bytes(control) + settings[CC + 19 :]


def raw_settings(settings: bytes) -> bytes:
    """As they are, but without lines: an unfinished one becomes readable."""
    (flags,) = struct.unpack_from("I", settings, LFLAG)
    changed = bytearray(settings)
    struct.pack_into("I", changed, LFLAG, flags & ~termios.ICANON)
    changed[CC + VMIN], changed[CC + VTIME] = 1, 0
    return bytes(changed)


def readable(fd: int) -> bool:
    """poll(2): it also flushes what was written but has not arrived (n_tty_poll())."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))


def save(index: int, master: int, slave: int | None, packet: bool, output: bool, journal_path: Path) -> Queues:
    """Everything that is queued in pty `index`, which holds the same afterwards. The pod must be frozen.

    `slave`: a non-blocking descriptor of the slave side, readable; None where nobody has it open. `output`: whether
    to look for what the master has not read (the console's is the supervisor's own).
    """
    settings = fcntl.ioctl(master, TCGETS2, bytes(TERMIOS2_SIZE))
    pending_output = output and readable(master)
    pending_input = slave is not None and (readable(slave) or fdops.queued_bytes(slave) or is_canonical(settings))
    if not (pending_output or pending_input):
        return Queues()
    if packet and pending_output:
        raise Unreadable("it is in packet mode and its master has not read everything")
    for fd in (slave if pending_input else None, master if pending_output else None):
        if fd is not None and fdops.queued_bytes(fd) > SAFE_QUEUE:
            raise Unreadable("too many bytes are waiting in it")
    journal = Journal(journal_path)
    try:
        lines: list[bytes] = []
        partial, shown = b"", b""
        if pending_input and slave is not None:
            lines, partial = _save_input(journal, index, slave, settings)
        if pending_output:
            shown = _save_output(journal, index, master, settings)
        return Queues(tuple(lines), partial, shown)
    finally:
        journal.end()


def _save_input(journal: Journal, index: int, slave: int, settings: bytes) -> tuple[list[bytes], bytes]:
    journal.begin(index, True, settings)
    lines: list[bytes] = []
    if is_canonical(settings):
        while readable(slave):
            lines.append(journal.take(slave, QUEUE_SIZE))
    partial = b""
    with _settings(slave, raw_settings(settings), settings):
        while readable(slave):
            partial += journal.take(slave, QUEUE_SIZE)
    put_input(slave, settings, lines, partial, journal)
    return lines, partial


@contextlib.contextmanager
def _settings(fd: int, inside: bytes, after: bytes) -> Iterator[None]:
    fcntl.ioctl(fd, TCSETS2, inside)
    try:
        yield
    finally:
        fcntl.ioctl(fd, TCSETS2, after)


def put_input(
    slave: int, settings: bytes, lines: list[bytes], partial: bytes, journal: Journal | None = None
) -> None:
    """Queue input as if it had been typed, unprocessed."""
    stream, end_of_file = _as_stream(lines, partial)
    if stream:
        with _settings(slave, literal_settings(settings, end_of_file, set(stream) - {end_of_file}), settings):
            _put(slave, stream, journal)


def _as_stream(lines: list[bytes], partial: bytes) -> tuple[bytes, int]:
    """What to type for these lines, and the end-of-file character in it."""
    used = set(b"".join(lines)) | set(partial) | {0x0A, 0}
    end_of_file = next((b for b in (4, *range(1, 256)) if b not in used), 4)
    ended = [line if line.endswith(b"\n") else line + bytes([end_of_file]) for line in lines]
    return b"".join(ended) + partial, end_of_file


def _put(fd: int, stream: bytes, journal: Journal | None, skip: int = 0) -> None:
    if journal:
        journal.count_back(skip)
    for number in range(skip, len(stream)):
        fcntl.ioctl(fd, termios.TIOCSTI, stream[number : number + 1])
        if journal:
            journal.count_back(number + 1)


def _save_output(journal: Journal, index: int, master: int, settings: bytes) -> bytes:
    journal.begin(index, False, settings)
    data = b""
    while readable(master):
        data += journal.take(master, QUEUE_SIZE)
    put_output(master, data, journal)
    return data


def put_output(master: int, data: bytes, journal: Journal | None = None) -> None:
    """Queue output for the master to read. The master's own line discipline takes each byte as it is."""
    _put(master, data[: QUEUE_SIZE - 1], journal)


# ---------------------------------------------------------------------------------------------------- recover


def interrupted(journal_path: Path) -> int | None:
    """The pty number that a killed checkpoint was busy with; None where all is well."""
    try:
        with journal_path.open("rb") as file:
            head = file.read(_HEAD.size)
    except FileNotFoundError:
        return None
    if len(head) < _HEAD.size:  # nothing had been begun
        journal_path.unlink()
        return None
    return int(_HEAD.unpack(head)[0])


def recover(journal_path: Path, master: int, slave: int) -> None:
    """Put back what a killed checkpoint had read from the pty, and its settings. The pod may be running."""
    journal = Journal(journal_path)
    _, side, wanted, back, settings = _HEAD.unpack_from(journal.map, 0)
    if settings == bytes(TERMIOS2_SIZE):
        journal.end()
        return
    pieces = []
    at = _DATA_AT
    for length in journal.lengths():
        pieces.append(journal.map[at : at + length])
        at += length
    if wanted:  # killed between the read and the note of its length: what is there of it ends with the last byte set
        rest = journal.map[at : at + wanted].rstrip(b"\0")
        pieces += [rest] if rest else []
    if side:
        lines, partial = _split(pieces) if is_canonical(settings) else ([], b"".join(pieces))
        stream, end_of_file = _as_stream(lines, partial)
        with _settings(slave, raw_settings(settings), settings):
            present = _drain(slave)
        skip, more = _missing(stream, back, present)
        literal = literal_settings(settings, end_of_file, set(stream + more) - {end_of_file})
        with _settings(slave, literal, settings):
            _put(slave, stream, journal, skip)
            _put(slave, more, None)
    else:
        stream = b"".join(pieces)
        skip, more = _missing(stream, back, _drain(master))
        _put(master, stream, journal, skip)
        _put(master, more, None)
    journal.end()


def _drain(fd: int) -> bytes:
    data = b""
    while readable(fd):
        data += os.read(fd, QUEUE_SIZE)
    return data


def _missing(stream: bytes, back: int, present: bytes) -> tuple[int, bytes]:
    """Where in `stream` to go on, everything being taken out: (bytes of it that a program has read, what is to follow).

    `back` bytes were put back for certain, perhaps one more; `present` was found in the queue. A program of the pod
    may have read from its beginning, and there may be newer bytes at its end.
    """
    if back == _READING:
        return 0, present
    for count in (back + 1, back):
        if count <= len(stream) and _same(present[:count], stream[:count]):
            return 0, present[count:]
    for count in (back + 1, back):
        gone = count - len(present)
        if gone > 0 and count <= len(stream) and _same(present, stream[gone:count]):
            return gone, b""
    return back, present


def _same(found: bytes, put: bytes) -> bool:
    """An end-of-file character is kept as 0."""
    return len(found) == len(put) and all(a in (b, 0) for a, b in zip(found, put, strict=True))


def _split(pieces: list[bytes]) -> tuple[list[bytes], bytes]:
    """Lines, and what was read in raw mode after them: the last piece without an end of line."""
    if pieces and pieces[-1] and not pieces[-1].endswith(b"\n"):
        return pieces[:-1], pieces[-1]
    return pieces, b""
