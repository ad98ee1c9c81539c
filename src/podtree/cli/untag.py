"""podtree untag: remove names of checkpoints."""

from __future__ import annotations

import click

from podtree.cli import common
from podtree.pool.pool import Pool


@click.command("untag")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@common.json_option
def command(names: tuple[str, ...], as_json: bool) -> None:
    """Remove tags. Their checkpoints stay, until nothing else needs them."""
    with Pool.open() as pool:
        for name in dict.fromkeys(names):
            pool.untag(name)
            if not as_json:
                click.echo(name)
    if as_json:
        common.print_json([{"name": name} for name in dict.fromkeys(names)])
