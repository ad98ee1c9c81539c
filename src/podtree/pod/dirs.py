"""Where one pod's things lie on the host."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class PodDirs:
    """All absolute, without symbolic links."""

    home: Path  # PODTREE_HOME: nothing of it is visible in any pod
    pod: Path  # pods/<id>: spec.json, exit.json
    run: Path  # run/<id>: the control socket and other things of the running pod

    @property
    def vol(self) -> Path:
        """The volume's subvolume: upper/, work/, mounts/, log."""
        return self.pod / "vol"

    @property
    def img(self) -> Path:
        """The live image directory."""
        return self.pod / "img"

    @property
    def log(self) -> Path:
        """What the pod wrote to its console, stdout and stderr."""
        return self.vol / "log"
