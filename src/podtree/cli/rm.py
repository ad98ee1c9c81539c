"""podtree rm: remove pods."""

from __future__ import annotations

from typing import Any

import click

from podtree.cli import common
from podtree.errors import Conflict, NotFound
from podtree.pool.pool import Pool
from podtree.pool.records import PodRecord
from podtree.pool.retention import Removed


@click.command("rm")
@click.argument("pods", nargs=-1, required=True, metavar="POD...")
@click.option("-f", "--force", is_flag=True, help="End the processes of a pod that runs.")
@common.json_flag("Print a list of objects.")
def command(pods: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Remove pods: their volumes, and their checkpoints.

    Checkpoints stay that are tagged, or that another pod was branched from.
    """
    with Pool.open() as pool:

        def remove_one(ref: str) -> dict[str, Any]:
            record = pool.pod(ref)
            removed = remove(pool, record, force=force)
            kept = [kept.ref for kept in pool.checkpoints(record.id)]
            if kept and not as_json:
                click.echo(f"kept, for tags or branches: {', '.join(kept)}", err=True)
            return {"pod": record.name, "id": record.id, "checkpoints": list(removed.checkpoints), "kept": kept}

        common.for_each(pods, as_json, remove_one)


def remove(pool: Pool, record: PodRecord, *, force: bool) -> Removed:
    """Remove one pod; with `force` its processes are ended first. Raises Conflict when it runs and may not end."""
    if record.is_running:
        if not force:
            raise Conflict(f"pod {record.name} is running", f"podtree stop {record.name}, or rm --force")
        from podtree.pod.control import end_pod

        end_pod(pool, record)
    try:
        return pool.remove_pod(record.id)
    except NotFound:
        return Removed(pods=(record.id,))  # it was run with --rm, and its supervisor was quicker
