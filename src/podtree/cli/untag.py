"""podtree untag."""

from __future__ import annotations

import click

from podtree.cli import common


@click.command("untag")
@common.json_flag("Print a list of objects.")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def command(as_json: bool, names: tuple[str, ...]) -> None:
    """Remove names of checkpoints; the checkpoints stay until gc finds that nothing else needs them."""
    with common.open_pool() as pool:

        def remove(name: str) -> dict[str, object]:
            pool.untag(name)
            return {"name": name}

        common.for_each(names, as_json, remove, "name")
