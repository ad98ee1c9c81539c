"""podtree gc: free what nothing refers to."""

from __future__ import annotations

import click
import msgspec

from podtree.cli import common
from podtree.pool.pool import Pool
from podtree.pool.view import size


@click.command("gc")
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be removed.")
@common.json_flag("Print one object.")
def command(dry_run: bool, as_json: bool) -> None:
    """Remove what no pod, branch or tag needs, and what killed commands left behind."""
    with Pool.open() as pool:
        report = pool.gc(dry_run=dry_run)
    if as_json:
        common.print_json({"dry_run": dry_run, **msgspec.to_builtins(report)})
        return
    verb = "would be removed" if dry_run else "removed"
    for checkpoint in report.checkpoints:
        click.echo(f"checkpoint {checkpoint} {verb}")
    for leftover in report.leftovers:
        click.echo(f"leftover {leftover} {verb}")
    if not dry_run:
        later = "" if report.finished else " so far, the file system goes on freeing"
        click.echo(f"{size(report.bytes_freed)} freed{later}")
