"""podtree rewind."""

from __future__ import annotations

import click

from podtree.cli import common
from podtree.pod import control


@click.command("rewind")
@common.json_option
@click.argument("ref", metavar="POD")
@click.argument("target", metavar="CHECKPOINT")
def command(as_json: bool, ref: str, target: str) -> None:
    """Put a pod back to one of its checkpoints, in place; who is attached stays attached.

    Also to one of its origin's, for a branch, up to where it was branched. A pod that has ended comes back to life.
    """
    pool = common.open_pool()
    pod = pool.pod(ref)
    checkpoint = pool.resolve(target)
    result = control.rewind(pool, pod, checkpoint)
    if as_json:
        common.print_json(result)
    else:
        click.echo(result["pod"])
