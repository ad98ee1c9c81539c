"""podtree wait."""

from __future__ import annotations

import click

from podtree.cli import common
from podtree.pod import control


@click.command("wait")
@click.argument("refs", nargs=-1, required=True, metavar="POD...")
def command(refs: tuple[str, ...]) -> None:
    """Wait for pods to end, and print their exit codes; 128 + n when signal n ended it."""
    pool = common.open_pool()
    for ref in refs:
        click.echo(control.wait(pool, pool.pod(ref)))
