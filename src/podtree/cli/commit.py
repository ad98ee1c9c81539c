"""podtree commit."""

from __future__ import annotations

import click

from podtree.cli import common
from podtree.pod import control


@click.command("commit")
@common.json_option
@click.argument("winner", metavar="WINNER")
@click.argument("origin", metavar="ORIGIN")
def command(as_json: bool, winner: str, origin: str) -> None:
    """Let a branch take the place of the pod it came from: its name, its history. The origin is ended."""
    pool = common.open_pool()
    pod = control.commit(pool, pool.pod(winner), pool.pod(origin))
    if as_json:
        common.print_json({"pod": pod.name, "id": pod.id})
    else:
        click.echo(pod.name)
