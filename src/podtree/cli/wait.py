"""podtree wait."""

from __future__ import annotations

import click

from podtree.cli import common
from podtree.pod import control


@click.command("wait")
@common.json_option
@click.argument("refs", nargs=-1, required=True, metavar="POD...")
def command(as_json: bool, refs: tuple[str, ...]) -> None:
    """Wait for pods to end, and print their exit codes; 128 + n when signal n ended it."""
    pool = common.open_pool()
    for ref in refs:
        pod = pool.pod(ref)
        code = control.wait(pool, pod)
        if as_json:
            common.print_json({"pod": pod.name, "id": pod.id, "exit_code": code})
        else:
            click.echo(code)
