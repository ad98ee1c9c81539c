"""What references mean in a given index."""

from __future__ import annotations

import string

from podtree.errors import NotFound
from podtree.pool import refs
from podtree.pool.index import Index, Row
from podtree.pool.records import CheckpointId, to_datetime

_SHORTEST_PREFIX = 3


def pod_row(index: Index, ref: str, *, removed: bool = False) -> Row:
    """The row of the pod of that name, id, or unique beginning of an id; with `removed` also of ended lines."""
    found = index.row("SELECT * FROM pods WHERE name = ? AND NOT removed", ref)
    found = found or index.row("SELECT * FROM pods WHERE id = ? AND removed <= ?", ref, int(removed))
    if found is not None:
        return found
    if removed:
        found = index.row("SELECT * FROM pods WHERE name = ? ORDER BY created_ns DESC LIMIT 1", ref)
        if found is not None:
            return found
    if _is_prefix(ref):
        several = index.rows("SELECT * FROM pods WHERE substr(id, 1, ?) = ? AND NOT removed", len(ref), ref)
        if len(several) == 1:
            return several[0]
        if several:
            raise NotFound(f"{ref} may be any of " + ", ".join(f"{row['name']} ({row['id']})" for row in several))
    raise NotFound(f"there is no pod {ref}", "podtree ps shows what there is")


def _is_prefix(word: str) -> bool:
    return len(word) >= _SHORTEST_PREFIX and set(word) <= set(string.hexdigits.lower())


def checkpoint_id(index: Index, ref: str, now_ns: int | None = None) -> CheckpointId:
    """The checkpoint that a reference means. Raises NotFound, UsageError."""
    match refs.parse(ref, now_ns):
        case refs.ByName(word):
            return _by_name(index, word)
        case refs.Latest(pod):
            return _latest(index, pod_row(index, pod, removed=True))
        case refs.ByNumber(pod, number):
            return _by_number(index, pod_row(index, pod, removed=True), number)
        case refs.AtTime(pod, time_ns):
            return _at_time(index, pod_row(index, pod, removed=True), time_ns)


def _by_name(index: Index, word: str) -> CheckpointId:
    for query in (
        "SELECT checkpoint FROM tags WHERE name = ?",
        "SELECT id FROM checkpoints WHERE id = ?",
    ):
        row = index.row(query, word)
        if row is not None:
            return CheckpointId(row[0])
    if index.row("SELECT 1 FROM pods WHERE name = ?", word) is None and _is_prefix(word):
        several = index.rows("SELECT id FROM checkpoints WHERE substr(id, 1, ?) = ? LIMIT 6", len(word), word)
        if len(several) == 1:
            return CheckpointId(several[0][0])
        if several:
            raise NotFound(f"{word} may be any of " + ", ".join(row[0] for row in several))
    try:
        pod = pod_row(index, word, removed=True)
    except NotFound:
        raise NotFound(f"no checkpoint, tag or pod is called {word}", "podtree log shows what there is") from None
    return _latest(index, pod)


def _latest(index: Index, pod: Row) -> CheckpointId:
    row = index.row("SELECT id FROM checkpoints WHERE pod = ? ORDER BY number DESC LIMIT 1", pod["id"])
    if row is None:
        raise NotFound(f"pod {pod['name']} has no checkpoint yet", f"podtree checkpoint {pod['name']}")
    return CheckpointId(row[0])


def _by_number(index: Index, pod: Row, number: int) -> CheckpointId:
    row = index.row("SELECT id FROM checkpoints WHERE pod = ? AND number = ?", pod["id"], number)
    if row is not None:
        return CheckpointId(row[0])
    if 0 < number < pod["next_number"]:
        raise NotFound(f"checkpoint {pod['name']}@{number} has been discarded")
    has = index.rows("SELECT min(number), max(number) FROM checkpoints WHERE pod = ?", pod["id"])[0]
    hint = f"it has @{has[0]} to @{has[1]}" if has[0] else f"podtree checkpoint {pod['name']}"
    raise NotFound(f"there is no checkpoint {pod['name']}@{number}", hint)


def _at_time(index: Index, pod: Row, time_ns: int) -> CheckpointId:
    """The newest of the pod's checkpoints up to then; before its first, its line of descent is followed."""
    row = index.row(
        "SELECT id FROM checkpoints WHERE pod = ? AND time_ns <= ? ORDER BY time_ns DESC, number DESC LIMIT 1",
        pod["id"],
        time_ns,
    )
    row = row or index.row(
        """
        WITH RECURSIVE line(id, parent, time_ns) AS (
            SELECT id, parent, time_ns FROM checkpoints WHERE id = ?1
            UNION SELECT c.id, c.parent, c.time_ns FROM checkpoints c JOIN line l ON c.id = l.parent
        )
        SELECT id FROM line WHERE time_ns <= ?2 ORDER BY time_ns DESC LIMIT 1
        """,
        pod["parent"],
        time_ns,
    )
    if row is not None:
        return CheckpointId(row[0])
    first = index.rows("SELECT min(time_ns) FROM checkpoints WHERE pod = ?", pod["id"])[0][0]
    raise NotFound(
        f"pod {pod['name']} has no checkpoint as old as {to_datetime(time_ns):%Y-%m-%d %H:%M:%S}",
        f"its first is from {to_datetime(first):%Y-%m-%d %H:%M:%S}" if first else "",
    )
