"""podtree fsck: verify everything that is stored."""

from __future__ import annotations

import sys

import click

from podtree.cli import common
from podtree.errors import Damaged, printable
from podtree.pool.pool import Pool
from podtree.pool.records import CheckpointRecord
from podtree.pool.view import size


@click.command("fsck")
@click.argument("refs", nargs=-1, metavar="[REF...]")
@click.option("-q", "--quiet", is_flag=True, help="Don't show which checkpoint is being read.")
@common.json_flag("Print one object.")
def command(refs: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Verify checkpoints (all, or those given), reading every byte, and the index.

    Says what is damaged: checkpoint, file, page. Repairs nothing. Exit status 6 if anything is.
    """
    from podtree.image.verify import problems
    from podtree.pool.fsck import fsck

    show = sys.stderr.isatty() and not quiet and not as_json

    def progress(record: CheckpointRecord) -> None:
        if show:
            click.echo(f"\r{record.id}  {record.ref}\x1b[K", err=True, nl=False)

    with Pool.open() as pool:
        only = [pool.resolve(ref) for ref in refs] or None
        report = fsck(pool, only, progress, problems)
    if show:
        click.echo("\r\x1b[K", err=True, nl=False)
    if as_json:
        common.print_json(report)
        sys.exit(Damaged.exit_code if report.damage else 0)
    for damage in report.damage:
        click.echo(printable(str(damage)))
    for garbage in report.garbage:
        click.echo(f"leftover, podtree gc removes it: {garbage}")
    click.echo(f"{report.checkpoints} checkpoints, {report.files} files, {size(report.bytes)} verified")
    if report.damage:
        where = {damage.where for damage in report.damage}
        raise Damaged(f"damaged: {', '.join(sorted(where))}")
