"""podtree log: the checkpoints and how they descend from each other."""

from __future__ import annotations

import click

from podtree.cli import common
from podtree.pool.pending import Pending
from podtree.pool.pool import Pool
from podtree.pool.records import CheckpointRecord, PodRecord


@click.command("log")
@click.argument("pod", required=False)
@click.option("--graph", is_flag=True, help="Draw the tree of checkpoints and branches.")
@click.option("-n", "--max-count", type=click.IntRange(min=1), metavar="N", help="Only the newest N.")
@common.json_flag("Print a list of objects, newest first.")
def command(pod: str | None, graph: bool, max_count: int | None, as_json: bool) -> None:
    """Show checkpoints, newest first: all, or those of POD.

    Those that aren't durable yet, or are lost, come first, with their state.

    With --graph and a POD, the whole tree that its checkpoints are part of.
    """
    from podtree.pool import graph as drawing
    from podtree.pool import view

    with Pool.open() as pool:
        pods = pool.pods()
        checkpoints = _of_pod(pool, pod, graph) if pod else pool.checkpoints()
        coming = _pending(pool, pod)
    newest = checkpoints[::-1][:max_count]
    if as_json:
        found = [view.pending_json(note) for note in coming] + [view.checkpoint_json(record) for record in newest]
        common.print_json(found[:max_count])
    elif graph:
        text = drawing.draw(newest, pods)
        click.echo(text, nl=bool(text))
    else:
        for note in coming:
            click.echo(view.pending_line(note))
        for record in newest:
            click.echo(view.checkpoint_line(record, _living(pods, record)))


def _of_pod(pool: Pool, name: str, whole_tree: bool) -> list[CheckpointRecord]:
    record = pool.pod_or_removed(name)
    if not whole_tree:
        return pool.checkpoints(record.id)
    from podtree.pool.graph import tree_of

    return tree_of(pool.checkpoints(), record)


def _pending(pool: Pool, name: str | None) -> list[Pending]:
    pod = pool.pod_or_removed(name).id if name else None
    return pool.all_pending(pod)[::-1]


def _living(pods: list[PodRecord], checkpoint: CheckpointRecord) -> list[PodRecord]:
    return [pod for pod in pods if pod.head == checkpoint.id]
