"""podtree kill."""

from __future__ import annotations

import signal
from typing import Any

import click

from podtree.cli import common
from podtree.pod import control


@click.command("kill")
@click.option("-s", "--signal", "name", default="KILL", show_default=True, help="Name or number.")
@common.json_option
@click.argument("refs", nargs=-1, required=True, metavar="POD...")
def command(name: str, as_json: bool, refs: tuple[str, ...]) -> None:
    """Send the first process of pods a signal. KILL ends the pod, and is waited for."""
    number = control.parse_signal(name)
    pool = common.open_pool()

    def kill(ref: str) -> dict[str, Any]:
        pod = pool.pod(ref)
        if number == signal.SIGKILL:
            control.end_pod(pool, pod)
        else:
            control.send_signal(pool, pod, number)
        return {"pod": pod.name, "id": pod.id, "signal": number}

    common.for_each(refs, as_json, kill)
