"""BTF: where the members of this very kernel's structures lie. Documentation/bpf/btf.rst (Linux 6.18).

/sys/kernel/btf/vmlinux describes every C type of the running kernel, so offsets are looked up, never guessed
from a version.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from typing import NamedTuple

VMLINUX = "/sys/kernel/btf/vmlinux"
MAGIC = 0xEB9F
INT, PTR, ARRAY, STRUCT, UNION, ENUM, TYPEDEF, ENUM64 = 1, 2, 3, 4, 5, 6, 8, 19
DECORATIONS = (TYPEDEF, 9, 10, 11, 18)  # and volatile, const, restrict, a tag: the type itself comes behind
_HEADER = struct.Struct("<HBBIIIII")
#: Words behind a type's three, by kind; those with members have some for each.
_FIXED = {INT: 1, ARRAY: 3, 14: 1, 17: 1}
_PER_MEMBER = {STRUCT: 3, UNION: 3, ENUM: 2, 13: 2, 15: 3, ENUM64: 3}


class Member(NamedTuple):
    """Where a member is: `offset` and `size` in bytes."""

    offset: int
    size: int


class Btf:
    """The types of a kernel. Raises OSError without the file, ValueError if it is of another format."""

    def __init__(self, path: str = VMLINUX) -> None:
        with open(path, "rb") as file:
            self._data = file.read()
        magic, _, _, length, types, types_length, strings, _ = _HEADER.unpack_from(self._data)
        if magic != MAGIC:
            raise ValueError(f"{path} is no BTF of this machine's byte order")
        self._strings = length + strings
        self._words = array("I", self._data[length + types : length + types + types_length])
        self._starts = array("I", [0])  # by type id: index of the type's first word
        self._structs: dict[int, int] = {}  # offset of the name -> id of the first struct so called
        self._walk()
        self._known: dict[tuple[str, str], Member] = {}
        self._sizes: dict[str, int] = {}

    def _walk(self) -> None:
        words, starts, structs = self._words, self._starts, self._structs
        at, end = 0, len(words)
        while at < end:
            kind = words[at + 1] >> 24 & 31
            if kind == STRUCT and words[at + 1] & 0xFFFF:
                structs.setdefault(words[at], len(starts))
            starts.append(at)
            at += 3 + (words[at + 1] & 0xFFFF) * _PER_MEMBER[kind] if kind in _PER_MEMBER else 3 + _FIXED.get(kind, 0)

    def size(self, name: str) -> int:
        """Bytes of `struct name`. KeyError if there is none."""
        if name not in self._sizes:
            self._sizes[name] = self._words[self._starts[self._struct(name)] + 2]
        return self._sizes[name]

    def member(self, name: str, path: str) -> Member:
        """A member of `struct name`; `path` may lead through embedded ones: "sk_receive_queue.next".

        Members of anonymous structures and unions count as those of what they are in. KeyError without it.
        """
        known = self._known.get((name, path))
        if known is None:
            known = self._known[name, path] = self._find(name, path)
        return known

    def has(self, name: str, path: str) -> bool:
        """Whether there is such a member."""
        try:
            self.member(name, path)
        except KeyError:
            return False
        return True

    def _find(self, name: str, path: str) -> Member:
        kind, offset = self._struct(name), 0
        for part in path.split("."):
            found = next((one for one in self._members(kind) if one[0] == part), None)
            if found is None:
                raise KeyError(f"struct {name} has no {path} in this kernel")
            offset, kind = offset + found[1], found[2]
        return Member(offset, self._size(kind))

    def _struct(self, name: str) -> int:
        at = self._data.find(b"\0" + name.encode() + b"\0", self._strings)
        while at >= 0:  # a name may also be the end of a longer string's, but not with a NUL before it
            if (offset := at + 1 - self._strings) in self._structs:
                return self._structs[offset]
            at = self._data.find(b"\0" + name.encode() + b"\0", at + 1)
        raise KeyError(f"no struct {name} in this kernel")

    def _members(self, type_id: int) -> Iterator[tuple[str, int, int]]:
        """(name, offset in bytes, type id) of all members that begin on a byte, anonymous ones opened."""
        type_id = self._plain(type_id)
        at = self._starts[type_id]
        info = self._words[at + 1]
        if info >> 24 & 31 not in (STRUCT, UNION):
            return
        members = self._words[at + 3 : at + 3 + 3 * (info & 0xFFFF)]
        for name, kind, where in zip(members[::3], members[1::3], members[2::3], strict=True):
            bits = where & 0xFFFFFF if info >> 31 else where
            if (info >> 31 and where >> 24) or bits % 8:
                continue  # a bit field
            if name:
                yield self._name(name), bits // 8, kind
            else:
                for inner, offset, inner_kind in self._members(kind):
                    yield inner, bits // 8 + offset, inner_kind

    def _name(self, offset: int) -> str:
        start = self._strings + offset
        return self._data[start : self._data.index(b"\0", start)].decode()

    def _plain(self, type_id: int) -> int:
        while self._words[self._starts[type_id] + 1] >> 24 & 31 in DECORATIONS:
            type_id = self._words[self._starts[type_id] + 2]
        return type_id

    def _size(self, type_id: int) -> int:
        at = self._starts[self._plain(type_id)]
        kind = self._words[at + 1] >> 24 & 31
        if kind == PTR:
            return 8
        if kind == ARRAY:
            return self._size(self._words[at + 3]) * self._words[at + 5]
        return self._words[at + 2] if kind in (INT, STRUCT, UNION, ENUM, ENUM64) else 0

