"""podtree mark."""

from __future__ import annotations

import click

from podtree.cli import common
from podtree.pod import control


@click.command("mark")
@common.json_option
@click.argument("ref", metavar="POD")
@click.argument("text")
def command(as_json: bool, ref: str, text: str) -> None:
    """Take a checkpoint of a moment worth keeping; TEXT says why. Prints its id.

    It is never thinned. A recorded pod's programs can do the same by writing a line to /run/podtree/mark; those are
    kept by --keep-marks of `podtree record`.
    """
    pool = common.open_pool()
    result = control.mark(pool, pool.pod(ref), text)
    if as_json:
        common.print_json(result)
    else:
        click.echo(result["id"])
