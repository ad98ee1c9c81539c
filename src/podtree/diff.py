"""What differs between two checkpoints: processes, descriptors, memory pages, files.

Works on snapshots alone, without a process in sight: the manifests, the page sums, the volumes.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from podtree.image import manifest as manifest_file
from podtree.image.manifest import Manifest
from podtree.image.pages import Run, load_map, subtract_runs
from podtree.objects.held import path_bytes
from podtree.objects.kinds import FileState
from podtree.objects.processes import Process

HIDDEN = ".podtree"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One side: the directories `img` and `vol` of a checkpoint, and what lies below its volume."""

    img: Path
    vol: Path
    lower: Path  # the read-only root file system

    def manifest(self) -> Manifest:
        """The checkpoint's manifest; raises Damaged."""
        fd = os.open(self.img, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return manifest_file.load(fd)
        finally:
            os.close(fd)


class DescriptorChange(msgspec.Struct, frozen=True):
    """Descriptor `fd`: what it was and what it is; empty where it isn't."""

    fd: int
    before: str
    after: str


class ProcessChange(msgspec.Struct, frozen=True, kw_only=True):
    """One process. `state` is "added", "removed", "changed" or "same"."""

    pid: int
    comm: str
    state: str
    threads: tuple[int, int]  # before, after
    pages_changed: int  # of 4096 bytes, private memory
    pages_added: int
    pages_removed: int
    descriptors: tuple[DescriptorChange, ...]


class FileChange(msgspec.Struct, frozen=True):
    """One file of the volume: "added", "changed" or "removed"; size in bytes after the change."""

    path: str
    state: str
    size: int


class Difference(msgspec.Struct, frozen=True):
    """All that differs from the first to the second."""

    processes: tuple[ProcessChange, ...]
    files: tuple[FileChange, ...]


def diff(before: Snapshot, after: Snapshot) -> Difference:
    """Compare two checkpoints. Raises Damaged if one can't be read."""
    return Difference(tuple(_processes(before, after)), tuple(_files(before, after)))


# --- processes


def _comm(process: Process) -> str:
    return process.threads[0].comm.decode(errors="replace")


def _processes(before: Snapshot, after: Snapshot) -> Iterator[ProcessChange]:
    old, new = before.manifest(), after.manifest()
    old_by_pid = {p.place.pid: p for p in old.processes}
    new_by_pid = {p.place.pid: p for p in new.processes}
    for pid in sorted(old_by_pid.keys() | new_by_pid.keys()):
        a, b = old_by_pid.get(pid), new_by_pid.get(pid)
        changed, added, removed = _pages(before.img, a, after.img, b)
        descriptors = tuple(_descriptors(_describe_fds(old, a), _describe_fds(new, b)))
        threads = (len(a.threads) if a else 0, len(b.threads) if b else 0)
        same = not (changed or added or removed or descriptors) and threads[0] == threads[1]
        state = "added" if a is None else "removed" if b is None else "same" if same else "changed"
        present = b or a
        assert present is not None
        yield ProcessChange(
            pid=pid,
            comm=_comm(present),
            state=state,
            threads=threads,
            pages_changed=changed,
            pages_added=added,
            pages_removed=removed,
            descriptors=descriptors,
        )


def _describe_fds(manifest: Manifest, process: Process | None) -> dict[int, str]:
    if process is None:
        return {}
    by_id = {f.id: f for f in manifest.files}
    return {fd.fd: _describe(by_id[fd.file].what, by_id[fd.file].pos) for fd in process.fds}


def _describe(what: FileState, pos: int) -> str:
    """A file state in one line: its kind and what tells it apart."""
    data = msgspec.to_builtins(what)
    kind = data.pop("type", type(what).__name__)
    for name in ("path", "name", "local", "number", "index", "pid"):
        value = data.get(name)
        if value not in (None, ""):
            if name in ("path", "name"):
                value = _readable(path_bytes(value))
            return f"{kind} {value}" + (f" @{pos}" if pos else "")
    return str(kind) + (f" @{pos}" if pos else "")


def _descriptors(before: dict[int, str], after: dict[int, str]) -> Iterator[DescriptorChange]:
    for fd in sorted(before.keys() | after.keys()):
        if before.get(fd) != after.get(fd):
            yield DescriptorChange(fd, before.get(fd, ""), after.get(fd, ""))


# --- memory


def _pages(old_img: Path, old: Process | None, new_img: Path, new: Process | None) -> tuple[int, int, int]:
    """(changed, added, removed) private pages of a process, from the checksums."""
    a = _PageSums(old_img, old)
    b = _PageSums(new_img, new)
    try:
        added = _count(subtract_runs(b.runs, a.runs))
        removed = _count(subtract_runs(a.runs, b.runs))
        common = subtract_runs(a.runs, subtract_runs(a.runs, b.runs))
        changed = sum(_differing(a.read(*run), b.read(*run)) for run in common)
        return changed, added, removed
    finally:
        a.close()
        b.close()


def _count(runs: list[Run]) -> int:
    return sum(count for _, count in runs)


def _differing(a: bytes, b: bytes) -> int:
    if a == b:
        return 0
    return sum(x != y for x, y in zip(struct.iter_unpack("<Q", a), struct.iter_unpack("<Q", b), strict=True))


class _PageSums:
    """Page map and checksums of one process in one image."""

    def __init__(self, img: Path, process: Process | None) -> None:
        self.runs: list[Run] = []
        self._fd = -1
        if process is not None:
            dir_fd = os.open(img / "mem", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self.runs = load_map(dir_fd, process.memory.pages)
                self._fd = os.open(process.memory.pages + ".sum", os.O_RDONLY | os.O_CLOEXEC, dir_fd=dir_fd)
            finally:
                os.close(dir_fd)

    def read(self, first: int, count: int) -> bytes:
        return os.pread(self._fd, count * 8, first * 8).ljust(count * 8, b"\0")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


# --- files


def _files(before: Snapshot, after: Snapshot) -> Iterator[FileChange]:
    """Compare what the volumes hold; a name without an entry there is the lower file system's."""
    old = dict(_walk(before.vol / "upper"))
    new = dict(_walk(after.vol / "upper"))
    for path in sorted(old.keys() | new.keys()):
        a, b = old.get(path), new.get(path)
        if a is not None and b is not None and _same(before, after, path, a, b):
            continue
        existed = _exists(a, before.lower / path)
        exists = _exists(b, after.lower / path)
        size = b.st_size if b is not None and exists else 0
        if exists and b is not None and stat.S_ISDIR(b.st_mode) and existed:
            continue  # a directory's own entry changes with what is in it
        if exists or existed:
            state = "changed" if exists and existed else "added" if exists else "removed"
            yield FileChange("/" + _readable(os.fsencode(path)), state, size)


def _walk(top: Path) -> Iterator[tuple[str, os.stat_result]]:
    """(relative path, lstat) of everything in an overlay's upper directory but the hidden one."""
    stack = [""]
    while stack:
        relative = stack.pop()
        with contextlib.suppress(FileNotFoundError), os.scandir(top / relative) as entries:
            for entry in entries:
                name = os.path.join(relative, entry.name)
                if name == HIDDEN:
                    continue
                yield name, entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    stack.append(name)


def _readable(path: bytes) -> str:
    """A path as text; bytes that are no UTF-8 as \\xNN."""
    return path.decode(errors="backslashreplace")


def _is_whiteout(info: os.stat_result) -> bool:
    """overlayfs marks a removed lower file with a 0:0 character device."""
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0


def _exists(upper: os.stat_result | None, lower: Path) -> bool:
    return os.path.lexists(lower) if upper is None else not _is_whiteout(upper)


def _same(before: Snapshot, after: Snapshot, path: str, a: os.stat_result, b: os.stat_result) -> bool:
    """Equal as far as a program can see, times of change apart."""
    if (a.st_mode, a.st_uid, a.st_gid, a.st_size, a.st_rdev) != (b.st_mode, b.st_uid, b.st_gid, b.st_size, b.st_rdev):
        return False
    if (a.st_ino, a.st_mtime_ns, a.st_ctime_ns) == (b.st_ino, b.st_mtime_ns, b.st_ctime_ns):
        return True
    if stat.S_ISREG(a.st_mode):
        return filecmp.cmp(before.vol / "upper" / path, after.vol / "upper" / path, shallow=False)
    if stat.S_ISLNK(a.st_mode):
        return os.readlink(before.vol / "upper" / path) == os.readlink(after.vol / "upper" / path)
    return True
