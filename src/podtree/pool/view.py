"""Records as lines for a person and as plain data for JSON; knows no terminal."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from podtree.errors import printable
from podtree.pool.pending import Pending, State
from podtree.pool.records import CheckpointRecord, PodRecord, to_datetime


def iso(moment: datetime | None) -> str | None:
    """ISO 8601 with the zone, to the millisecond."""
    return None if moment is None else moment.isoformat(timespec="milliseconds")


def size(count: int | float) -> str:
    """Bytes for a person: 812 B, 3.4 MiB."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if count < 1024 or unit == "TiB":
            break
    return f"{count:.1f} {unit}"


def checkpoint_json(record: CheckpointRecord) -> dict[str, Any]:
    """A checkpoint as JSON: its record, with the summary's fields (pause_ms, bytes_written...) among them."""
    own = {
        "id": record.id,
        "pod": record.pod_name,
        "pod_id": record.pod,
        "number": record.number,
        "ref": record.ref,
        "state": State.DURABLE.value,
        "parent": record.parent,
        "time": iso(record.time),
        "tags": list(record.tags),
        "message": record.message,
    }
    return {**own, **{key: value for key, value in record.summary.items() if key not in own}}


def pending_json(note: Pending) -> dict[str, Any]:
    """A checkpoint that isn't durable, as JSON."""
    found = {"id": note.id, "state": note.state.value, "time": iso(to_datetime(note.time_ns)), "message": note.message}
    return {**found, "error": note.error} if note.error else found


def pending_line(note: Pending) -> str:
    """id, (state), time, why it is lost, message."""
    parts = [note.id, f"({note.state})", f"{to_datetime(note.time_ns):%Y-%m-%d %H:%M:%S}"]
    return "  ".join([*parts, printable(note.error), printable(note.message.partition("\n")[0])]).rstrip()


def pod_json(record: PodRecord) -> dict[str, Any]:
    """A pod as JSON."""
    return {
        "id": record.id,
        "name": record.name,
        "state": record.state.value,
        "pid": record.init_pid,
        "exit_code": record.exit_code,
        "created": iso(record.created),
        "ended": iso(record.ended),
        "parent": record.parent,
        "head": record.head,
        "spec": record.spec,
    }


def checkpoint_line(record: CheckpointRecord, pods: Iterable[PodRecord] = ()) -> str:
    """id, pod@number, (tags, pods that run on from here), time, size, message."""
    marks = [f"tag: {tag}" for tag in record.tags]
    marks += ["mark"] if "mark" in record.summary else []
    marks += [f"{pod.name}: {pod.state}" for pod in pods]
    parts = [record.id, record.ref]
    if marks:
        parts.append(f"({', '.join(marks)})")
    parts.append(f"{record.time:%Y-%m-%d %H:%M:%S}")
    written = record.summary.get("bytes_written")
    if isinstance(written, (int, float)):
        parts.append(size(written))
    first_line = printable(record.message.partition("\n")[0])
    return "  ".join([*parts, first_line]).rstrip()
