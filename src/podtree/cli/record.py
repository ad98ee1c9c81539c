"""podtree record, and the options that `run` shares with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from podtree.cli import common
from podtree.errors import Conflict, UsageError, printable
from podtree.pod import control
from podtree.recorder import settings as recorder
from podtree.recorder.settings import Settings

_NAMES = {"budget": "--budget", "max_size": "--max-size", "external": "--external"}
_KEEP = "Keep recorded checkpoints: "
_OPTIONS = (
    click.option("--every", metavar="TIME", help="Take a checkpoint so often: 1s, 500ms."),
    click.option("--budget", metavar="SHARE", help="Stop the pod for at most this share of its time [10%]."),
    click.option("--keep-last", "last", type=int, metavar="N", help=f"{_KEEP}so many of the newest."),
    click.option("--keep-within", "within", metavar="TIME", help=f"{_KEEP}those of the last TIME [10m]."),
    click.option("--keep-minutely", "minutely", type=int, metavar="N", help=f"{_KEEP}one of each of N minutes [60]."),
    click.option("--keep-hourly", "hourly", type=int, metavar="N", help=f"{_KEEP}one of each of N hours [24]."),
    click.option("--keep-daily", "daily", type=int, metavar="N", help=f"{_KEEP}one of each of N days [30]."),
    click.option("--keep-marks", "marks", type=int, metavar="N", help=f"{_KEEP}N marked ones, and those before [100]."),
    click.option("--max-size", "max_size", metavar="SIZE", help="Of what all of them have written; the oldest go."),
)


def recording_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `recorder_settings` reads."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def recorder_settings(options: dict[str, Any]) -> Settings | None:
    """What the options say; None without --every. Raises UsageError for the others without it."""
    given = [name for name, value in options.items() if value is not None]
    if options["every"] is not None:
        return recorder.make(**options)
    if given:
        raise UsageError(f"{_NAMES.get(given[0], f'--keep-{given[0]}')} needs --every", "--every 1s")
    return None


@click.command("record")
@recording_options
@common.external_option
@click.option("--off", is_flag=True, help="No more checkpoints; those there are stay.")
@common.json_option
@click.argument("ref", metavar="POD")
def command(ref: str, off: bool, as_json: bool, **options: Any) -> None:
    """Take checkpoints of a running pod by itself, again and again; without options: tell how that goes.

    One is left out when nothing has happened in the pod. Old ones go by the --keep rules (with any of them given,
    only those given hold); tagged ones, branches' origins and those of `podtree checkpoint` always stay.
    """
    settings = recorder_settings(options)
    if settings is not None and off:
        raise UsageError("either --every or --off")
    pool = common.open_pool()
    pod = pool.pod(ref)
    try:
        result = {"pod": pod.name, "recorded": not off, **control.record(pool, pod, settings, off=off)}
    except Conflict:
        if settings is not None or not pool.pod(pod.id).is_running:
            raise
        result = {"pod": pod.name, "recorded": False}
    if as_json:
        common.print_json(result)
    elif "taken" not in result:
        click.echo(f"{pod.name} isn't recorded")
    else:
        click.echo(_sentence(result))


def _sentence(result: dict[str, Any]) -> str:
    head = f"{result['pod']}: every {result['every_ms']:g} ms" if result["recorded"] else f"{result['pod']}: off"
    parts = [head, f"{result['taken']} taken", f"{result['skipped']} left out (nothing had happened)"]
    if result["thinned"]:
        parts.append(f"{result['thinned']} thinned")
    if result["marked"]:
        parts.append(f"{result['marked']} marked")
    if result["taken"]:
        parts.append(f"stopped for {result['pause_ms'] / result['taken']:.1f} ms on average")
        parts.append(f"durable {result['lag_ms']:.0f} ms later ({result['longest_lag_ms']:.0f} at most)")
    if result["failed"]:
        parts.append(f"{result['failed']} failed")
    text = ", ".join(parts)
    return text + (f"\nthe last one failed: {printable(result['error'])}" if result["error"] else "")
