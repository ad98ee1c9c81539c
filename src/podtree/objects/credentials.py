"""Credentials of a thread: ids, groups, capabilities, securebits, no_new_privs (credentials(7), capabilities(7))."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgspec

from podtree.kernel.sys import NR
from podtree.objects import nesting
from podtree.script.task import Results, Script

PR_SET_KEEPCAPS, PR_CAPBSET_DROP, PR_GET_SECUREBITS, PR_SET_SECUREBITS = 8, 24, 27, 28
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 38, 47
PR_CAP_AMBIENT_RAISE = 2
SECBIT_KEEP_CAPS, SECBIT_NO_SETUID_FIXUP = 1 << 4, 1 << 2
CAP_VERSION_3 = 0x20080522
SETFSUID, SETFSGID = 122, 123


class Credentials(msgspec.Struct, frozen=True):
    """Ids are (real, effective, saved, file system); capability sets are bit masks."""

    uid: tuple[int, int, int, int]
    gid: tuple[int, int, int, int]
    groups: tuple[int, ...]
    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int
    securebits: int
    no_new_privs: bool


LEAVE = 0xFFFFFFFF  # (uid_t)-1: leave it as it is


@dataclass(frozen=True, slots=True)
class Seen:
    """How a thread in a user namespace of its own sees ids, and the groups that it has already."""

    uids: nesting.Ranges
    gids: nesting.Ranges
    groups: tuple[int, ...]


def _ids(text: str) -> tuple[int, int, int, int]:
    real, effective, saved, fs = (int(v) for v in text.split())
    return real, effective, saved, fs


def collect(status: dict[str, str], securebits: int) -> Credentials:
    """From /proc/PID/task/TID/status and PR_GET_SECUREBITS."""
    return Credentials(
        uid=_ids(status["Uid"]),
        gid=_ids(status["Gid"]),
        groups=tuple(int(g) for g in status["Groups"].split()),
        inheritable=int(status["CapInh"], 16),
        permitted=int(status["CapPrm"], 16),
        effective=int(status["CapEff"], 16),
        bounding=int(status["CapBnd"], 16),
        ambient=int(status["CapAmb"], 16),
        securebits=securebits,
        no_new_privs=status["NoNewPrivs"] == "1",
    )


def _translated(ranges: nesting.Ranges, ids: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(LEAVE if (own := nesting.inside(ranges, i)) is None else own for i in ids)


def ask_securebits(script: Script) -> int:
    """Add the call that reads the securebits; returns its index."""
    return script.add(NR.prctl, PR_GET_SECUREBITS, name="PR_GET_SECUREBITS")


def read_securebits(index: int, results: Results) -> int:
    """Securebits from a finished script."""
    return results.values[index]


def restore(creds: Credentials, script: Script, last_cap: int, seen: Seen | None = None) -> None:
    """Add the calls that turn a fully capable root thread into the saved one; `seen`: it is in a user namespace.

    There it has brought along what that has no number for, and groups, which it may not be allowed to set.
    Order: bounding set first (needs CAP_SETPCAP), ids while capabilities survive the change
    (NO_SETUID_FIXUP), securebits, then the capability sets; ambient last, as it needs the others.
    """
    for cap in range(last_cap + 1):
        if not creds.bounding >> cap & 1:
            script.add(NR.prctl, PR_CAPBSET_DROP, cap, 0, 0, 0, name="PR_CAPBSET_DROP")
    script.add(NR.prctl, PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0, name="PR_SET_SECUREBITS")
    uids: tuple[int, ...] = creds.uid
    gids: tuple[int, ...] = creds.gid
    wanted = creds.groups
    if seen is not None:
        uids, gids = _translated(seen.uids, creds.uid), _translated(seen.gids, creds.gid)
        wanted = _translated(seen.gids, creds.groups)
    if seen is None or creds.groups != seen.groups:
        groups = script.put(struct.pack(f"<{len(wanted)}I", *wanted)) if wanted else 0
        script.add(NR.setgroups, len(wanted), groups, name="setgroups")
    script.add(NR.setresgid, *gids[:3], name="setresgid")
    script.add(NR.setresuid, *uids[:3], name="setresuid")
    script.add(SETFSGID, gids[3])
    script.add(SETFSUID, uids[3])
    script.add(NR.prctl, PR_SET_SECUREBITS, creds.securebits, 0, 0, 0, name="PR_SET_SECUREBITS")
    header = script.put(struct.pack("<Ii", CAP_VERSION_3, 0))
    low, high = 0xFFFFFFFF, 32
    data = struct.pack(
        "<6I",
        creds.effective & low,
        creds.permitted & low,
        creds.inheritable & low,
        creds.effective >> high,
        creds.permitted >> high,
        creds.inheritable >> high,
    )
    script.add(NR.capset, header, script.put(data), name="capset")
    for cap in range(last_cap + 1):
        if creds.ambient >> cap & 1:
            script.add(NR.prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0, name="PR_CAP_AMBIENT_RAISE")
    if creds.no_new_privs:
        script.add(NR.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, name="PR_SET_NO_NEW_PRIVS")
