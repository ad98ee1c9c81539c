"""Where everything that is measured lives, until it is over."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import podtree
from bench.subject import own_pool


class Place(contextlib.ExitStack):
    """Pools and directories that go at the end. `against`: criu is measured as well."""

    def __init__(self, parent: Path, *, against: bool = False) -> None:
        super().__init__()
        self.parent = parent
        self.against = against
        self.pool = self.another_pool()

    def another_pool(self) -> podtree.Pool:
        """One that nothing else lies in."""
        return self.enter_context(own_pool(self.parent))

    def directory(self) -> Path:
        """An empty directory."""
        return Path(self.enter_context(tempfile.TemporaryDirectory(prefix="podtree-bench-", dir=self.parent)))
