"""podtree tag: names for checkpoints."""

from __future__ import annotations

import click

from podtree.cli import common
from podtree.errors import UsageError
from podtree.pool.pool import Pool


@click.command("tag")
@click.argument("words", nargs=-1, metavar="[REF NAME]")
@click.option("-d", "--delete", is_flag=True, help="Delete the tags of the given names; checkpoints stay.")
@click.option("-f", "--force", is_flag=True, help="Move the tag if it exists.")
@common.json_flag("Print the tags as a list of objects.")
def command(words: tuple[str, ...], delete: bool, force: bool, as_json: bool) -> None:
    """Give the checkpoint REF the name NAME, which keeps it from gc. Without words: list the tags."""
    with Pool.open() as pool:
        if delete:
            if not words:
                raise UsageError("which tags to delete?", "podtree tag --delete NAME...")
            for name in words:
                pool.untag(name)
        elif len(words) == 2:
            ref, name = words
            if "@" in name and "@" not in ref:  # as in git tag NAME REF
                ref, name = name, ref
            pool.tag(name, pool.resolve(ref).id, force=force)
        elif words:
            raise UsageError("a tag needs a checkpoint and a name", "podtree tag web@3 golden")
        if as_json or not words:
            _print(pool, as_json)


def _print(pool: Pool, as_json: bool) -> None:
    tags = {name: pool.checkpoint(checkpoint) for name, checkpoint in pool.tags().items()}
    if as_json:
        common.print_json([{"name": name, "id": record.id, "ref": record.ref} for name, record in tags.items()])
        return
    for name, record in tags.items():
        click.echo(f"{name}  {record.id}  {record.ref}")
