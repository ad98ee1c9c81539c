"""podtree checkpoint."""

from __future__ import annotations

import click

from podtree.cli import common
from podtree.pod import control


@click.command("checkpoint")
@click.option("-m", "--message", default="", help="What it is for.")
@click.option("--stop", is_flag=True, help="End the pod at that instant.")
@click.option("--tag", "name", help="Name the checkpoint.")
@click.option("--no-wait", is_flag=True, help="Don't wait until it is durable (podtree wait ID does).")
@common.external_option
@common.json_option
@click.argument("ref", metavar="POD")
def command(
    message: str, stop: bool, name: str | None, no_wait: bool, external: str | None, as_json: bool, ref: str
) -> None:
    """Save a pod's processes and files at one instant; it runs on. Prints the checkpoint's id."""
    pool = common.open_pool()
    result = control.checkpoint(
        pool, pool.pod(ref), message=message, stop=stop, tag=name, no_wait=no_wait, external=external
    )
    if as_json:
        common.print_json(result)
    else:
        click.echo(result["id"])
