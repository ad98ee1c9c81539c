"""podtree pool: the pool itself, for whoever cares where it is."""

from __future__ import annotations

import click
import msgspec

from podtree.cli import common
from podtree.pool.pool import Pool
from podtree.pool.view import size


@click.group("pool")
def command() -> None:
    """The place where everything is kept: see it, unmount it, mend its index."""


@command.command("info")
@common.json_flag("Print one object.")
def info(as_json: bool) -> None:
    """Where the pool is and how full."""
    with Pool.open() as pool:
        found = pool.info()
    if as_json:
        common.print_json(found)
        return
    click.echo(f"{found.home} ({found.backend}): {found.pods} pods, {found.checkpoints} checkpoints")
    click.echo(f"{size(found.used)} used, {size(found.free)} free of {size(found.size)}")
    if found.file is not None:
        click.echo(
            f"{found.file}: {size(found.file_allocated or 0)} on the disk, may grow by {size(found.growable or 0)}"
        )


@command.command("unmount")
@common.json_flag("Print one object.")
def unmount(as_json: bool) -> None:
    """Unmount the pool's file and free its loop device; the next command mounts it again."""
    from podtree.pool.home import default_home

    done = Pool.close_home(default_home())
    if as_json:
        common.print_json({"unmounted": done})


@command.command("rebuild")
@common.json_flag("Print one object.")
def rebuild(as_json: bool) -> None:
    """Make a lost or damaged index again, from what lies on the disk.

    Names of pods and tags are kept as far as the old one can still be read.
    """
    from podtree.pod import control
    from podtree.pool import rebuild as mending

    with Pool.open() as pool:
        done = mending.rebuild(pool)
        running = control.find_running(pool)
    if as_json:
        common.print_json({**msgspec.to_builtins(done), "running": running})
        return
    for name in done.unreadable:
        click.echo(f"checkpoint {name} can't be read, and is left out: gc would remove it")
    click.echo(f"{done.pods} pods ({len(running)} running), {done.checkpoints} checkpoints, {done.tags} tags")
    if done.kept:
        click.echo(f"the old index is {done.kept}")
