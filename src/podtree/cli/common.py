"""What several verbs share: the pool, the terminal, JSON."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click
import msgspec

if TYPE_CHECKING:
    from podtree.pool.pool import Pool

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")


class ProgramCommand(click.Command):
    """A verb that ends in a program and its own options: what comes after `--` is all the program's.

    Before a `--`, options may stand anywhere; without one they end where the program begins. A `--` among
    the program's own arguments is one of them.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            ctx.allow_interspersed_args = True
            try:
                found, _, _ = self.make_parser(ctx).parse_args(args[: args.index("--")])
            except click.UsageError:
                found = {"argv": ("?",)}
            begun = isinstance(found.get("argv"), tuple) and bool(found["argv"])
            ctx.allow_interspersed_args = not begun
        return super().parse_args(ctx, args)


def open_pool() -> Pool:
    """The pool of PODTREE_HOME; made on first use."""
    from podtree.pool.pool import Pool

    return Pool.open()


def print_json(value: Any) -> None:
    """One value, one line."""
    click.echo(msgspec.json.encode(value).decode())


def print_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Columns as wide as they need to be."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def terminal_size() -> tuple[int, int] | None:
    """(rows, columns) of the terminal on stdout or stdin."""
    from podtree.kernel import tty

    for stream in (sys.stdout, sys.stdin):
        try:
            return tty.get_size(stream.fileno())
        except (OSError, ValueError):
            continue
    return None
