"""The index made again, from what lies on the disk, when it is lost or damaged.

Checkpoints tell themselves what they are (meta.json). Of pods the disk knows their spec and whence they come; their
names, and the tags, come from the old index as far as it can be read, else from checkpoints. What `commit` has given
to another pod is its first pod's again.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from podtree.errors import Conflict, PodtreeError
from podtree.pool import index, locks, names, refs
from podtree.pool.pool import Pool
from podtree.pool.records import CheckpointId, CheckpointMeta, PodId, PodState


class Rebuilt(msgspec.Struct, frozen=True, kw_only=True):
    """What the new index has, and what it could not have."""

    pods: int
    checkpoints: int
    tags: int
    unreadable: tuple[str, ...]  # checkpoints without a readable meta.json
    kept: str  # where the old index lies now; "" where there was none


@dataclass
class _Old:
    """What can still be read of the old index."""

    pods: dict[str, str] = field(default_factory=dict)  # id: name
    tags: dict[str, str] = field(default_factory=dict)  # name: checkpoint


def rebuild(pool: Pool) -> Rebuilt:
    """Put a new index in the place of a damaged one; whoever has that open goes on with the new one.

    Raises Conflict when there is nothing wrong with it, or somebody works on a pod for long.
    """
    with contextlib.ExitStack() as scope:
        for pod in sorted(os.listdir(pool.store.pods)):  # no checkpoint is made meanwhile that we would miss
            scope.enter_context(pool.lock_pod(PodId(pod)))
        scope.enter_context(locks.held(str(pool.home / "lock"), what=f"the pool in {pool.home}"))
        if _is_sound(pool):
            raise Conflict("there is nothing wrong with the index", "podtree fsck looks at the rest")
        old = _read_old(pool.index.path)
        metas, unreadable = _read_metas(pool)
        pool.index.close()
        new = f"{pool.index.path}.new"
        Path(new).unlink(missing_ok=True)
        index.create(new)
        connection = sqlite3.connect(new, isolation_level=None)  # foreign keys are off: rows refer to later ones
        try:
            connection.execute("BEGIN IMMEDIATE")
            pods = _add_pods(connection, pool, metas, old)
            _add_checkpoints(connection, metas)
            tags = _add_tags(connection, old)
            connection.execute("COMMIT")
        finally:
            connection.close()
        kept = _replace(pool, new)
    return Rebuilt(pods=pods, checkpoints=len(metas), tags=tags, unreadable=tuple(unreadable), kept=kept)


def _is_sound(pool: Pool) -> bool:
    try:
        pool.pods(removed=True)
        pool.checkpoints()
        return not pool.index.check()
    except PodtreeError:
        return False


def _read_old(path: str) -> _Old:
    found = _Old()
    with contextlib.suppress(sqlite3.Error, OSError):
        connection = sqlite3.connect(f"{Path(path).as_uri()}?mode=ro", uri=True)
        try:
            for into, sql in (
                (found.pods, "SELECT id, name FROM pods WHERE NOT removed"),
                (found.tags, "SELECT name, checkpoint FROM tags"),
            ):
                with contextlib.suppress(sqlite3.Error):
                    into.update((str(a), str(b)) for a, b in connection.execute(sql))
        finally:
            connection.close()
    return found


def _read_metas(pool: Pool) -> tuple[list[CheckpointMeta], list[str]]:
    metas, unreadable = [], []
    for name in sorted(os.listdir(pool.store.ckpts)):
        try:
            metas.append(pool.store.meta(CheckpointId(name)))
        except (OSError, ValueError):
            unreadable.append(name)
    return metas, unreadable


def _add_pods(connection: sqlite3.Connection, pool: Pool, metas: list[CheckpointMeta], old: _Old) -> int:
    known = {meta.id for meta in metas}
    own: dict[str, list[CheckpointMeta]] = {}
    for meta in sorted(metas, key=lambda meta: meta.number):
        own.setdefault(meta.pod, []).append(meta)
    living = sorted(os.listdir(pool.store.pods))
    taken = set(old.tags)
    for pod in [*living, *sorted(own.keys() - set(living))]:
        checkpoints = own.get(pod, [])
        row = _pod_row(pool, PodId(pod), checkpoints, known, removed=pod not in living)
        row["name"] = _last_name(checkpoints) if row["removed"] else _free_name(_wishes(pod, checkpoints, old), taken)
        columns = ", ".join(row)
        connection.execute(f"INSERT INTO pods ({columns}) VALUES ({', '.join('?' * len(row))})", tuple(row.values()))
    return len(living)


def _pod_row(
    pool: Pool, pod: PodId, checkpoints: list[CheckpointMeta], known: set[CheckpointId], *, removed: bool
) -> dict[str, Any]:
    top = pool.pod_dir(pod)
    base = "" if removed else pool.store.base_of(pod)
    source = base.partition(" ")[0]
    newest = checkpoints[-1] if checkpoints else None
    head = newest.id if newest else source
    if newest and source and _written(top / "base") > _written(pool.checkpoint_dir(newest.id) / "meta.json"):
        head = CheckpointId(source)  # it was rewound since
    mine = {meta.id for meta in checkpoints}
    parent = checkpoints[0].parent if checkpoints and source in mine | {""} else source
    spec: Any = checkpoints[-1].spec if checkpoints else {}
    with contextlib.suppress(OSError, ValueError):
        spec = json.loads((top / "spec.json").read_bytes())
    exit_code = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        exit_code = int(json.loads((top / "exit.json").read_bytes())["code"])
    return {
        "id": pod,
        "created_ns": checkpoints[0].time_ns if checkpoints else _written(top / "spec.json"),
        "parent": parent if parent in known else None,
        "head": None if removed or head not in known else head,
        "base": base,
        "next_number": newest.number + 1 if newest else 1,
        "state": PodState.EXITED.value,
        "exit_code": exit_code,
        "removed": int(removed),
        "spec": json.dumps(spec if isinstance(spec, dict) else {}, separators=(",", ":")),
    }


def _written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _last_name(checkpoints: list[CheckpointMeta]) -> str:
    return checkpoints[-1].pod_name


def _wishes(pod: str, checkpoints: list[CheckpointMeta], old: _Old) -> Iterator[str]:
    if pod in old.pods:
        yield old.pods[pod]
    if checkpoints:
        yield _last_name(checkpoints)
    while True:
        yield names.invent()


def _free_name(wishes: Iterator[str], taken: set[str]) -> str:
    for wish in wishes:
        with contextlib.suppress(PodtreeError):
            if refs.check_name(wish, "pod") not in taken:
                taken.add(wish)
                return wish
    raise AssertionError("names can always be invented")


def _add_checkpoints(connection: sqlite3.Connection, metas: list[CheckpointMeta]) -> None:
    known = {meta.id for meta in metas}
    for meta in metas:
        connection.execute(
            "INSERT INTO checkpoints (id, pod, number, parent, time_ns, message, summary) VALUES (?,?,?,?,?,?,?)",
            (meta.id, meta.pod, meta.number, meta.parent if meta.parent in known else None, meta.time_ns,
             meta.message, json.dumps(meta.summary, separators=(",", ":"))),
        )  # fmt: skip


def _add_tags(connection: sqlite3.Connection, old: _Old) -> int:
    known = {row[0] for row in connection.execute("SELECT id FROM checkpoints")}
    tags = [(name, checkpoint, 0) for name, checkpoint in old.tags.items() if checkpoint in known]
    connection.executemany("INSERT INTO tags VALUES (?, ?, ?)", tags)
    return len(tags)


def _replace(pool: Pool, new: str) -> str:
    """The new index takes the place of the old one, which is kept, as is what SQLite had not finished with it."""
    kept = f"{pool.index.path}.damaged"
    for suffix in ("-journal", ""):
        with contextlib.suppress(FileNotFoundError):
            os.replace(pool.index.path + suffix, kept + suffix)
    os.rename(new, pool.index.path)
    pool.store.volumes.make_durable()
    return kept if os.path.exists(kept) else ""
