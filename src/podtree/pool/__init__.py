"""The pool: where pods' volumes, checkpoints and their history are kept.

`from podtree.pool import Pool` is the way in; names are loaded when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from podtree.pool.draft import Draft as Draft
    from podtree.pool.pool import GcReport as GcReport
    from podtree.pool.pool import Pool as Pool
    from podtree.pool.pool import PoolInfo as PoolInfo
    from podtree.pool.records import CheckpointId as CheckpointId
    from podtree.pool.records import CheckpointRecord as CheckpointRecord
    from podtree.pool.records import PodId as PodId
    from podtree.pool.records import PodRecord as PodRecord
    from podtree.pool.records import PodState as PodState
    from podtree.pool.retention import Removed as Removed

_PLACES = {
    "Draft": "draft",
    "GcReport": "pool",
    "Pool": "pool",
    "PoolInfo": "pool",
    "CheckpointId": "records",
    "CheckpointRecord": "records",
    "PodId": "records",
    "PodRecord": "records",
    "PodState": "records",
    "Removed": "retention",
}


def __getattr__(name: str) -> object:
    if name in _PLACES:
        import importlib

        return getattr(importlib.import_module(f"podtree.pool.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
