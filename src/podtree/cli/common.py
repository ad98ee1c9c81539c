"""What several verbs share: the pool, the terminal, JSON."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
import msgspec

from podtree.errors import PodtreeError, as_text, printable

if TYPE_CHECKING:
    from podtree.pool.pool import Pool


@dataclass(slots=True)
class Wanted:
    """How the command's user wants to be told of errors; known once the options are read."""

    json: bool = False


def _remember(context: click.Context, _option: click.Parameter, value: bool) -> bool:
    wanted = context.find_root().obj
    if isinstance(wanted, Wanted):
        wanted.json = value
    return value


def json_flag(help_text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option --json, of which every verb has one: `as_json`. Errors become JSON, too."""
    return click.option("--json", "as_json", is_flag=True, is_eager=True, callback=_remember, help=help_text)


json_option = json_flag("Print JSON instead.")
external_option = click.option(
    "--external",
    metavar="POLICY",
    help="What is shared with the outside of the pod: refuse to save it, close it in a branch, or keep it [refuse].",
)


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


_HINTS = {
    errno.EROFS: "set PODTREE_HOME to a place that can be written to",
    errno.ENOSPC: "podtree discard what isn't needed, then podtree gc; or free space on the disk",
    errno.EACCES: "podtree needs to be root",
    errno.EPERM: "podtree needs to be root, with the right to make namespaces, mounts and loop devices",
    errno.EIO: "the disk is failing, or what is kept is damaged: podtree fsck",
}


def as_podtree_error(error: OSError) -> PodtreeError:
    """What the system refused, with the file that it was about."""
    place = f"{error.filename}: " if error.filename is not None else ""
    return PodtreeError(f"{place}{error.strerror or error}", _HINTS.get(error.errno or 0, ""))


def error_json(error: PodtreeError) -> dict[str, Any]:
    """An error as data: error, hint, problems."""
    problems = [msgspec.to_builtins(problem) for problem in getattr(error, "problems", [])]
    return {"error": error.message, "hint": error.hint, "problems": problems}


def print_error(error: PodtreeError) -> None:
    """An error for people. It may quote what a pod says."""

    def lines(text: str) -> str:
        return "\n".join(printable(line) for line in text.split("\n"))

    click.echo(f"podtree: {lines(error.message)}", err=True)
    if error.hint:
        click.echo(f"  {lines(error.hint)}", err=True)


def for_each(
    refs: Iterable[str], as_json: bool, act: Callable[[str], dict[str, Any]], *shown: str
) -> None:
    """Do something with each of several pods, also when it fails with some: their errors are told, and the
    exit code is that of the first.

    `act` gives an object, of which a field is printed, the first of `shown` (or "pod") that it has, or with `as_json`
    all in a list.
    """
    done: list[dict[str, Any]] = []
    failed: list[PodtreeError] = []
    names = list(dict.fromkeys(refs))
    for ref in names:
        try:
            done.append(act(ref))
        except PodtreeError as error:
            if len(names) == 1:
                raise
            failed.append(error)
            done.append({"pod": as_text(ref), **error_json(error)})
            if not as_json:
                print_error(error)
        else:
            if not as_json:
                click.echo(next(done[-1][name] for name in (*shown, "pod") if name in done[-1]))
    if as_json:
        print_json(done)
    if failed:
        sys.exit(failed[0].exit_code)


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
