"""Where contents are: chunks in packs on the way out, in one file on the way in."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable

from blake3 import blake3

from podtree.errors import Damaged
from podtree.transfer.ocitar import Writer
from podtree.transfer.schema import (
    CHUNKS_TYPE,
    DIGEST,
    MAX_CHUNKS,
    PACK_BYTES,
    PACK_TYPE,
    PAGE,
    Descriptor,
    Parts,
    compress,
    decompress,
)

_LENGTH = 4  # bytes of a chunk's length


class Packer:
    """A Sink that writes each chunk once, in packs, and none that `foreign` has (digests)."""

    def __init__(self, writer: Writer, foreign: Iterable[bytes] = ()) -> None:
        self.packs: list[int] = []
        self.layers: list[Descriptor] = []
        self.foreign: list[bytes] = []
        self.bytes_read = 0
        self._writer = writer
        self._known: dict[bytes, int] = dict.fromkeys(foreign, -1)
        self._foreign_numbers: dict[bytes, int] = {}
        self._own: list[bytes] = []
        self._lengths = array("I")
        self._pending: list[bytes] = []
        self._pending_bytes = 0

    @property
    def own(self) -> int:
        return len(self._own)

    def add(self, digest: bytes, piece: bytes, parts: Parts, at: int) -> int:
        self.bytes_read += len(piece)
        number = self._known.get(digest)
        if number is None:
            return self._take(digest, piece)
        return number if number >= 0 else self._refer(digest)

    def _refer(self, digest: bytes) -> int:
        number = self._foreign_numbers.setdefault(digest, len(self.foreign))
        if number == len(self.foreign):
            self.foreign.append(digest)
        return -1 - number

    def _take(self, digest: bytes, piece: bytes) -> int:
        number = self._known[digest] = len(self._own)
        self._own.append(digest)
        self._lengths.append(len(piece))
        self._pending.append(piece)
        self._pending_bytes += len(piece)
        if self._pending_bytes >= PACK_BYTES:
            self._flush()
        return number

    def _flush(self) -> None:
        if self._pending:
            self.layers.append(self._writer.blob(PACK_TYPE, compress(b"".join(self._pending))))
            self.packs.append(len(self._pending))
            self._pending, self._pending_bytes = [], 0

    def finish(self) -> Descriptor:
        """Write what is left, and the table of all chunks."""
        self._flush()
        table = b"".join(self._own) + self._lengths.tobytes() + b"".join(self.foreign)
        return self._writer.blob(CHUNKS_TYPE, compress(table, 1))


class ChunkTable:
    """Digests and lengths of all chunks, by number."""

    def __init__(self, raw: bytes, own: int, foreign: int) -> None:
        """Raises Damaged."""
        table = decompress(raw, MAX_CHUNKS, "table of chunks")
        if len(table) != own * (DIGEST + _LENGTH) + foreign * DIGEST:
            raise Damaged("the export's table of chunks has another size than it should")
        self._own = memoryview(table)[: own * DIGEST]
        self.lengths = array("I", table[own * DIGEST : own * (DIGEST + _LENGTH)])
        self._foreign = memoryview(table)[own * (DIGEST + _LENGTH) :]
        self.own, self.foreign = own, foreign

    def digest(self, number: int) -> bytes:
        """Of a chunk; -1 - number for foreign ones. Raises Damaged."""
        table, index = (self._own, number) if number >= 0 else (self._foreign, -1 - number)
        if (index + 1) * DIGEST > len(table):
            raise Damaged(f"the export makes no sense: it has no chunk {number}")
        return bytes(table[index * DIGEST : (index + 1) * DIGEST])


class Spool:
    """A file with all the export's own chunks, each at a multiple of a page, so that files can share its blocks."""

    def __init__(self, fd: int, table: ChunkTable) -> None:
        self.fd = fd
        self._table = table
        self.places = array("Q")
        self._end = 0

    def add(self, raw: bytes, count: int, limit: int) -> None:
        """The next pack's `count` chunks, compressed. Raises Damaged unless each is what the table says."""
        pack = decompress(raw, limit, "pack")
        first, at = len(self.places), 0
        buffer = bytearray()
        for number in range(first, first + count):
            length = self._table.lengths[number]
            piece = pack[at : at + length]
            if len(piece) != length or blake3(piece).digest() != self._table.digest(number):
                raise Damaged(f"chunk {number} of the export is damaged")
            self.places.append(self._end + len(buffer))
            buffer += piece
            buffer += bytes(-length % PAGE)
            at += length
        if at != len(pack):
            raise Damaged("a pack of the export has more in it than its chunks")
        _write(self.fd, buffer, self._end)
        self._end += len(buffer)


def _write(fd: int, buffer: bytearray, at: int) -> None:
    view = memoryview(buffer)
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done


class Finder:
    """A Sink that notes where wanted chunks are: (tree's name, file, offset), by digest."""

    def __init__(self, wanted: Iterable[bytes] | None) -> None:
        """`wanted`: None: all, but only their digests."""
        self.digests: set[bytes] = set()
        self.places: dict[bytes, tuple[str, Parts, int]] = {}
        self.tree = ""
        self._wanted = None if wanted is None else set(wanted)

    def add(self, digest: bytes, piece: bytes, parts: Parts, at: int) -> int:
        if self._wanted is None:
            self.digests.add(digest)
        elif digest in self._wanted:
            self.places.setdefault(digest, (self.tree, parts, at))
        return 0
