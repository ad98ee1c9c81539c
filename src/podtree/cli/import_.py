"""podtree import: a checkpoint from a file."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from podtree.cli import common
from podtree.errors import UsageError, printable
from podtree.pool.pool import Pool


@click.command("import")
@click.option("--tag", "name", help="Name the checkpoint.")
@click.option("-v", "--volume", "volumes", multiple=True, metavar="SRC:DST[:ro]", help="What its -v is to show here.")
@click.option("--rootfs", metavar="DIR|TAR|LAYOUT", help="What the pod's --rootfs was, as it is called here.")
@common.json_flag("Print one object.")
@click.argument("source", metavar="FILE|-")
def command(name: str | None, volumes: tuple[str, ...], rootfs: str | None, as_json: bool, source: str) -> None:
    """Take in the checkpoint that `podtree export` wrote to FILE (or stdin). Prints its id.

    FILE may also be a directory with an OCI image layout. When it is cut off, what has come is kept, and another import
    of the same goes on there.
    """
    from podtree.pod.spec import parse_volume
    from podtree.transfer.load import load

    shown = tuple(parse_volume(text) for text in volumes)
    if source == "-" and sys.stdin.isatty():
        raise UsageError("a terminal is no export", "podtree import FILE")
    with Pool.open() as pool:
        if source != "-" and Path(source).is_dir():
            result = load(pool, Path(source), volumes=shown, rootfs=rootfs, tag=name)
        else:
            with open(0 if source == "-" else source, "rb", closefd=source != "-") as stream:
                result = load(pool, stream, volumes=shown, rootfs=rootfs, tag=name)
    if as_json:
        common.print_json(result)
        return
    click.echo(result.id)
    for note in result.notes:
        click.echo(f"  {printable(note)}", err=True)
