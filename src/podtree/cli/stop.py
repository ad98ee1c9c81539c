"""podtree stop."""

from __future__ import annotations

import math
from typing import Any

import click

from podtree.cli import common
from podtree.errors import UsageError
from podtree.pod import control


@click.command("stop")
@click.option("-s", "--signal", "name", default="TERM", show_default=True, help="The signal that asks.")
@click.option("-t", "--timeout", type=float, default=10, show_default=True, help="Seconds until SIGKILL; -1: never.")
@common.json_option
@click.argument("refs", nargs=-1, required=True, metavar="POD...")
def command(name: str, timeout: float, as_json: bool, refs: tuple[str, ...]) -> None:
    """Stop pods: SIGTERM to the first process, SIGKILL to all when it takes too long.

    The kernel drops SIGTERM for a first process that has no handler for it: then it takes all of the timeout.
    """
    number = control.parse_signal(name)
    if math.isnan(timeout) or (timeout < 0 and timeout != -1):
        raise UsageError(f"--timeout {timeout:g}: not a number of seconds")
    pool = common.open_pool()

    def stop(ref: str) -> dict[str, Any]:
        pod = pool.pod(ref)
        if pod.is_running:
            code: int | None = control.stop(pool, pod, None if timeout in (-1, math.inf) else timeout, number)
        else:
            code = pod.exit_code
        return {"pod": pod.name, "id": pod.id, "exit_code": code}

    common.for_each(refs, as_json, stop)
