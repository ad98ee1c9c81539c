"""The tree of checkpoints as text, as `git log --graph` draws it: newest first, one line each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from podtree.pool.records import CheckpointId, CheckpointRecord, PodRecord
from podtree.pool.view import checkpoint_line

Label = Callable[[CheckpointRecord], str]


def draw(checkpoints: Iterable[CheckpointRecord], pods: Iterable[PodRecord] = (), label: Label | None = None) -> str:
    """Draw the checkpoints, joined by descent. `pods` show at the checkpoint that their live state descends from.

    A parent that isn't among `checkpoints` is left out: its children look like beginnings.
    """
    records = {record.id: record for record in checkpoints}
    if label is None:
        at = _by_head(pods)

        def label(record: CheckpointRecord) -> str:
            return checkpoint_line(record, at[record.id])

    lines: list[str] = []
    waiting: list[CheckpointId] = []  # one per column: the checkpoint that its line leads to
    for record in _order(records):
        if not waiting or waiting[-1] != record.id:
            waiting.append(record.id)
        lines.append(("| " * (len(waiting) - 1) + f"* {label(record)}").rstrip())
        if record.parent not in records:
            waiting.pop()
            lines.append("")  # or the next tree's newest would look like a parent
        elif record.parent in waiting:  # the column to the left leads there as well
            waiting.pop()
            lines.append("| " * (len(waiting) - 1) + "|/")
        else:
            waiting[-1] = record.parent
    return "\n".join(lines).rstrip("\n")


def _by_head(pods: Iterable[PodRecord]) -> dict[CheckpointId, list[PodRecord]]:
    at: dict[CheckpointId, list[PodRecord]] = defaultdict(list)
    for pod in pods:
        if pod.head is not None:
            at[pod.head].append(pod)
    return at


def _order(records: dict[CheckpointId, CheckpointRecord]) -> list[CheckpointRecord]:
    """Children before parents, whatever the clock says; subtrees in one piece, the one with the newest first.

    So a line joins its neighbour at once, and the drawing is as wide as branches are nested.
    """
    children: dict[CheckpointId | None, list[CheckpointRecord]] = defaultdict(list)
    for record in records.values():
        children[record.parent if record.parent in records else None].append(record)
    down: list[CheckpointRecord] = []  # parents before children
    stack = list(children[None])
    while stack:
        record = stack.pop()
        down.append(record)
        stack += children[record.id]
    newest: dict[CheckpointId, int] = {}
    for record in reversed(down):
        newest[record.id] = max([record.time_ns, *(newest[child.id] for child in children[record.id])])
    for siblings in children.values():
        siblings.sort(key=lambda record: (newest[record.id], record.number), reverse=True)
    return _children_first(children)


def _children_first(children: dict[CheckpointId | None, list[CheckpointRecord]]) -> list[CheckpointRecord]:
    found: list[CheckpointRecord] = []
    stack = [(record, False) for record in reversed(children[None])]
    while stack:
        record, done = stack.pop()
        if done or not children[record.id]:
            found.append(record)
        else:
            stack.append((record, True))
            stack += [(child, False) for child in reversed(children[record.id])]
    return found


def tree_of(checkpoints: Iterable[CheckpointRecord], pod: PodRecord) -> list[CheckpointRecord]:
    """Those of `checkpoints` that share a beginning with one of the pod's, or with where it was branched from."""
    records = {record.id: record for record in checkpoints}
    roots: dict[CheckpointId, CheckpointId] = {}

    def root_of(checkpoint: CheckpointId) -> CheckpointId:
        path = []
        while checkpoint not in roots:
            path.append(checkpoint)
            parent = records[checkpoint].parent
            if parent not in records:
                roots[checkpoint] = checkpoint
            else:
                checkpoint = parent
        for passed in path:
            roots[passed] = roots[checkpoint]
        return roots[checkpoint]

    own = [record.id for record in records.values() if record.pod == pod.id]
    own += [checkpoint for checkpoint in (pod.parent, pod.head) if checkpoint in records]
    wanted = {root_of(checkpoint) for checkpoint in own}
    return [record for record in records.values() if root_of(record.id) in wanted]
