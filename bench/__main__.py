"""`make bench`: what podtree costs on this machine, as a table, as JSON and as pictures.

Three times are told apart. *Pause*: how long the pod's processes stood still, as a program inside sees it that reads
the clock in a loop, and as podtree tells. *Ready*: from the call to the first instruction of a branch, as that program
sees it. *Durable*: from the call until the checkpoint is safely on the disk. They are of the Python API in a program
that runs already, but for the case `commands`: whole commands, their own start included.

The cases of a group are measured in turn, round after round after warming up, so that what else the machine does falls
on all of them. Pods that aren't being measured are at rest.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import traceback
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import FrameType

import click

from bench import criu, figures, plots
from bench.cases import CASES, Case, Running, quick
from bench.figures import Book, table, to_json
from bench.place import Place
from podtree.kernel.procfs import memory_available

WARM_UP = {"trees": 2, "large": 1, "history": 0, "storm": 0, "recorded": 0}
SPARE_MB = 1500


def fitting(cases: list[Case], book: Book) -> list[Case]:
    """Those that this machine has memory for at the same time, the largest left out first."""
    free = memory_available() >> 20
    while cases and sum(case.megabytes() for case in cases) + SPARE_MB > free:
        largest = max(cases, key=lambda case: case.megabytes())
        needed = f"{largest.megabytes()} MB of memory beside the others; {free} MB are available"
        book.left_out.append(f"{largest.name}: needs {needed}")
        cases = [case for case in cases if case is not largest]
    return cases


def measure(cases: list[Case], warm_up: int, rounds: int, parent: Path, book: Book, *, against: bool) -> None:
    """One group of cases, in turn. What fails is measured no more, and told."""
    with Place(parent, against=against) as place:
        running: dict[str, Running] = {}
        try:
            for case in fitting(cases, book):
                _say(f"{case.name}: {case.about}")
                with _failing(case.name, running, book):
                    running[case.name] = case.start(place)
            for number in range(-warm_up, rounds):
                _say(f"{cases[0].group}: " + (f"round {number + 1} of {rounds}" if number >= 0 else "warming up"))
                for name, one in list(running.items()):
                    with _failing(name, running, book):
                        one.round(book if number >= 0 else Book())
        finally:
            for one in running.values():
                one.close()


@contextlib.contextmanager
def _failing(name: str, running: dict[str, Running], book: Book) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        book.failed.append(f"{name}: {error}")
        if (one := running.pop(name, None)) is not None:
            one.close()


def _say(text: str) -> None:
    click.echo(text, err=True)


def _end(*_: int | FrameType | None) -> None:
    sys.exit("ended by a signal")  # and everything is cleaned up on the way


def _list(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        for case in CASES:
            click.echo(f"{case.name:16} {case.about}")
        context.exit()


@click.command()
@click.option("--list", is_flag=True, is_eager=True, expose_value=False, callback=_list, help="Name the cases.")
@click.option("--case", "names", multiple=True, type=click.Choice([case.name for case in CASES]), help="Only these.")
@click.option("--rounds", type=click.IntRange(1), help="How often each is measured [15].")
@click.option("--quick", "is_quick", is_flag=True, help="One round of small sizes: does it work? No targets then.")
@click.option("--against", type=click.Choice(["criu"]), help="Measure the trees with this program, too.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write all values there.")
@click.option("--markdown", type=click.Path(dir_okay=False, path_type=Path), help="Write rows with targets there.")
@click.option("--plots", "pictures", type=click.Path(file_okay=False, path_type=Path), help="Write curves there.")
@click.option("--dir", "parent", type=click.Path(file_okay=False, exists=True, path_type=Path), default="/var/tmp",
              show_default=True, help="Where pools of its own are made, and removed in the end.")  # fmt: skip
def main(
    names: tuple[str, ...],
    rounds: int | None,
    is_quick: bool,
    against: str | None,
    path: Path | None,
    markdown: Path | None,
    pictures: Path | None,
    parent: Path,
) -> None:
    """Measure podtree on this machine."""
    if against and (problem := criu.obstacle()) is not None:
        raise click.ClickException(f"--against criu: {problem}")
    signal.signal(signal.SIGTERM, _end)
    rounds = rounds or (1 if is_quick else 15)
    cases = [quick(case) if is_quick else case for case in CASES if case.name in names or not names]
    book = Book(targets=not is_quick)
    for name, group in groupby(cases, key=lambda case: case.group):
        measure(list(group), 0 if is_quick else WARM_UP[name], rounds, parent, book, against=bool(against))
        if path:
            path.write_text(to_json(book, rounds))  # what is there so far, should something fail
    click.echo(table(book))
    if markdown:
        markdown.write_text(figures.markdown(book))
    if pictures:
        for drawn in plots.draw_all(book, pictures):
            _say(f"drawn: {drawn}")
    sys.exit(1 if book.failed else 0)


if __name__ == "__main__":
    main()
