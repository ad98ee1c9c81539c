"""What `diff` compares: checkpoints, or pods as they are now."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec

from podtree.diff import Difference, Snapshot, diff
from podtree.errors import Damaged, NotFound
from podtree.pod import control
from podtree.pod.spec import PodSpec
from podtree.pool.pool import Pool
from podtree.pool.records import CheckpointId, PodRecord, PodState


def compare(pool: Pool, before: str, after: str) -> Difference:
    """From `before` to `after`: references to checkpoints, or names of pods.

    A running pod is stopped for a moment, as for a checkpoint; one that has ended has files and no processes.
    Raises NotFound, UsageError, Refused, Damaged.
    """
    with contextlib.ExitStack() as scope:
        return diff(*(_side(pool, ref, scope) for ref in (before, after)))


def _side(pool: Pool, ref: str, scope: contextlib.ExitStack) -> Snapshot:
    pod = _pod(pool, ref)
    if pod is None:
        return _snapshot(pool, pool.resolve(ref).id)
    if pod.is_running:
        client = scope.enter_context(control.connect(pool, pod))  # what it looks at is there until it hangs up
        directory = Path(client.call("look")["directory"])
        return Snapshot(directory / "img", directory / "vol", _root(pod))
    if pod.state is PodState.STOPPED and pod.head is not None:
        return _snapshot(pool, pod.head)
    return Snapshot(None, pool.vol_dir(pod.id), _root(pod))


def _pod(pool: Pool, ref: str) -> PodRecord | None:
    if "@" not in ref:
        with contextlib.suppress(NotFound):
            return pool.pod(ref)
    return None


def _root(pod: PodRecord) -> Path:
    return Path(PodSpec.from_dict(pod.spec).rootfs or "/")


def _snapshot(pool: Pool, checkpoint: CheckpointId) -> Snapshot:
    """The directories of a checkpoint; what lay below its volume is in its manifest."""
    directory = pool.checkpoint_dir(checkpoint)
    here = Snapshot(directory / "img", directory / "vol", Path("/"))
    try:
        manifest = here.manifest()
        spec = msgspec.json.decode(manifest.spec if manifest else b"", type=PodSpec)
    except (OSError, msgspec.MsgspecError) as error:
        raise Damaged(f"checkpoint {checkpoint} can't be read: {error}", "podtree fsck") from None
    return Snapshot(here.img, here.vol, Path(spec.rootfs or "/"))
