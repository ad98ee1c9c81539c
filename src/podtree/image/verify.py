"""Whether an image directory is whole: the manifest, and every page that it tells of, against the checksums.

`podtree.pool.verify` looks at the files, whatever they belong to; here the manifest says which there have to be.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from podtree.errors import Damaged
from podtree.image import manifest as manifest_file
from podtree.image.manifest import Manifest
from podtree.kernel.pageruns import Run
from podtree.kernel.sys import PAGE_SIZE
from podtree.objects import contents
from podtree.objects.memfd import MemoryFile

_CHUNK = 256  # pages
_PLACES = ("rootfs", "volumes")


def page_files(manifest: Manifest) -> list[str]:
    """The names in mem/ of all address spaces. Raises Damaged for one that can't be a name there."""
    names = sorted({process.memory.pages for process in manifest.processes})
    for name in names:
        if not (name.isascii() and name.isdigit()):
            raise Damaged(f"the image names a page file {name!r}")
    return names


def shared_contents(manifest: Manifest) -> dict[str, int]:
    """The keys in shm/ of all memory files, with their sizes in bytes."""
    found = {file.what.key: file.what.size for file in manifest.files if isinstance(file.what, MemoryFile)}
    found |= {entry.key: entry.size for mount in manifest.tmpfs for entry in mount.entries if entry.key}
    return found | {segment.contents_key: segment.size for segment in manifest.ipc.segments if segment.contents_key}


class SavedPages:
    """A page file to be read, every page against its checksum. Raises Damaged when it can't be opened."""

    def __init__(self, dir_fd: int, name: str) -> None:
        self._name = name
        self._pages = self._sums = -1
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._pages = os.open(name, flags, dir_fd=dir_fd)
            self._sums = os.open(name + ".sum", flags, dir_fd=dir_fd)
        except OSError as error:
            self.close()
            raise self._unreadable(error) from error

    @property
    def descriptors(self) -> tuple[int, int]:
        """What a fork has to keep open."""
        return self._pages, self._sums

    def close(self) -> None:
        for fd in self.descriptors:
            if fd >= 0:
                os.close(fd)

    def read(self, first: int, buffer: memoryview) -> None:
        """Fill `buffer` with whole pages from page `first` on. Raises Damaged, naming the first that differs."""
        count = len(buffer) // PAGE_SIZE
        try:
            size = os.preadv(self._pages, [buffer], first * PAGE_SIZE)
            wanted = os.pread(self._sums, count * 8, first * 8)
        except OSError as error:
            raise self._unreadable(error) from error
        if size < len(buffer) or len(wanted) < count * 8:
            raise Damaged(f"page file {self._name} is cut off")
        digest = xxhash.xxh3_64_intdigest
        at = 0
        for (expected,) in struct.iter_unpack("<Q", wanted):
            if digest(buffer[at : at + PAGE_SIZE]) != expected:
                raise Damaged(f"page {first + at // PAGE_SIZE} of page file {self._name} is damaged")
            at += PAGE_SIZE

    def _unreadable(self, error: OSError) -> Damaged:
        return Damaged(f"page file {self._name} can't be read: {error.strerror}")


def verify_pages(dir_fd: int, name: str, runs: Iterable[Run]) -> None:
    """Compare these pages of page file `name` with their checksums. Raises Damaged, naming the first that differs."""
    pages = SavedPages(dir_fd, name)
    buffer = memoryview(bytearray(_CHUNK * PAGE_SIZE))
    try:
        for first, count in runs:
            for start in range(first, first + count, _CHUNK):
                pages.read(start, buffer[: min(_CHUNK, first + count - start) * PAGE_SIZE])
    finally:
        pages.close()


def verify_shared(image_fd: int, manifest: Manifest) -> None:
    """Every page of every memory file. Raises Damaged."""
    for key, size in shared_contents(manifest).items():
        contents.verify(image_fd, key, size)


def _same_spec(one: Any, other: Any) -> bool:
    """Whether two specs say the same of what both know: an import may have changed what names places of one machine,
    and was perhaps made by a newer podtree, whose specs have more fields.
    """
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return False
    return all(one[key] == other[key] for key in one.keys() & other.keys() if key not in _PLACES)


def problems(image: Path, spec: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(file, what is wrong) of what only the manifest tells: is it one, are the files there that it speaks of,
    is the pod's `spec` the one that it was saved with. The pages' checksums aren't looked at.
    """
    try:
        fd = os.open(image, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        yield "", os.strerror(error.errno or 0)
        return
    try:
        manifest = manifest_file.load(fd)
        if not _same_spec(msgspec.json.decode(manifest.spec), spec):
            yield "manifest", "was saved with another spec than meta.json has"
        files = [f"mem/{name}" for name in page_files(manifest)]
        files += [f"{contents.DIRECTORY}/{contents.check_key(key)}" for key in shared_contents(manifest)]
    except (Damaged, msgspec.DecodeError) as error:
        yield "manifest", str(error)
        return
    finally:
        os.close(fd)
    for name in files:
        for suffix in ("", ".sum", ".map"):
            if not (image / f"{name}{suffix}").is_file():
                yield f"{name}{suffix}", "is missing"
