"""Processes that differ from one image to another: by pid, their threads, descriptors and memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from podtree.diff import describe, memoryfiles, pagesums
from podtree.diff.pagesums import PageCount
from podtree.errors import Damaged
from podtree.image.manifest import Manifest
from podtree.objects.files import RegularFile
from podtree.objects.memfd import MemoryFile
from podtree.objects.memory import VmaKind
from podtree.objects.processes import Process


class DescriptorChange(msgspec.Struct, frozen=True):
    """Descriptor `fd`: what it was and what it is; empty where it isn't."""

    fd: int
    before: str
    after: str


class ProcessChange(msgspec.Struct, frozen=True, kw_only=True):
    """One process. `state` is "added", "removed", "changed" or "same"; pages are of 4096 bytes.

    `before` is its name before, where that was another. Shared pages are those of all memory files that it has
    mapped (shared anonymous memory, memfd, /dev/shm, System V), added and removed ones included.
    """

    pid: int
    comm: str
    before: str = ""
    state: str
    threads: tuple[int, int]  # before, after
    pages_changed: int  # private memory
    pages_added: int
    pages_removed: int
    shared_pages_changed: int
    descriptors: tuple[DescriptorChange, ...]


def changes(
    old_img: Path | None, old: Manifest | None, new_img: Path | None, new: Manifest | None
) -> Iterator[ProcessChange]:
    """All processes of both sides, by pid. Raises Damaged, OSError."""
    before, after = _Side(old_img, old), _Side(new_img, new)
    for pid in sorted(before.processes.keys() | after.processes.keys()):
        yield _change(pid, before, after)


class _Side:
    """The processes of one image."""

    def __init__(self, img: Path | None, manifest: Manifest | None) -> None:
        self.img = img
        self.manifest = manifest
        self.processes = {p.place.pid: p for p in manifest.processes} if manifest is not None else {}
        self._memory_files = memoryfiles.entries(manifest)

    def pages(self, process: Process | None) -> Path | None:
        """Its file of pages."""
        if process is None or self.img is None:
            return None
        name = process.memory.pages
        if not (name.isascii() and name.isdigit()):
            raise Damaged(f"the image names a page file {name!r}")
        return self.img / "mem" / name

    def shared(self, process: Process | None) -> set[str]:
        """The keys of the memory files that it has mapped."""
        if process is None or self.manifest is None:
            return set()
        files = {file.id: file.what for file in self.manifest.files}
        segments = {segment.id: segment.contents_key for segment in self.manifest.ipc.segments}
        found: set[str] = set()
        for vma in process.memory.vmas:
            what = files.get(vma.file)
            if vma.kind is VmaKind.SYSV:
                found.add(segments.get(vma.file, ""))
            elif vma.kind is VmaKind.FILE and isinstance(what, MemoryFile):
                found.add(what.key)
            elif vma.kind is VmaKind.FILE and isinstance(what, RegularFile) and what.path in self._memory_files:
                found.add(self._memory_files[what.path].key)
        return found - {""}

    def descriptors(self, process: Process | None) -> dict[int, str]:
        """What its descriptors are, in words."""
        if process is None or self.manifest is None:
            return {}
        files = {file.id: file for file in self.manifest.files}
        found = {}
        for fd in process.fds:
            if fd.file not in files:
                raise Damaged(f"descriptor {fd.fd} of process {process.place.pid} is of no open file")
            found[fd.fd] = describe.open_file(files[fd.file])
        return found


def _change(pid: int, before: _Side, after: _Side) -> ProcessChange:
    a, b = before.processes.get(pid), after.processes.get(pid)
    pages = pagesums.count(before.pages(a), after.pages(b))
    shared = _shared_pages(before, a, after, b)
    descriptors = tuple(_descriptors(before.descriptors(a), after.descriptors(b)))
    threads = (len(a.threads) if a else 0, len(b.threads) if b else 0)
    was, name = _comm(a), _comm(b)
    same = not (pages.all or shared or descriptors) and threads[0] == threads[1] and was == name
    return ProcessChange(
        pid=pid,
        comm=name or was,
        before=was if name and was != name else "",
        state="added" if a is None else "removed" if b is None else "same" if same else "changed",
        threads=threads,
        pages_changed=pages.changed,
        pages_added=pages.added,
        pages_removed=pages.removed,
        shared_pages_changed=shared,
        descriptors=descriptors,
    )


def _comm(process: Process | None) -> str:
    return "" if process is None else process.comm.decode(errors="backslashreplace")


def _shared_pages(before: _Side, a: Process | None, after: _Side, b: Process | None) -> int:
    old, new = before.shared(a), after.shared(b)
    counts: list[PageCount] = []
    for key in old | new:
        one = memoryfiles.pages_of(before.img, key) if key in old else None
        other = memoryfiles.pages_of(after.img, key) if key in new else None
        counts.append(pagesums.count(one, other))
    return sum(count.all for count in counts)


def _descriptors(before: dict[int, str], after: dict[int, str]) -> Iterator[DescriptorChange]:
    for fd in sorted(before.keys() | after.keys()):
        if before.get(fd) != after.get(fd):
            yield DescriptorChange(fd, before.get(fd, ""), after.get(fd, ""))
