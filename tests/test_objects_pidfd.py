"""Process descriptors: whose they are; an image that has none of such a process."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest

from holder import World, world
from podtree.errors import Damaged
from podtree.kernel import pidfd as kernel
from podtree.objects.descriptors import OpenFile
from podtree.objects.pidfd import PidFd
from podtree.restore.late import LateFiles
from podtree.restore.tree import Tree

__all__ = ["world"]


def test_whose_they_are(world: World) -> None:
    def hold() -> dict[str, Any]:
        ended = os.fork()
        if ended == 0:
            os._exit(3)
        made = {"self": os.pidfd_open(os.getpid()), "gone": os.pidfd_open(ended)}
        made["also gone"] = os.pidfd_open(ended, os.O_NONBLOCK)
        made["leader"] = os.pidfd_open(os.getpid(), kernel.PIDFD_THREAD)
        os.waitpid(ended, 0)
        return made

    pid = world.hold(hold)
    saved = world.collect([pid])
    assert saved.problems == []
    assert saved.of("self").what == PidFd(pid)
    assert saved.of("leader").what == PidFd(pid, thread=True)
    gone, also = saved.of("gone"), saved.of("also gone")
    assert isinstance(gone.what, PidFd) and gone.what.pid == 0 and gone.what.key
    assert gone.what == also.what and gone.id != also.id
    assert also.flags & os.O_NONBLOCK and not gone.flags & os.O_NONBLOCK
    world.end(pid)


def test_exit_status() -> None:
    """What the kernel remembers of a process that has been waited for; nothing before that."""
    for way, wanted in ((lambda: os._exit(3), 3 << 8), (lambda: os.kill(os.getpid(), signal.SIGKILL), 9)):
        pid = os.fork()
        if pid == 0:
            way()
        fd = kernel.pidfd_open(pid)
        assert kernel.has_ended(fd, 60)
        assert kernel.exit_status(fd) is None
        os.waitpid(pid, 0)
        assert kernel.exit_status(fd) == wanted
        os.close(fd)


def test_threads_are_told_apart() -> None:
    """By the flag that F_GETFL shows."""
    import fcntl

    found: list[int] = []
    thread = threading.Thread(
        target=lambda: found.append(os.pidfd_open(threading.get_native_id(), kernel.PIDFD_THREAD))
    )
    thread.start()
    thread.join()
    assert fcntl.fcntl(found[0], fcntl.F_GETFL) & kernel.PIDFD_THREAD
    os.close(found[0])


def test_hostile_image() -> None:
    files = [OpenFile(0, os.O_RDWR, 0, PidFd(77))]
    with pytest.raises(Damaged, match="pidfd of process 77"):
        LateFiles(files, Tree(0, lambda _: None, None), 1000, 0).make(lambda _: False)  # type: ignore[arg-type, return-value]
