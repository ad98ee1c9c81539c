"""podtree show: everything the pool knows of a pod or a checkpoint."""

from __future__ import annotations

import shlex
from typing import Any

import click

from podtree.cli import common
from podtree.errors import NotFound, printable
from podtree.pool import view
from podtree.pool.pool import Pool
from podtree.pool.records import CheckpointRecord, PodRecord


@click.command("show")
@click.argument("ref")
@common.json_flag("Print one object.")
def command(ref: str, as_json: bool) -> None:
    """Show a pod (by its name or id) or a checkpoint (pod@N, id, tag...)."""
    with Pool.open() as pool:
        coming = pool.pending(ref)
        if coming is not None:
            data = {"kind": "checkpoint", **view.pending_json(coming)}
        else:
            found = find(pool, ref)
            data = _pod(pool, found) if isinstance(found, PodRecord) else _checkpoint(pool, found)
    if as_json:
        common.print_json(data)
        return
    width = max(len(key) for key in data)
    for key, value in data.items():
        if value not in (None, "", [], {}):
            click.echo(f"{key + ':':<{width + 1}} {_text(key, value)}")


def find(pool: Pool, ref: str) -> PodRecord | CheckpointRecord:
    """A bare word is a pod if there is one of that name or id, else a checkpoint. Raises NotFound, UsageError."""
    if "@" not in ref:
        try:
            return pool.pod(ref)
        except NotFound as no_pod:
            try:
                return pool.resolve(ref)
            except NotFound as no_checkpoint:
                error = no_checkpoint if "any of" in no_checkpoint.message else no_pod
                raise NotFound(
                    error.message if error is no_checkpoint else f"no pod, checkpoint or tag is called {ref}",
                    "podtree ps and podtree log show what there is",
                ) from None
    return pool.resolve(ref)


def _pod(pool: Pool, pod: PodRecord) -> dict[str, Any]:
    checkpoints = pool.checkpoints(pod.id)
    return {
        "kind": "pod",
        **view.pod_json(pod),
        "checkpoints": [record.ref for record in checkpoints],
        "volume": str(pool.vol_dir(pod.id)),
    }


def _checkpoint(pool: Pool, record: CheckpointRecord) -> dict[str, Any]:
    children, branches = pool.children(record.id)
    try:
        spec: dict[str, Any] | None = pool.store.meta(record.id).spec
    except (OSError, ValueError):
        spec = None  # damage is for fsck to explain; the rest is still worth showing
    return {
        "kind": "checkpoint",
        **view.checkpoint_json(record),
        "children": [child.id for child in children],
        "branches": [pod.name for pod in branches],
        "spec": spec,
        "path": str(pool.checkpoint_dir(record.id)),
    }


def _text(key: str, value: Any) -> str:
    if key.startswith("bytes") and isinstance(value, int):
        return view.size(value)
    if isinstance(value, dict):
        return "  ".join(
            f"{printable(name)}={_word(entry)}"
            for name, entry in value.items()
            if entry not in (None, False, "", [], {})
        )
    return ", ".join(_word(entry) for entry in value) if isinstance(value, list) else _word(value)


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "[" + shlex.join(printable(str(entry)) for entry in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{printable(str(name))}={_word(entry)}" for name, entry in value.items()) + "}"
    return printable(str(value))
