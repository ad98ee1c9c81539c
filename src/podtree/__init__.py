"""podtree: run any program in a pod, checkpoint processes and files at one instant, branch off any past one.

`podtree.Pool`, `podtree.Pod` and `podtree.Checkpoint` are the whole of the Python API; they are imported
when first named, so that `import podtree` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from podtree.api import Checkpoint, Pod, Pool

__version__ = "0.1.0"
__all__ = ["Checkpoint", "Pod", "Pool"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from podtree import api

        return getattr(api, name)
    raise AttributeError(f"module 'podtree' has no attribute {name!r}")
