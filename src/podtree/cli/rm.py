"""podtree rm: remove pods."""

from __future__ import annotations

import json

import click

from podtree.errors import Conflict, NotFound
from podtree.pool.pool import Pool
from podtree.pool.records import PodRecord
from podtree.pool.retention import Removed


@click.command("rm")
@click.argument("pods", nargs=-1, required=True, metavar="POD...")
@click.option("-f", "--force", is_flag=True, help="End the processes of a pod that runs.")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects.")
def command(pods: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Remove pods: their volumes, and their checkpoints.

    Checkpoints stay that are tagged, or that another pod was branched from.
    """
    done = []
    with Pool.open() as pool:
        for record in [pool.pod(ref) for ref in dict.fromkeys(pods)]:
            removed = remove(pool, record, force=force)
            kept = [kept.ref for kept in pool.checkpoints(record.id)]
            done.append({"pod": record.name, "id": record.id, "checkpoints": list(removed.checkpoints), "kept": kept})
            if not as_json:
                click.echo(record.name)
                if kept:
                    click.echo(f"kept, for tags or branches: {', '.join(kept)}", err=True)
    if as_json:
        click.echo(json.dumps(done))


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
