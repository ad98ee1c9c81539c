"""A checkpoint that was made in another pool."""

from __future__ import annotations

import json
import sqlite3
import time
from typing import Any

import msgspec

from podtree.errors import PodtreeError
from podtree.pool import faults, refs, retention
from podtree.pool.draft import META_VERSION
from podtree.pool.pool import Pool
from podtree.pool.records import CheckpointId, CheckpointMeta, CheckpointRecord, PodId, new_id
from podtree.pool.store import DraftDirectory


class Newcomer(msgspec.Struct, frozen=True, kw_only=True):
    """What it was where it comes from. `line`: its parent, that one's parent...; `tags`: names that it would have."""

    id: CheckpointId
    pod: PodId
    pod_name: str
    number: int
    line: tuple[CheckpointId, ...]
    time_ns: int
    message: str
    summary: dict[str, Any]
    spec: dict[str, Any]
    tags: tuple[str, ...]


def adopt(pool: Pool, draft: DraftDirectory, new: Newcomer) -> tuple[CheckpointRecord, tuple[str, ...]]:
    """Make a draft, complete with vol and img, the checkpoint `new`; its record and tags. Durable on return.

    It keeps its id. Its pod becomes one that was removed: of the same id unless such a pod is here and not removed,
    whose history is nobody else's to add to. It gets a tag of its own if none of `tags` is free: without one the next
    gc would find that nothing needs it. One process at a time may do this.
    """
    with pool.index.snapshot() as connection:
        pod, number = _place(connection, new)
        parent = retention.first_known(connection, list(new.line))
    meta = CheckpointMeta(
        version=META_VERSION, id=new.id, pod=pod, pod_name=new.pod_name, number=number, parent=parent,
        time_ns=new.time_ns, message=new.message, summary=new.summary, spec=new.spec,
    )  # fmt: skip
    pool.store.install_checkpoint(draft, meta)
    with pool.index.transaction() as connection:
        _insert(connection, meta)
        tags = [name for name in new.tags if _tag(connection, name, new.id)]
        if not tags:
            tags = [name for name in (f"imported-{new.id}",) if _tag(connection, name, new.id)]
    faults.point("adopt:indexed")
    return pool.checkpoint(new.id), tuple(tags)


def _place(connection: sqlite3.Connection, new: Newcomer) -> tuple[PodId, int]:
    row = connection.execute("SELECT removed, next_number FROM pods WHERE id = ?", (new.pod,)).fetchone()
    taken = connection.execute("SELECT 1 FROM checkpoints WHERE id = ?", (new.pod,)).fetchone()  # one space of ids
    if taken or (row is not None and not row[0]):
        return PodId(new_id()), new.number
    query = "SELECT 1 FROM checkpoints WHERE pod = ? AND number = ?"
    free = connection.execute(query, (new.pod, new.number)).fetchone() is None
    return new.pod, new.number if free or row is None else int(row[1])


def _insert(connection: sqlite3.Connection, meta: CheckpointMeta) -> None:
    connection.execute(
        "INSERT INTO pods (id, name, created_ns, state, removed, spec) VALUES (?,?,?,'exited',1,?) "
        "ON CONFLICT (id) DO NOTHING",
        (meta.pod, meta.pod_name, meta.time_ns, _json(meta.spec)),
    )
    parent = retention.first_known(connection, [meta.parent] if meta.parent else [])
    connection.execute(
        "INSERT INTO checkpoints (id, pod, number, parent, time_ns, message, summary) VALUES (?,?,?,?,?,?,?)",
        (meta.id, meta.pod, meta.number, parent, meta.time_ns, meta.message, _json(meta.summary)),
    )
    connection.execute(
        "UPDATE pods SET next_number = max(next_number, ?) WHERE id = ?", (meta.number + 1, meta.pod)
    )


def _tag(connection: sqlite3.Connection, name: str, checkpoint: CheckpointId) -> bool:
    """Give it the name, unless that is taken, or can't be one."""
    try:
        refs.check_name(name, "tag")
    except PodtreeError:
        return False
    if connection.execute("SELECT 1 FROM pods WHERE name = ? AND NOT removed", (name,)).fetchone():
        return False
    query = "INSERT INTO tags VALUES (?, ?, ?) ON CONFLICT (name) DO NOTHING"
    return connection.execute(query, (name, checkpoint, time.time_ns())).rowcount > 0


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
