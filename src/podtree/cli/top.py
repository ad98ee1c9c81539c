"""podtree top: pods and their checkpoints, live."""

from __future__ import annotations

import sys
import time

import click

from podtree.cli import common
from podtree.errors import UsageError
from podtree.pool.activity import Activity, activity
from podtree.pool.pool import Pool
from podtree.pool.refs import parse_duration
from podtree.pool.view import size

_HOME_AND_CLEAR = "\x1b[H\x1b[2J"
_HEAD = ("NAME", "STATE", "CHECKPOINTS", "PER SECOND", "PAUSE", "WRITES", "IN ALL", "LAST DURABLE", "COMING")


@click.command("top")
@click.option("-a", "--all", "everything", is_flag=True, help="Also pods that have ended.")
@click.option("-d", "--delay", default="2s", metavar="TIME", help="Look again so often [2s].")
@click.option("--once", is_flag=True, help="Look once.")
@common.json_flag("Print an object each time.")
def command(everything: bool, delay: str, once: bool, as_json: bool) -> None:
    """Show running pods and how they are being checkpointed, until ^C.

    Rate, pause and what is written are of the last minute; IN ALL is what their checkpoints have written of memory.
    """
    pause_s = parse_duration(delay) / 1e9
    if pause_s < 0.1:
        raise UsageError(f"--delay {delay}: more often than ten times a second")
    with Pool.open() as pool:
        while True:
            _show(pool, activity(pool, running=not everything), as_json, clear=not once and sys.stdout.isatty())
            if once:
                return
            sys.stdout.flush()
            time.sleep(pause_s)


def _show(pool: Pool, found: list[Activity], as_json: bool, *, clear: bool) -> None:
    info = pool.info()
    if as_json:
        common.print_json({"time": time.time(), "pool": info, "pods": found})
        return
    if clear:
        click.echo(_HOME_AND_CLEAR, nl=False)
    click.echo(f"{time.strftime('%H:%M:%S')}  {info.checkpoints} checkpoints, {size(info.used)} used, "
               f"{size(info.free)} free")  # fmt: skip
    common.print_table(_HEAD, [_row(one) for one in found])


def _row(one: Activity) -> tuple[str, ...]:
    coming = f"{one.pending}" + (f", {one.lost} lost" if one.lost else "")
    return (
        one.name,
        one.state,
        str(one.checkpoints),
        f"{one.per_second:.2f}",
        "-" if one.pause_ms is None else f"{one.pause_ms:.1f} ms",
        f"{size(one.bytes_per_second)}/s",
        size(one.bytes_written),
        "-" if one.last_durable_s is None else f"{one.last_durable_s:.1f} s ago",
        coming,
    )
