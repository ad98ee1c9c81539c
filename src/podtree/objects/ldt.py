"""Segments that a process has for itself, in its local descriptor table: modify_ldt(2).

The kernel tells descriptors as the CPU has them, and takes them as struct user_desc (arch/x86/include/asm/desc.h,
fill_ldt()).
"""

from __future__ import annotations

import struct

from podtree.errors import Damaged
from podtree.kernel import mm
from podtree.kernel.sys import NR
from podtree.script.task import Remote, Script

READ, WRITE = 0, 0x11
ENTRY = 8
MAX_SIZE = 8192 * ENTRY


def collect(remote: Remote, address: int) -> bytes:
    """All descriptors, from a stopped thread with MAX_SIZE bytes of room at `address`; those at the end that are empty
    are left out."""
    size = remote.do(NR.modify_ldt, READ, address, MAX_SIZE)
    data = mm.read_memory(remote.tid, address, size) if size else b""
    used = len(data.rstrip(b"\0"))
    return data[: -(-used // ENTRY) * ENTRY]


def user_desc(number: int, descriptor: bytes) -> bytes:
    """struct user_desc of a descriptor. Raises Damaged for what is no segment of a program."""
    low, high = struct.unpack("<II", descriptor)
    kind, system, level = high >> 8 & 0xF, high >> 12 & 1, high >> 13 & 3
    if not system or level != 3 or high >> 21 & 1:
        raise Damaged(f"the image has an impossible segment {number} in a local descriptor table")
    base = low >> 16 | (high & 0xFF) << 16 | high & 0xFF000000
    limit = low & 0xFFFF | high & 0xF0000
    bits = (high >> 22 & 1) | (kind >> 2 & 3) << 1 | (~kind >> 1 & 1) << 3
    bits |= (high >> 23 & 1) << 4 | (~high >> 15 & 1) << 5 | (high >> 20 & 1) << 6
    return struct.pack("<IIII", number, base, limit, bits)


def restore(table: bytes, script: Script) -> None:
    """Add the calls that make the segments. Raises Damaged."""
    if len(table) % ENTRY or len(table) > MAX_SIZE:
        raise Damaged(f"the image has a local descriptor table of {len(table)} bytes")
    for number in range(len(table) // ENTRY):
        descriptor = table[number * ENTRY : (number + 1) * ENTRY]
        if any(descriptor):
            segment = script.put(user_desc(number, descriptor))
            script.add(NR.modify_ldt, WRITE, segment, 16, name=f"modify_ldt of segment {number}")
