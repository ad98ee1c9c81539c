"""podtree diff."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from podtree.cli import common
from podtree.errors import printable
from podtree.kernel.sys import PAGE_SIZE
from podtree.pool.pool import Pool
from podtree.pool.view import size

if TYPE_CHECKING:
    from podtree.diff import Difference
    from podtree.diff.files import FileChange
    from podtree.diff.processes import ProcessChange


@click.command("diff")
@common.json_option
@click.argument("before", metavar="REF")
@click.argument("after", metavar="REF")
def command(as_json: bool, before: str, after: str) -> None:
    """What differs from one checkpoint to another: processes, descriptors, memory pages, files.

    The name of a pod stands for the pod as it is now; one that has ended has only files. Files: A added, M changed,
    D removed.
    """
    from podtree.pod import compare

    with Pool.open() as pool:
        result = compare.compare(pool, before, after)
    if as_json:
        common.print_json(result)
    else:
        _print(result)


def _print(result: Difference) -> None:
    shown = [p for p in result.processes if p.state != "same"]
    if not shown and not result.files:
        click.echo("no difference")
    for process in shown:
        click.echo(printable(_process(process)))
        for descriptor in process.descriptors:
            line = f"fd {descriptor.fd}: {descriptor.before or '-'} -> {descriptor.after or '-'}"
            click.echo(f"    {printable(line)}")
    for file in result.files:
        click.echo(printable(_file(file)))


def _process(process: ProcessChange) -> str:
    before, after = process.threads
    name = f"{process.before} -> {process.comm}" if process.before else process.comm
    threads = _count(max(before, after), "thread") if 0 in (before, after) or before == after else ""
    parts = [threads or f"{before} -> {after} threads"]
    if process.state != "removed":
        changed = process.pages_changed + process.pages_added
        parts.append(f"{_count(changed, 'page')} ({size(changed * PAGE_SIZE)}) of memory changed")
    if process.pages_removed:
        parts.append(f"{_count(process.pages_removed, 'page')} freed")
    if process.shared_pages_changed and process.state != "removed":
        parts.append(f"{_count(process.shared_pages_changed, 'page')} of shared memory changed")
    return f"process {process.pid} ({name}) {process.state}: {', '.join(parts)}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _file(file: FileChange) -> str:
    sign = {"added": "A", "changed": "M", "removed": "D"}[file.state]
    notes = [*file.changes]
    if file.kind == "file" and file.state != "removed":
        notes.append(size(file.size))
    elif file.kind != "file" and file.state == "added":
        notes.append(file.kind)
    return f"{sign} {file.path}" + (f"  ({', '.join(notes)})" if notes else "")
