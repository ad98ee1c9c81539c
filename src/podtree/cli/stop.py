"""podtree stop."""

from __future__ import annotations

import click

from podtree.cli import common
from podtree.pod import control


@click.command("stop")
@click.option("-t", "--timeout", type=float, default=10, show_default=True, help="Seconds until SIGKILL.")
@common.json_option
@click.argument("refs", nargs=-1, required=True, metavar="POD...")
def command(timeout: float, as_json: bool, refs: tuple[str, ...]) -> None:
    """Stop pods: SIGTERM to the first process, SIGKILL to all when it takes too long."""
    pool = common.open_pool()
    for ref in refs:
        pod = pool.pod(ref)
        code = control.stop(pool, pod, timeout) if pod.is_running else pod.exit_code
        if as_json:
            common.print_json({"pod": pod.name, "id": pod.id, "exit_code": code})
        else:
            click.echo(pod.name)
