"""podtree diff."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from podtree.cli import common
from podtree.errors import printable

if TYPE_CHECKING:
    from podtree.diff import Difference


@click.command("diff")
@common.json_option
@click.argument("before", metavar="REF")
@click.argument("after", metavar="REF")
def command(as_json: bool, before: str, after: str) -> None:
    """What differs from one checkpoint to another: processes, descriptors, memory pages, files.

    The name of a running pod stands for the pod as it is now.
    """
    from podtree.pod import compare

    result = compare.compare(common.open_pool(), before, after)
    if as_json:
        common.print_json(result)
    else:
        _print(result)


def _print(result: Difference) -> None:
    from podtree.kernel.sys import PAGE_SIZE

    shown = [p for p in result.processes if p.state != "same"]
    if not shown and not result.files:
        click.echo("no difference")
    for process in shown:
        before, after = process.threads
        threads = f"{after} threads" if before == after else f"{before} -> {after} threads"
        changed = process.pages_changed + process.pages_added
        memory = f"{changed} pages ({changed * PAGE_SIZE >> 10} KiB) of memory changed"
        gone = f", {process.pages_removed} freed" if process.pages_removed else ""
        click.echo(f"process {process.pid} ({printable(process.comm)}) {process.state}: {threads}, {memory}{gone}")
        for descriptor in process.descriptors:
            change = f"{descriptor.before or '-'} -> {descriptor.after or '-'}"
            click.echo(f"    fd {descriptor.fd}: {printable(change)}")
    for file in result.files:
        sign = {"added": "A", "changed": "M", "removed": "D"}[file.state]
        click.echo(f"{sign} {printable(file.path)}" + (f" ({file.size} bytes)" if file.state != "removed" else ""))


