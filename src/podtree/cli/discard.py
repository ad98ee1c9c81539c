"""podtree discard: throw away a losing pod, or single checkpoints."""

from __future__ import annotations

import click

from podtree.cli import common
from podtree.cli.show import find
from podtree.pod import control
from podtree.pool.pool import Pool
from podtree.pool.records import PodRecord


@click.command("discard")
@click.argument("refs", nargs=-1, required=True, metavar="REF...")
@common.json_flag("Print a list of objects.")
def command(refs: tuple[str, ...], as_json: bool) -> None:
    """Throw away pods, also running ones, with all that only they used; or checkpoints.

    What descends from a discarded checkpoint then descends from that one's parent. Tagged
    checkpoints are refused.
    """
    done = []
    with Pool.open() as pool:
        for record in [find(pool, ref) for ref in dict.fromkeys(refs)]:
            if isinstance(record, PodRecord):
                removed, name = control.remove(pool, record, force=True), record.name
            else:
                removed, name = pool.discard(record), record.ref
            done.append({"ref": name, "pods": list(removed.pods), "checkpoints": list(removed.checkpoints)})
            if not as_json:
                click.echo(name)
    if as_json:
        common.print_json(done)
