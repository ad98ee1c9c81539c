"""Rows of the index as records."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from typing import Any

from podtree.errors import Damaged
from podtree.pool import liveness
from podtree.pool.index import REMEDY
from podtree.pool.records import CheckpointId, CheckpointRecord, PodId, PodRecord, PodState, to_datetime

CHECKPOINTS = """
SELECT c.*, p.name AS pod_name,
       (SELECT group_concat(name, '/') FROM (SELECT name FROM tags WHERE checkpoint = c.id ORDER BY name)) AS tags
FROM checkpoints c JOIN pods p ON p.id = c.pod
"""


def checkpoint(row: sqlite3.Row) -> CheckpointRecord:
    """A row of CHECKPOINTS. Raises Damaged."""
    with _checked("checkpoint", row):
        return _checkpoint(row)


def pod(row: sqlite3.Row) -> PodRecord:
    """A row of pods, its state as it is now: a running pod whose processes are gone shows as lost. Raises Damaged."""
    with _checked("pod", row):
        return _pod(row)


@contextlib.contextmanager
def _checked(what: str, row: sqlite3.Row) -> Iterator[None]:
    """SQLite has no checksums: what a flipped bit made of a row comes out as one of these."""
    try:
        yield
    except (LookupError, ValueError, TypeError, OverflowError, OSError) as error:
        raise Damaged(f"the index is damaged, at {what} {row[0]!r}: {error}", REMEDY) from None


def _checkpoint(row: sqlite3.Row) -> CheckpointRecord:
    to_datetime(row["time_ns"])
    return CheckpointRecord(
        id=CheckpointId(row["id"]),
        pod=PodId(row["pod"]),
        pod_name=row["pod_name"],
        number=row["number"],
        parent=_id(row["parent"]),
        time_ns=row["time_ns"],
        message=row["message"],
        summary=_object(row["summary"]),
        tags=tuple(row["tags"].split("/")) if row["tags"] else (),
    )


def _pod(row: sqlite3.Row) -> PodRecord:
    for time_ns in (row["created_ns"], row["ended_ns"]):
        to_datetime(time_ns or 0)
    state = PodState(row["state"])
    if state is PodState.RUNNING and not _runs(row):
        state = PodState.LOST
    running = state is PodState.RUNNING
    return PodRecord(
        id=PodId(row["id"]),
        name=row["name"],
        state=state,
        created_ns=row["created_ns"],
        parent=_id(row["parent"]),
        head=_id(row["head"]),
        spec=_object(row["spec"]),
        init_pid=row["init_pid"] if running else None,
        monitor_pid=row["monitor_pid"] if running else None,
        exit_code=row["exit_code"],
        ended_ns=row["ended_ns"],
        removed=bool(row["removed"]),
    )


def _object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("not an object")
    return found


def _id(text: str | None) -> CheckpointId | None:
    return None if text is None else CheckpointId(text)


def _runs(row: sqlite3.Row) -> bool:
    # While the process that watches the pod is there, it is about to note the end.
    boot = row["boot_id"]
    return liveness.is_alive(row["init_pid"], row["init_start"], boot) or liveness.is_alive(
        row["monitor_pid"], row["monitor_start"], boot
    )


def as_json(value: object) -> str:
    """How specs and summaries are kept."""
    return json.dumps(value, separators=(",", ":"))
