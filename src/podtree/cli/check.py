"""podtree check."""

from __future__ import annotations

import sys

import click
import msgspec

from podtree.cli import common
from podtree.errors import Refused, printable
from podtree.pod import control


@click.command("check")
@common.external_option
@common.json_option
@click.argument("ref", metavar="POD")
def command(external: str | None, as_json: bool, ref: str) -> None:
    """Tell whether a checkpoint would work now; if not: which process, which object, why, what to do."""
    pool = common.open_pool()
    problems = control.check(pool, pool.pod(ref), external=external)
    if as_json:
        common.print_json({"ok": not problems, "problems": [msgspec.to_builtins(p) for p in problems]})
    else:
        for problem in problems:
            click.echo(printable(str(problem)))
        if not problems:
            click.echo("ok")
    sys.exit(Refused.exit_code if problems else 0)
