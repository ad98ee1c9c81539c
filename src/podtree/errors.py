"""Every error that podtree reports: the message, what to do about it, the exit code.

The library raises these; only the command line prints them.
"""

from __future__ import annotations

import msgspec


def as_text(text: str) -> str:
    """Arguments and names of files may hold bytes that are no text (surrogateescape): those escaped."""
    return text.encode(errors="backslashreplace").decode()


def printable(text: str) -> str:
    """The text with all that isn't printable escaped: what a pod or an image says must not drive a terminal.

    Bytes that are no UTF-8, which Python holds as surrogates, become \\xNN; they could not be encoded.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else character.encode("unicode_escape").decode()


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One object that can't be saved: whose it is, what it is, why, and what to do.

    Names that a pod's programs chose may be in any of the texts, which are made printable.
    """

    pid: int  # inside the pod; 0 when it belongs to no single process
    comm: str
    object: str  # "fd 5 (io_uring)", "mapping 7f00-7f10", "pod"
    reason: str
    hint: str = ""

    def __post_init__(self) -> None:
        for name in ("comm", "object", "reason", "hint"):
            msgspec.structs.force_setattr(self, name, printable(getattr(self, name)))

    def __str__(self) -> str:
        who = f"process {self.pid} ({self.comm}), " if self.pid else ""
        return f"{who}{self.object}: {self.reason}" + (f" [{self.hint}]" if self.hint else "")


class PodtreeError(Exception):
    """Base of all. `hint` says what the user can do."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = as_text(message)
        self.hint = as_text(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message


class UsageError(PodtreeError):
    """The command's words make no sense (bad option value, bad reference syntax)."""

    exit_code = 2


class Refused(PodtreeError):
    """A checkpoint is impossible now; nothing was written. `problems` names each object."""

    exit_code = 3

    def __init__(self, problems: list[Problem], what: str = "cannot checkpoint") -> None:
        self.problems = problems
        super().__init__(f"{what}: " + "; ".join(str(p) for p in problems))


class NotFound(PodtreeError):
    """No such pod or checkpoint, or an ambiguous prefix."""

    exit_code = 4


class Conflict(PodtreeError):
    """The pod is in another state than the verb needs, the name is taken, or a lock is held."""

    exit_code = 5


class Damaged(PodtreeError):
    """An image, a volume or the index fails verification."""

    exit_code = 6


class Unsupported(PodtreeError):
    """This machine lacks something that is needed (kernel feature, tool, privilege)."""

    exit_code = 7


class RestoreFailed(PodtreeError):
    """A checkpoint could not be brought back to life; whatever was started has been ended."""

    exit_code = 8
