"""How much memory pods take: by their own account (PSS, proc_pid_smaps(5)) and by the machine's."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import podtree
from podtree.kernel.procfs import memory_available

_STEADY = 64 << 20
_PATIENCE_S = 30


@dataclass(frozen=True)
class Taken:
    """Bytes; what several processes share is counted once."""

    programs: int
    whole: int  # with the pods' supervisors and keepers


def settled() -> int:
    """The same, once it has stood still for a second: no memory comes in or is given back any more."""
    deadline = time.monotonic() + _PATIENCE_S
    last, now = 0, memory_available()
    while abs(now - last) > _STEADY and time.monotonic() < deadline:
        time.sleep(1)
        last, now = now, memory_available()
    return now


def taken_by(pods: Iterable[podtree.Pod]) -> Taken:
    """What these pods take, now."""
    programs: set[int] = set()
    whole: set[int] = set()
    children = _children()
    for pod in pods:
        record = pod.record
        if record.init_pid is not None and record.monitor_pid is not None:
            inside = _below(record.init_pid, children)
            programs |= inside
            whole |= inside | _below(record.monitor_pid, children) | {_parent(record.monitor_pid)}
    return Taken(sum(map(_pss, programs)), sum(map(_pss, whole)))


def remove(pods: Iterable[podtree.Pod]) -> None:
    """End and remove them."""
    for pod in pods:
        pod.remove(force=True)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])  # a name can be any bytes


def _children() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            found.setdefault(_parent(int(path.name)), []).append(int(path.name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    return found


def _below(pid: int, children: dict[int, list[int]]) -> set[int]:
    found = {pid}
    for child in children.get(pid, []):
        found |= _below(child, children)
    return found


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)
