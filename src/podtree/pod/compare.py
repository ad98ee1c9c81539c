"""What `diff` compares: checkpoints, or a running pod as it is now."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from podtree.diff import Difference, Snapshot, diff
from podtree.errors import NotFound, UsageError
from podtree.pod import control
from podtree.pod.spec import PodSpec
from podtree.pool.pool import Pool
from podtree.pool.records import CheckpointId, PodRecord

if TYPE_CHECKING:
    from podtree.pod.supervisor import Supervisor


def snapshot(pool: Pool, checkpoint: CheckpointId) -> Snapshot:
    """The directories of a checkpoint; what lay below its volume is in its manifest."""
    directory = Path(pool.checkpoint_dir(checkpoint))
    here = Snapshot(directory / "img", directory / "vol", Path("/"))
    spec = PodSpec.from_json(here.manifest().spec)
    return Snapshot(here.img, here.vol, Path(spec.rootfs or "/"))


def _running(pool: Pool, ref: str) -> PodRecord | None:
    with contextlib.suppress(NotFound):
        pod = pool.pod(ref)
        return pod if pod.is_running else None
    return None


def compare(pool: Pool, before: str, after: str) -> Difference:
    """From `before` to `after`: references to checkpoints, or names of running pods. At most one of each."""
    live_before, live_after = _running(pool, before), _running(pool, after)
    if live_before and live_after:
        raise UsageError("two running pods can't be compared", f"compare with {before}@latest, or checkpoint one")
    live = live_before or live_after
    if live is None:
        return diff(snapshot(pool, pool.resolve(before).id), snapshot(pool, pool.resolve(after).id))
    other = pool.resolve(after if live_before else before)
    answer = control.call(pool, live, "diff", checkpoint=other.id, live_first=bool(live_before))
    return msgspec.convert(answer, Difference)


def compare_live(supervisor: Supervisor, checkpoint: CheckpointId, *, live_first: bool) -> Difference:
    """In the supervisor: compare the pod as it is now, by a checkpoint that is not kept."""
    draft = supervisor.pool.begin_checkpoint(supervisor.record.id)
    try:
        supervisor.checkpointer.get().checkpoint(draft, commit=False)
        now = Snapshot(draft.dir / "img", draft.dir / "vol", Path(supervisor.spec.rootfs or "/"))
        then = snapshot(supervisor.pool, checkpoint)
        return diff(now, then) if live_first else diff(then, now)
    finally:
        draft.abort()
