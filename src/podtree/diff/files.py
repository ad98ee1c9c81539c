"""Files that differ from one volume to another, as the pods see them.

Only what one of the pods has written is looked at: what both have from below is the same.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from podtree.diff.overlay import Entry, Parts, Tree

HIDDEN = ".podtree"
_CHUNK = 1 << 20
_KINDS = {
    stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symbolic link", stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket", stat.S_IFCHR: "character device", stat.S_IFBLK: "block device",
}  # fmt: skip


class FileChange(msgspec.Struct, frozen=True, kw_only=True):
    """One file. `state` is "added", "changed" or "removed"; `kind` and `size` (bytes) as they are after the change.

    `changes`, of a changed one: "content", "mode 0644 -> 0600", "owner 0:0 -> 1:1", "type file -> directory", ...
    """

    path: str
    state: str
    kind: str
    size: int
    changes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Traits:
    """What a program sees of a file, but for its contents and its times."""

    kind: int  # S_IFMT
    mode: int  # permission bits
    owner: tuple[int, int]
    size: int = 0
    device: tuple[int, int] = (0, 0)
    target: str = ""
    xattrs: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def word(self) -> str:
        """Its kind, for people."""
        return _KINDS.get(self.kind, "file")


def difference(path: str, before: Traits | None, after: Traits | None, *, content: bool) -> FileChange | None:
    """What is to be said of a file that one or both have; `content`: whether what two regular files hold differs."""
    name = path.encode(errors="surrogateescape").decode(errors="backslashreplace")
    if before is None or after is None:
        one = after or before
        assert one is not None
        state = "added" if before is None else "removed"
        return FileChange(path=name, state=state, kind=one.word, size=one.size if after is not None else 0)
    changes = tuple(_changes(before, after, content))
    if not changes:
        return None
    return FileChange(path=name, state="changed", kind=after.word, size=after.size, changes=changes)


def _changes(a: Traits, b: Traits, content: bool) -> Iterator[str]:
    if a.kind != b.kind:
        yield f"type {a.word} -> {b.word}"
    elif a.target != b.target:
        yield f"target {a.target} -> {b.target}".encode(errors="surrogateescape").decode(errors="backslashreplace")
    elif a.device != b.device:
        yield f"device {a.device[0]}:{a.device[1]} -> {b.device[0]}:{b.device[1]}"
    elif content:
        yield "content"
    if a.mode != b.mode and stat.S_IFLNK not in (a.kind, b.kind):
        yield f"mode {a.mode:04o} -> {b.mode:04o}"
    if a.owner != b.owner:
        yield f"owner {a.owner[0]}:{a.owner[1]} -> {b.owner[0]}:{b.owner[1]}"
    names = sorted(name for name in a.xattrs.keys() | b.xattrs.keys() if a.xattrs.get(name) != b.xattrs.get(name))
    if names:
        yield f"attributes {', '.join(names)}"


def trees(vol: Path, lower: Path) -> dict[str, Tree]:
    """A volume's merged trees by where the pod sees them: "" its root, and one for each further host file system."""
    found = {"": _tree(vol, lower)}
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(vol / "mounts")):
            point = name.replace("%2F", "/")
            found[point] = _tree(vol / "mounts" / name, Path(point))
    return found


def _tree(layer: Path, lower: Path) -> Tree:
    veil = layer / "veil"
    return Tree([layer / "upper", *([veil] if veil.is_dir() else []), lower])


def changes(before: dict[str, Tree], after: dict[str, Tree]) -> Iterator[FileChange]:
    """All that differs. A host file system that only one of the pods was given counts as unwritten in the other."""
    for point in sorted(before.keys() | after.keys()):
        a, b = before.get(point), after.get(point)
        one = a or b
        assert one is not None
        untouched = Tree(one.layers[one.own :], own=0)
        with a or untouched as old, b or untouched as new:
            yield from _Comparison(point, old, new).run()


