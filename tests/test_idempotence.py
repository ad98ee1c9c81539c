"""What is collected of a branch is what was collected of its origin: collect, checkpoint, branch, collect.

The strongest test of both directions at once: whatever a restore forgets is missing from the second manifest, also
what no program has been written to look at. The programs of tests/programs hold every kind of object.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from driver import PROGRAMS, SYSTEM_PYTHON, Podtree
from lives import cases_of, start_together
from podtree.image import manifest as manifest_file
from test_objects_in_pod import ALONE, REFUSED

PYTHON = (
    *("processes", "descriptors", "watching", "pidfds", "views", "mqueues", "aio"),
    *("sockets", "signals", "credentials", "sysvipc", "nesting"),
)
OPTIONS = {"nesting": ("--nested",)}
COMPILED = ("threads", "leaders", "sharing", "attributes", "mappings")
ACTIVE = {  # they go on changing while they are looked at
    "vfork_like_execs", "pipeline", "same_instant", "tcp_churn", "unix_churn", "tcp_stream", "interval_timers",
    "signals_under_way", "writing_all_the_time", "under_way", "busy", "robust_list", "process_shared",
    "signals",  # whose timer expires
}  # fmt: skip
MAY_DIFFER = [  # paths in the manifest, as regular expressions
    r"clock/.*",  # time goes on
    r".*/(read_ns|waited_ns|remaining)",
    r"processes/\d+/threads/\d+/(regs|xstate)",  # the programs look for their go-file again and again
    r"processes/\d+/interval_timers/.*",
    r"files/\d+/what/key",  # of a pipe, a socket: only says which belong together
    r"files/\d+/what/expires",  # recomputed, some microseconds off
    r"tmpfs/\d+/entries/\d+/atime",  # of what the programs look at
    r"last_pid",  # the shell of the pod goes on
    r"files/\d+/what/(mtime|ticks)",  # of a view of the kernel; of a timer that goes on
    r"files/\d+/what/notification/(signal|value)",  # not looked at by the kernel where nobody is told
    r"queues/\d+/atime",  # who waits in one has begun to again
    r"processes/\d+/memory/rings/\d+/data",  # entries that are free
    r"files/\d+/what/remote",  # an address without a port stays in an IPv6 socket that was connected once
    r"files/\d+/what/options/IPV6_V6ONLY",  # bind(2) to an address sets it, a connection that wasn't bound hasn't
    r"ipc/segments/\d+/creator/0",  # of a process that has ended, which the creator's stand-in has
]


def manifest(podtree: Podtree, checkpoint: str) -> Any:
    """A checkpoint's manifest as plain data."""
    raw = (podtree.home / "pool" / "ckpts" / checkpoint / "img" / "manifest").read_bytes()
    return normalized(msgspec.msgpack.decode(raw[len(manifest_file.MAGIC) + manifest_file.SUM_SIZE :]))


def normalized(image: Any) -> Any:
    """With what has no order sorted, and neighbouring mappings that are alike as one."""
    for process in image["processes"]:
        process["posix_timers"] = sorted(process.get("posix_timers", []), key=lambda timer: timer["id"])
        process["memory"]["vmas"] = joined(process["memory"]["vmas"])
    for what in (file["what"] for file in image["files"]):
        if "watches" in what:
            what["watches"] = sorted(what["watches"], key=str)
        if what.get("deleted") or what.get("gone"):  # a name that there isn't any more
            what["path"] = what["gone"] = ""
    image["ipc"]["undo"] = sorted(image["ipc"].get("undo", []), key=str)
    return image


def joined(vmas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kernel joins anonymous mappings as it likes."""
    found: list[dict[str, Any]] = []
    for vma in vmas:
        last = found[-1] if found else {"start": 0}
        private = vma["kind"] == "anon" and not vma.get("shared")
        if private and last == {**vma, "start": last["start"], "end": vma["start"]}:
            found[-1] = {**last, "end": vma["end"]}
        else:
            found.append(dict(vma))
    return found


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Where two trees of plain data differ, MAY_DIFFER excepted."""
    if any(re.fullmatch(pattern, path) for pattern in MAY_DIFFER):
        return
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys(), key=str):
            below = f"{path}/{key}" if path else str(key)
            yield from differences(one.get(key, "nothing"), other.get(key, "nothing"), below)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from differences(left, right, f"{path}/{index}")
    elif one != other:
        yield f"{path}: {str(one)[:300]} -> {str(other)[:300]}"


@pytest.mark.needs("gcc")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("program", [*PYTHON, *COMPILED])
def test_same_state_again(podtree: Podtree, compiled: Callable[[str], Path], program: str) -> None:
    source = f"{program}.py" if program in PYTHON else f"{program}.c"
    cases = [c for c in cases_of(source) if c not in ACTIVE and not {(program, c)} & (ALONE | REFUSED.keys())]
    start: list[str | Path] = [SYSTEM_PYTHON, PROGRAMS / source] if program in PYTHON else [compiled(program)]
    commands = {case: [*start, case] for case in cases}
    origin = start_together(podtree, commands, program, OPTIONS.get(program, ()))
    first = origin.checkpoint()
    origin.kill()
    branch = podtree.branch(first, origin.name)
    second = branch.checkpoint()
    found = list(differences(manifest(podtree, first), manifest(podtree, second)))
    assert not found, "\n".join(found[:40])
