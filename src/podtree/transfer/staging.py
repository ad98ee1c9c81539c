"""The blobs of an import as they come in, each verified. When the stream is cut off they are kept for the next try."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from podtree.errors import Damaged
from podtree.transfer.ocitar import BLOB, Cut, Member, files_of, members
from podtree.transfer.schema import LAYOUT, MAX_JSON, Descriptor, decode


class Staging:
    """A directory of blobs, by their SHA-256. One process at a time uses it."""

    def __init__(self, directory: Path, room: Callable[[int], None]) -> None:
        """`room` raises if the pool can't take so many more bytes."""
        self._directory = directory
        self._room = room
        self.taken = 0  # blobs that were there already
        self.index: bytes | None = None
        directory.mkdir(mode=0o700, exist_ok=True)

    def receive(self, source: BinaryIO | Path) -> bytes:
        """Take a whole export in; its index. Raises Damaged, Cut when it ends too early."""
        layout = False
        came = 0
        try:
            for member in _members(source):
                match member.name:
                    case "oci-layout":
                        layout = decode(member.read(MAX_JSON), dict, "oci-layout") == decode(LAYOUT, dict, "")
                    case "index.json":
                        self.index = member.read(MAX_JSON)
                    case name if found := BLOB.fullmatch(name):
                        self._take(found[1], member)
                        came += 1
                    case name:
                        raise Damaged(f"this is no export of podtree: it has {name!r}")
        except Cut as error:
            raise Cut(f"{error.message}; its first {came} parts are kept", "import it again, to go on there") from None
        if not layout or self.index is None:
            raise Damaged("this is no export of podtree: it is no OCI image layout")
        return self.index

    def _take(self, digest: str, member: Member) -> None:
        path = self._directory / digest
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size == member.size:
                os.utime(path)
                member.skip()
                self.taken += 1
                return
        self._room(member.size)
        draft = self._directory / f"{digest}.new"
        whole = hashlib.sha256()
        try:
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
                for piece in member.pieces():
                    whole.update(piece)
                    file.write(piece)
            if whole.hexdigest() != digest:
                raise Damaged(f"a part of the export is damaged: {member.name}")
            os.rename(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    def read(self, blob: Descriptor, limit: int) -> bytes:
        """A blob, verified again. Raises Damaged if it isn't there, or is larger than `limit`."""
        algorithm, _, digest = blob.digest.partition(":")
        path = self._directory / digest
        if algorithm != "sha256" or not BLOB.fullmatch(f"blobs/sha256/{digest}"):
            raise Damaged(f"the export names a part by {blob.digest!r}")
        try:
            size = path.stat().st_size
            if size != blob.size or size > limit:
                raise Damaged(f"the part {blob.digest} of the export has {size} bytes")
            raw = path.read_bytes()
        except FileNotFoundError:
            raise Damaged(f"the export lacks its part {blob.digest}") from None
        if hashlib.sha256(raw).hexdigest() != digest:
            path.unlink(missing_ok=True)
            raise Damaged(f"the part {blob.digest} of the export was damaged since it came in", "import it again")
        return raw

    def forget(self, blobs: Iterable[Descriptor]) -> None:
        """Remove blobs that nobody needs any more."""
        for blob in blobs:
            name = blob.digest.partition(":")[2]
            if BLOB.fullmatch(f"blobs/sha256/{name}"):
                (self._directory / name).unlink(missing_ok=True)


def _members(source: BinaryIO | Path) -> Iterator[Member]:
    if not isinstance(source, Path):
        yield from members(source)
        return
    for name, fd in files_of(source):
        with open(fd, "rb") as file:
            yield Member(name, os.fstat(fd).st_size, file)