class _Comparison:
    """Of two merged trees, directory by directory; depth costs no recursion."""

    def __init__(self, point: str, a: Tree, b: Tree) -> None:
        self._point = point
        self._a = a
        self._b = b

    def run(self) -> Iterator[FileChange]:
        tops = self._a.top(), self._b.top()
        yield from self._compare((), *tops)
        waiting: list[tuple[Parts, Entry | None, Entry | None]] = [((), *tops)]
        while waiting:
            parts, a, b = waiting.pop()
            for name, old, new in list(self._children(a, b)):
                path = (*parts, name)
                if path == (HIDDEN,):
                    continue
                yield from self._compare(path, old, new)
                if (old and old.is_directory) or (new and new.is_directory):
                    waiting.append((path, old, new))

    def _children(self, a: Entry | None, b: Entry | None) -> Iterator[tuple[str, Entry | None, Entry | None]]:
        shared = _below(self._a, a) == _below(self._b, b)
        with self._a.opened(a) as old, self._b.opened(b) as new:
            for name in sorted(old.names(own=shared) | new.names(own=shared)):
                yield name, old.entry(name), new.entry(name)

    def _compare(self, parts: Parts, a: Entry | None, b: Entry | None) -> Iterator[FileChange]:
        if (a is None and b is None) or (a is not None and b is not None and self._is_same(a, b)):
            return
        before, after = (self._traits(self._a, a), self._traits(self._b, b))
        content = False
        if before and after and before.kind == after.kind == stat.S_IFREG:
            assert a is not None and b is not None
            content = before.size != after.size or not self._equal(a, b)
        change = difference(self._point + "/" + "/".join(parts), before, after, content=content)
        if change is not None:
            yield change

    def _is_same(self, a: Entry, b: Entry) -> bool:
        """Without looking into it: both from below, or not touched since the one volume was cloned from the other."""
        if self._place(self._a, a) == self._place(self._b, b) is not None:
            return True
        own = a.places[0].layer < self._a.own and b.places[0].layer < self._b.own
        return own and _stamp(a.info) == _stamp(b.info)

    @staticmethod
    def _place(tree: Tree, entry: Entry) -> tuple[str, Parts] | None:
        place = entry.places[0]
        return (tree.layers[place.layer], place.parts) if place.layer >= tree.own else None

    def _equal(self, a: Entry, b: Entry) -> bool:
        one = self._a.open(a.places[0], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        other = self._b.open(b.places[0], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if one is None or other is None:
                return False
            return _equal(one, other)
        finally:
            for fd in (one, other):
                if fd is not None:
                    os.close(fd)

    @staticmethod
    def _traits(tree: Tree, entry: Entry | None) -> Traits | None:
        if entry is None:
            return None
        info = entry.info
        kind = stat.S_IFMT(info.st_mode)
        device = kind in (stat.S_IFCHR, stat.S_IFBLK)
        return Traits(
            kind=kind,
            mode=stat.S_IMODE(info.st_mode),
            owner=(info.st_uid, info.st_gid),
            size=info.st_size if kind == stat.S_IFREG else 0,
            device=(os.major(info.st_rdev), os.minor(info.st_rdev)) if device else (0, 0),
            target=tree.link_target(entry) if kind == stat.S_IFLNK else "",
            xattrs=tree.xattrs(entry),
        )


def _below(tree: Tree, entry: Entry | None) -> tuple[tuple[str, Parts], ...]:
    return () if entry is None or not entry.is_directory else tree.below(entry)


def _stamp(info: os.stat_result) -> tuple[int, ...]:
    """The kernel changes the ctime whenever anything of a file changes."""
    return (info.st_ino, info.st_ctime_ns, info.st_mtime_ns, info.st_mode, info.st_uid, info.st_gid, info.st_size)


def _equal(one: int, other: int) -> bool:
    """Whether two open files hold the same."""
    while True:
        a, b = os.read(one, _CHUNK), os.read(other, _CHUNK)
        if a != b:
            return False
        if not a:
            return True
