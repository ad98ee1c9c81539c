"""podtree rewind."""

from __future__ import annotations

import click

from podtree.cli import common
from podtree.errors import UsageError
from podtree.pod import control


@click.command("rewind")
@common.json_option
@click.argument("ref", metavar="POD")
@click.argument("target", metavar="CHECKPOINT")
def command(as_json: bool, ref: str, target: str) -> None:
    """Put a pod back to one of its checkpoints, in place; who is attached stays attached."""
    pool = common.open_pool()
    pod = pool.pod(ref)
    checkpoint = pool.resolve(target)
    if checkpoint.pod != pod.id and checkpoint.id not in (pod.parent, pod.head):
        raise UsageError(f"{target} isn't a checkpoint of pod {pod.name}", f"podtree branch {target} makes a new pod")
    result = control.rewind(pool, pod, checkpoint)
    if as_json:
        common.print_json(result)
    else:
        click.echo(result["pod"])
