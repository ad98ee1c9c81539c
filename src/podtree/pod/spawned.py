"""`python -m podtree.pod.spawned FD JSON`: a keeper in a fresh interpreter (podtree.pod.control.start)."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import msgspec

from podtree.pod import keeper
from podtree.pod.dirs import PodDirs
from podtree.pod.keeper import Start


def main() -> None:
    """Leave the caller's session and process tree behind, and be the keeper."""
    fd, data = int(sys.argv[1]), sys.argv[2]
    if os.fork():
        os._exit(0)
    os.setsid()
    starter = socket.socket(fileno=fd)
    starter.set_inheritable(False)
    params = msgspec.json.decode(data, type=Start)
    home = Path(params.home)
    dirs = PodDirs(home, home / "pool" / "pods" / params.pod_id, home / "run" / params.pod_id)
    keeper.keep(params, dirs, starter)


if __name__ == "__main__":
    main()
