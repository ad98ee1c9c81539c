"""podtree wait: for pods to end, for checkpoints to be durable."""

from __future__ import annotations

from typing import Any

import click

from podtree.cli import common
from podtree.errors import NotFound
from podtree.pod import control
from podtree.pool import view


@click.command("wait")
@common.json_option
@click.argument("refs", nargs=-1, required=True, metavar="POD|CHECKPOINT...")
def command(as_json: bool, refs: tuple[str, ...]) -> None:
    """Wait for pods to end, and print their exit codes; 128 + n when signal n ended it.

    Of a checkpoint that was taken with --no-wait: until it is durable. Exit status 6 if it is lost.
    """
    pool = common.open_pool()

    def wait(ref: str) -> dict[str, Any]:
        try:
            pod = pool.pod(ref)
        except NotFound as no_pod:
            try:
                record = control.durable(pool, ref)
            except NotFound:
                raise no_pod from None
            return view.checkpoint_json(record)
        return {"pod": pod.name, "id": pod.id, "exit_code": control.wait(pool, pod)}

    common.for_each(refs, as_json, wait, "exit_code", "ref")
