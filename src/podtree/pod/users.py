"""Who the pod's program runs as: `--user`, looked up in the pod's own passwd(5) and group(5).

Called inside the pod's root; the files are the pod's, so nothing here trusts their form.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass

from podtree.errors import UsageError

_LONGEST = 4 << 20  # bytes of a passwd or group file that are looked at


@dataclass(frozen=True, slots=True)
class Identity:
    """uid, gid, supplementary groups, home directory."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def resolve(user: str) -> Identity:
    """"", "name", "uid", either with ":group" or ":gid". A uid needs no entry; a name does."""
    name, _, group = (user or "0").partition(":")
    rows = _table("/etc/passwd", 7)
    row = next((r for r in rows if name in (r[0], r[2])), None)
    if row is None and not name.isdigit():
        raise UsageError(f"--user {user}: the pod's /etc/passwd has no {name!r}")
    uid = _number(row[2] if row else name, user)
    gid = _number(row[3], user) if row else 0
    groups = _table("/etc/group", 4)
    extra = [int(g[2]) for g in groups if row and row[0] in g[3].split(",") and g[2].isdigit()]
    if group:
        entry = next((g for g in groups if group in (g[0], g[2])), None)
        if entry is None and not group.isdigit():
            raise UsageError(f"--user {user}: the pod's /etc/group has no {group!r}")
        gid, extra = _number(entry[2] if entry else group, user), []
    return Identity(uid, gid, tuple(dict.fromkeys([gid, *extra])), (row[5] if row else "") or "/")


def _number(text: str, user: str) -> int:
    if not text.isdigit() or int(text) >= 0xFFFFFFFF:
        raise UsageError(f"--user {user}: {text!r} is not a valid id")
    return int(text)


def _table(path: str, columns: int) -> list[list[str]]:
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                lines = file.read(_LONGEST).decode(errors="replace").splitlines()
                return [row for line in lines if len(row := line.split(":")) == columns]
    return []
