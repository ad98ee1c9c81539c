"""Messages between a supervisor and the processes it forks: a frame with descriptors, an exception as data.

Nothing that comes from inside a pod is trusted: what a report names as its class has to be one of ours.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
from collections.abc import Sequence
from typing import Any

import msgspec

from podtree import errors
from podtree.errors import PodtreeError, Problem, Refused, printable
from podtree.kernel.prctl import Prctl, prctl
from podtree.kernel.sys import NR, syscall

_FDS_PER_MESSAGE = 200  # unix(7): at most 253
_LONGEST_REPORT = 1 << 20
_KEYCTL_JOIN_SESSION_KEYRING = 1  # include/uapi/linux/keyctl.h


_EXEC_HINTS = {
    errno.ENOENT: "it, or the interpreter that its first line names, isn't there in the pod",
    errno.EACCES: "it isn't executable for the pod's user",
    errno.ENOEXEC: "neither a program for this machine nor a script that begins with #!; a shell script: sh FILE",
}


class ExecFailed(PodtreeError):
    """The program could not be executed: 127 when it isn't there, 126 otherwise, as shells have it."""

    exit_code = 126

    def __init__(self, message: str, hint: str = "", code: int = 126) -> None:
        super().__init__(message, hint)
        self.exit_code = code


def encode_error(error: BaseException) -> dict[str, Any]:
    """An exception as data; other than a PodtreeError it becomes one, with its text."""
    problems = [msgspec.to_builtins(p) for p in getattr(error, "problems", [])]
    if isinstance(error, PodtreeError):
        text, hint, code = error.message, error.hint, error.exit_code
    elif isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        text, hint, code = f"{name}{error.strerror}", "", 1
    else:
        text, hint, code = f"{type(error).__name__}: {error}", "", 1
    kind = type(error).__name__ if isinstance(error, PodtreeError) else "PodtreeError"
    return {"error": printable(text), "kind": kind, "hint": printable(hint), "exit_code": code, "problems": problems}


def decode_error(data: dict[str, Any]) -> PodtreeError:
    """The reverse: an exception of the same class, if it is one of ours, with the same exit code."""
    kind = _classes().get(str(data.get("kind")), PodtreeError)
    error = kind.__new__(kind)
    PodtreeError.__init__(error, str(data.get("error", "unknown error")), str(data.get("hint", "")))
    if isinstance(error, Refused):
        error.problems = msgspec.convert(data.get("problems", []), list[Problem])
    error.exit_code = int(data.get("exit_code", 1)) & 0xFF
    return error


def _classes() -> dict[str, type[PodtreeError]]:
    found = {c.__name__: c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, PodtreeError)}
    pending = list(found.values())
    while pending:  # those that are defined beside what raises them
        for child in pending.pop().__subclasses__():
            if child.__module__.split(".")[0] == "podtree" and child.__name__ not in found:
                found[child.__name__] = child
                pending.append(child)
    return found


def send(channel: socket.socket, message: Any, fds: Sequence[int] = ()) -> None:
    """One frame: length of the data, number of descriptors, the data, then the descriptors."""
    data = msgspec.msgpack.encode(message)
    channel.sendall(struct.pack("<II", len(data), len(fds)) + data)
    for start in range(0, len(fds), _FDS_PER_MESSAGE):
        socket.send_fds(channel, [b"."], list(fds[start : start + _FDS_PER_MESSAGE]))


def receive(channel: socket.socket) -> tuple[Any, list[int]]:
    """One frame of a blocking socket; (None, []) at its end. The descriptors are close-on-exec."""
    head = _exactly(channel, 8)
    if head is None:
        return None, []
    size, count = struct.unpack("<II", head)
    data = _exactly(channel, size)
    fds: list[int] = []
    while len(fds) < count:
        byte, new, _, _ = socket.recv_fds(channel, 1, _FDS_PER_MESSAGE, socket.MSG_CMSG_CLOEXEC)
        fds += new
        if not byte or not new:
            break
    if data is None or len(fds) < count:
        for fd in fds:
            os.close(fd)
        return None, []
    return msgspec.msgpack.decode(data), fds


def _exactly(channel: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = channel.recv(size - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


def report_failure(fd: int, error: BaseException) -> None:
    """Write an exception to the report pipe; for a process that is about to exit."""
    if os.environ.get("PODTREE_DEBUG"):
        import traceback

        traceback.print_exception(error)
    with contextlib.suppress(OSError):
        os.write(fd, b"E" + msgspec.msgpack.encode(encode_error(error)))


def read_report(fd: int, command: str) -> PodtreeError | None:
    """Wait for the report pipe's end: None when `command` was executed, else what went wrong."""
    data = bytearray()
    while len(data) < _LONGEST_REPORT:
        part = os.read(fd, 65536)
        if not part:
            break
        data += part
    return parse_report(bytes(data), command)


def parse_report(data: bytes, command: str) -> PodtreeError | None:
    """What the report pipe said: an exception, or the last hop's negative errno (podtree.pod.hop)."""
    if not data:
        return None
    if data[:1] == b"E":
        with contextlib.suppress(msgspec.DecodeError, msgspec.ValidationError, ValueError, AttributeError):
            return decode_error(msgspec.msgpack.decode(data[1:]))
    if len(data) == 8:
        code = -int.from_bytes(data, "little", signed=True)
        if code in errno.errorcode:
            return exec_failed(command, code)
    return PodtreeError("the pod's first process sent a report that makes no sense")


def exec_failed(command: str, code: int) -> ExecFailed:
    """What execve(2) said of the program; 127 when it isn't there, 126 when it can't be executed."""
    missing = code in (errno.ENOENT, errno.ENOTDIR)
    return ExecFailed(f"{command}: {os.strerror(code)}", _EXEC_HINTS.get(code, ""), code=127 if missing else 126)


def leave_keyring() -> None:
    """A session keyring of the caller's own: the host's keys aren't for pods. keyctl(2)."""
    with contextlib.suppress(OSError):  # a kernel without keys
        syscall(NR.keyctl, _KEYCTL_JOIN_SESSION_KEYRING, 0)


def isolate_child(keep: Sequence[int]) -> None:
    """For a fork of the supervisor that goes near a pod: default signals, no other descriptors, and no
    process of the pod may look into it (prctl(2), PR_SET_DUMPABLE) until it has executed something.
    """
    prctl(Prctl.SET_DUMPABLE, 0)
    signal.set_wakeup_fd(-1)
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    lowest = 3
    for fd in sorted(set(keep)):
        if fd > lowest:
            syscall(NR.close_range, lowest, fd - 1, 0)
        lowest = max(lowest, fd + 1)
    syscall(NR.close_range, lowest, 0xFFFFFFFF, 0)
