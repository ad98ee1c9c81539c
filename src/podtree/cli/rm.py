"""podtree rm: remove pods."""

from __future__ import annotations

from typing import Any

import click

from podtree.cli import common
from podtree.pod import control
from podtree.pool.pool import Pool


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
            removed = control.remove(pool, record, force=force)
            kept = [kept.ref for kept in pool.checkpoints(record.id)]
            if kept and not as_json:
                click.echo(f"kept, for tags or branches: {', '.join(kept)}", err=True)
            return {"pod": record.name, "id": record.id, "checkpoints": list(removed.checkpoints), "kept": kept}

        common.for_each(pods, as_json, remove_one)
