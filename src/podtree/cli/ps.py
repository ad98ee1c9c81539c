"""podtree ps: the pods."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime

import click

from podtree.cli import common
from podtree.errors import printable
from podtree.pool.records import PodRecord


@click.command("ps")
@click.option("-q", "--quiet", is_flag=True, help="Only names.")
@click.option("-a", "--all", "_all", is_flag=True, help="Also those that have ended: as without it.")
@click.option("--running", is_flag=True, help="Only those that run.")
@common.json_option
def command(quiet: bool, _all: bool, running: bool, as_json: bool) -> None:
    """List pods, oldest first."""
    pods = [pod for pod in common.open_pool().pods() if pod.is_running or not running]
    if as_json:
        common.print_json([_as_data(pod) for pod in pods])
    elif quiet:
        for pod in pods:
            click.echo(pod.name)
    else:
        common.print_table(("NAME", "ID", "STATE", "PID", "CREATED", "PARENT", "COMMAND"), [_row(p) for p in pods])


def _as_data(pod: PodRecord) -> dict[str, object]:
    return {
        "name": pod.name,
        "id": pod.id,
        "state": pod.state.value,
        "pid": pod.init_pid if pod.is_running else None,
        "exit_code": pod.exit_code,
        "created": pod.created.isoformat(),
        "parent": pod.parent,
        "head": pod.head,
        "command": list(pod.spec.get("argv", ())),
    }


def _row(pod: PodRecord) -> tuple[str, ...]:
    state = pod.state.value
    if pod.exit_code is not None and not pod.is_running:
        state += f" ({pod.exit_code})"
    text = shlex.join(pod.spec.get("argv", ()))
    shown = text if len(text) <= 40 else text[:37] + "..."
    pid = str(pod.init_pid) if pod.is_running and pod.init_pid else "-"
    return (pod.name, pod.id, state, pid, _ago(pod.created), pod.parent or "-", printable(shown))


def _ago(when: datetime) -> str:
    seconds = max(0, int((datetime.now(UTC) - when).total_seconds()))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit} ago"
    return f"{seconds}s ago"
