"""`python -m podtree.pod.spawned FD JSON`: a keeper in a fresh interpreter (podtree.pod.control.start)."""

from __future__ import annotations

import os
import socket
import sys

import msgspec

from podtree.pod import keeper
from podtree.pod.nursery import Start


def main() -> None:
    """Leave the caller's session and process tree behind, and be the keeper."""
    fd, data = int(sys.argv[1]), sys.argv[2]
    if os.fork():
        os._exit(0)
    os.setsid()
    starter = socket.socket(fileno=fd)
    starter.set_inheritable(False)
    params = msgspec.json.decode(data, type=Start)
    keeper.keep(params, params.dirs(), starter)


if __name__ == "__main__":
    main()
