"""podtree branch (fork)."""

from __future__ import annotations

import click

from podtree.cli import common
from podtree.pod import control


@click.command("branch")
@click.option("--name", help="The new pod's name; with -n: name-1, name-2...")
@click.option("-n", "count", type=click.IntRange(1, 10000), default=1, help="This many.")
@common.json_option
@click.argument("ref", metavar="CHECKPOINT")
def command(name: str | None, count: int, as_json: bool, ref: str) -> None:
    """Make new running pods from a checkpoint: pod@3, pod@latest, pod@10s (ago), pod@"time", an id, a tag."""
    pool = common.open_pool()
    checkpoint = pool.resolve(ref)
    for result in control.start_branches(pool, checkpoint, control.branch_names(pool, name, count)):
        if as_json:
            common.print_json(result)
        else:
            click.echo(result["pod"])
