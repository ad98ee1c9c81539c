"""What may go: pure bookkeeping inside one transaction of the index.

A checkpoint is *needed* while a tag, or a pod that wasn't removed, is it, owns it or descends from it.
"""

from __future__ import annotations

import json
import sqlite3

import msgspec

from podtree.errors import Conflict
from podtree.pool.records import CheckpointId, PodId

_UNNEEDED = """
WITH RECURSIVE needed(id) AS (
    SELECT checkpoint FROM tags
    UNION SELECT head FROM pods WHERE NOT removed AND head IS NOT NULL
    UNION SELECT parent FROM pods WHERE NOT removed AND parent IS NOT NULL
    UNION SELECT c.id FROM checkpoints c JOIN pods p ON p.id = c.pod WHERE NOT p.removed
    UNION SELECT c.parent FROM checkpoints c JOIN needed n ON n.id = c.id WHERE c.parent IS NOT NULL
)
SELECT id FROM checkpoints WHERE id NOT IN (SELECT id FROM needed)
"""


class Removed(msgspec.Struct, frozen=True, kw_only=True):
    """What a removal took out of the index; their directories go next."""

    pods: tuple[PodId, ...] = ()
    checkpoints: tuple[CheckpointId, ...] = ()


def unneeded(connection: sqlite3.Connection) -> tuple[CheckpointId, ...]:
    """Checkpoints that nothing refers to or descends from."""
    return tuple(CheckpointId(row[0]) for row in connection.execute(_UNNEEDED))


def remove_pod(connection: sqlite3.Connection, pod: PodId) -> Removed:
    """Take the pod out, and the checkpoints that nothing needs without it.

    Its row stays, marked, while checkpoints of it do: they are still known by its name.
    """
    connection.execute("UPDATE pods SET removed = 1, head = NULL, init_pid = NULL WHERE id = ?", (pod,))
    return Removed(pods=(pod,), checkpoints=remove_unneeded(connection))


def remove_unneeded(connection: sqlite3.Connection) -> tuple[CheckpointId, ...]:
    """Take out all unneeded checkpoints, and rows of removed pods that no checkpoint speaks of any more."""
    gone = unneeded(connection)
    if gone:
        ids = json.dumps(gone)
        # Only removed pods can still point at them, and only as their parent.
        connection.execute(
            "UPDATE pods SET parent = NULL WHERE parent IN (SELECT value FROM json_each(?))", (ids,)
        )
        connection.execute("DELETE FROM checkpoints WHERE id IN (SELECT value FROM json_each(?))", (ids,))
    connection.execute("DELETE FROM pods WHERE removed AND id NOT IN (SELECT pod FROM checkpoints)")
    return gone


def remove_checkpoint(connection: sqlite3.Connection, checkpoint: CheckpointId) -> Removed:
    """Take one checkpoint out; whatever descends from it descends from its parent then.

    Raises Conflict when it is tagged.
    """
    tags = [row[0] for row in connection.execute("SELECT name FROM tags WHERE checkpoint = ?", (checkpoint,))]
    if tags:
        raise Conflict(
            f"checkpoint {checkpoint} is tagged {', '.join(tags)}", f"podtree tag --delete {' '.join(tags)}"
        )
    row = connection.execute("SELECT parent FROM checkpoints WHERE id = ?", (checkpoint,)).fetchone()
    if row is None:
        return Removed()
    for table, column in (("checkpoints", "parent"), ("pods", "parent"), ("pods", "head")):
        connection.execute(f"UPDATE {table} SET {column} = ? WHERE {column} = ?", (row[0], checkpoint))
    connection.execute("DELETE FROM checkpoints WHERE id = ?", (checkpoint,))
    connection.execute("DELETE FROM pods WHERE removed AND id NOT IN (SELECT pod FROM checkpoints)")
    return Removed(checkpoints=(checkpoint,))


def replace_pod(connection: sqlite3.Connection, winner: PodId, origin: PodId) -> None:
    """`winner` takes the name, the checkpoints and the numbers of `origin`, whose row goes.

    origin@N stays what it was; the winner's own checkpoints are numbered on after them.
    """
    query = "SELECT name, next_number, parent FROM pods WHERE id = ?"
    name, shift, parent = connection.execute(query, (origin,)).fetchone()
    mine = connection.execute(query, (winner,)).fetchone()[1]
    # In two steps, since (pod, number) is unique at every row of an UPDATE, not only at its end.
    connection.execute("UPDATE checkpoints SET number = -(number + ?) WHERE pod = ?", (shift - 1, winner))
    connection.execute("UPDATE checkpoints SET number = -number WHERE pod = ?", (winner,))
    connection.execute("UPDATE checkpoints SET pod = ? WHERE pod = ?", (winner, origin))
    connection.execute("DELETE FROM pods WHERE id = ?", (origin,))
    connection.execute(
        "UPDATE pods SET name = ?, next_number = ?, parent = ? WHERE id = ?",
        (name, shift + mine - 1, parent, winner),
    )


def descends(connection: sqlite3.Connection, winner: PodId, origin: PodId) -> bool:
    """Whether pod `winner` was branched, directly or not, from a checkpoint of pod `origin`."""
    return bool(
        connection.execute(
            """
            WITH RECURSIVE line(id) AS (
                SELECT parent FROM pods WHERE id = ?1 AND parent IS NOT NULL
                UNION SELECT c.parent FROM checkpoints c JOIN line l ON l.id = c.id WHERE c.parent IS NOT NULL
            )
            SELECT 1 FROM line JOIN checkpoints c USING (id) WHERE c.pod = ?2 LIMIT 1
            """,
            (winner, origin),
        ).fetchone()
    )


def is_past(connection: sqlite3.Connection, pod: PodId, checkpoint: CheckpointId) -> bool:
    """Whether the checkpoint is one of the pod's own, or one that those, or what it was branched from, descend from."""
    return bool(
        connection.execute(
            """
            WITH RECURSIVE line(id) AS (
                SELECT parent FROM pods WHERE id = ?1 UNION SELECT head FROM pods WHERE id = ?1
                UNION SELECT id FROM checkpoints WHERE pod = ?1
                UNION SELECT c.parent FROM checkpoints c JOIN line l ON l.id = c.id
            )
            SELECT 1 FROM line WHERE id = ?2
            """,
            (pod, checkpoint),
        ).fetchone()
    )


def line_of(connection: sqlite3.Connection, checkpoint: CheckpointId) -> list[CheckpointId]:
    """The checkpoint, its parent, that one's parent..."""
    line: list[CheckpointId] = []
    at: CheckpointId | None = checkpoint
    while at is not None:
        row = connection.execute("SELECT parent FROM checkpoints WHERE id = ?", (at,)).fetchone()
        if row is None:
            break
        line.append(at)
        at = row[0]
    return line


def first_known(connection: sqlite3.Connection, line: list[CheckpointId]) -> CheckpointId | None:
    """The first of them that is still there; None if none is."""
    for checkpoint in line:
        if connection.execute("SELECT 1 FROM checkpoints WHERE id = ?", (checkpoint,)).fetchone():
            return checkpoint
    return None
