"""podtree wait."""

from __future__ import annotations

from typing import Any

import click

from podtree.cli import common
from podtree.pod import control


@click.command("wait")
@common.json_option
@click.argument("refs", nargs=-1, required=True, metavar="POD...")
def command(as_json: bool, refs: tuple[str, ...]) -> None:
    """Wait for pods to end, and print their exit codes; 128 + n when signal n ended it."""
    pool = common.open_pool()

    def wait(ref: str) -> dict[str, Any]:
        pod = pool.pod(ref)
        return {"pod": pod.name, "id": pod.id, "exit_code": control.wait(pool, pod)}

    common.for_each(refs, as_json, wait, shown="exit_code")
