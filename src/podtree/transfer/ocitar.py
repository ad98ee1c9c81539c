"""The archive around an export: a tar stream (POSIX ustar) of oci-layout, blobs/sha256/DIGEST, index.json.

Python's tarfile reads much more than that, some of it without bounds; from strangers we take just this.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from podtree.errors import Damaged
from podtree.transfer.schema import LAYOUT, MAX_JSON, Descriptor

BLOCK = 512
BLOB = re.compile(r"blobs/sha256/([0-9a-f]{64})")
_PIECE = 1 << 20
_FILE, _DIRECTORY, _PAX = ("0", "\0"), "5", ("x", "g")


def digest_text(raw: bytes) -> str:
    """As OCI writes it."""
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


class Writer:
    """Writes an OCI layout. What is written is whole once `finish` has been called."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self.bytes_written = 0
        self._member("oci-layout", LAYOUT)

    def blob(self, media_type: str, raw: bytes, **annotations: str) -> Descriptor:
        """One blob; its descriptor."""
        digest = digest_text(raw)
        self._member(f"blobs/{digest.replace(':', '/')}", raw)
        return Descriptor(media_type=media_type, digest=digest, size=len(raw), annotations=annotations)

    def finish(self, index: bytes) -> None:
        self._member("index.json", index)
        self._write(bytes(2 * BLOCK))
        self._out.flush()

    def _member(self, name: str, raw: bytes) -> None:
        head = bytearray(BLOCK)
        for at, field in (
            (0, name.encode()), (100, b"0000644\0"), (108, b"0000000\0"), (116, b"0000000\0"),
            (124, b"%011o\0" % len(raw)), (136, b"00000000000\0"), (148, b" " * 8), (156, b"0"),
            (257, b"ustar\x0000"),
        ):  # fmt: skip
            head[at : at + len(field)] = field
        head[148:156] = b"%06o\0 " % sum(head)
        self._write(bytes(head))
        self._write(raw)
        self._write(bytes(-len(raw) % BLOCK))

    def _write(self, raw: bytes) -> None:
        self._out.write(raw)
        self.bytes_written += len(raw)


class Cut(Damaged):
    """The stream ends before the archive does."""


class Member:
    """One file of an archive, to be read or skipped before the next one."""

    def __init__(self, name: str, size: int, source: BinaryIO) -> None:
        self.name = name
        self.size = size
        self._source = source
        self._left = size

    def pieces(self) -> Iterator[bytes]:
        """What is left of it. Raises Cut."""
        while self._left:
            piece = self._source.read(min(_PIECE, self._left))
            if not piece:
                raise Cut(f"the export is cut off in the middle of {self.name}")
            self._left -= len(piece)
            yield piece

    def read(self, limit: int) -> bytes:
        """All of it. Raises Damaged if that is more than `limit` bytes."""
        if self.size > limit:
            raise Damaged(f"{self.name} of the export is too large")
        return b"".join(self.pieces())

    def skip(self) -> None:
        """Go on without it, by seeking where that is possible."""
        if self._left and self._source.seekable():
            self._source.seek(self._left - 1, os.SEEK_CUR)
            if not self._source.read(1):
                raise Cut(f"the export is cut off in the middle of {self.name}")
            self._left = 0
        for _piece in self.pieces():
            pass


def members(source: BinaryIO) -> Iterator[Member]:
    """The files of a tar stream, up to its end. Raises Damaged, Cut."""
    while True:
        head = _exactly(source, BLOCK)
        if head == bytes(BLOCK):
            return
        member, kind = _parse(head, source)
        if kind in _FILE:
            yield member
        elif kind in _PAX:
            member.read(MAX_JSON)  # says nothing of names and sizes as short as ours
        elif kind != _DIRECTORY or member.size:
            raise Damaged(f"the export has {member.name!r}, which is no plain file")
        member.skip()
        _exactly(source, -member.size % BLOCK)


def _exactly(source: BinaryIO, count: int) -> bytes:
    raw = b""
    while len(raw) < count:
        piece = source.read(count - len(raw))
        if not piece:
            raise Cut("the export is cut off")
        raw += piece
    return raw


def _parse(head: bytes, source: BinaryIO) -> tuple[Member, str]:
    try:
        wanted = int(head[148:156].strip(b" \0"), 8)
        size = int(head[124:136].strip(b" \0") or b"0", 8)
        name = head[:100].split(b"\0")[0].decode("ascii")
    except ValueError:
        raise Damaged("this is no export: no tar header where there should be one") from None
    if sum(head) - sum(head[148:156]) + 8 * 0x20 != wanted or size < 0:
        raise Damaged("the export is damaged, or it is none: a tar header's checksum is wrong")
    return Member(name.removeprefix("./"), size, source), chr(head[156])


def files_of(layout: Path) -> Iterator[tuple[str, int]]:
    """(name in the archive, descriptor) of the files of an OCI layout that is a directory."""
    blobs = layout / "blobs" / "sha256"
    names = [f"blobs/sha256/{name}" for name in sorted(os.listdir(blobs))] if blobs.is_dir() else []
    for name in ["oci-layout", *names, "index.json"]:
        try:
            yield name, os.open(layout / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise Damaged(f"{layout} is no export: it has no {name}") from None
