"""podtree export: a checkpoint as one file."""

from __future__ import annotations

import sys

import click

from podtree.cli import common
from podtree.errors import UsageError
from podtree.pool.pool import Pool
from podtree.pool.view import size


@click.command("export")
@click.option("-o", "--output", required=True, metavar="FILE|-", help="Where to; - is stdout.")
@click.option("--since", metavar="REF", help="Only what differs from that checkpoint, which the import needs then.")
@click.option("--with-base", is_flag=True, help="Also all files below the pod, for machines that haven't got them.")
@common.json_flag("Print one object (not with -o -).")
@click.argument("ref")
def command(output: str, since: str | None, with_base: bool, as_json: bool, ref: str) -> None:
    """Write the checkpoint REF to one file, which `podtree import` takes in elsewhere."""
    from podtree.transfer.export import export, to_file

    if output == "-" and sys.stdout.isatty():
        raise UsageError("an export is nothing for a terminal", "podtree export REF -o FILE")
    with Pool.open() as pool:
        record = pool.resolve(ref)
        other = pool.resolve(since) if since is not None else None
        if output == "-":
            export(pool, record, sys.stdout.buffer, since=other, with_base=with_base)
            return
        result = to_file(output, lambda out: export(pool, record, out, since=other, with_base=with_base))
    if as_json:
        common.print_json(result)
    else:
        click.echo(f"{result.id}  {result.ref}  {size(result.bytes)} for {size(result.bytes_read)}")
