"""POSIX message queues: what is read out of the kernel's memory is what receiving gives; hostile images."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from driver import Podtree
from holder import World, world
from podtree.errors import Damaged
from podtree.kernel import mqueue as kernel
from podtree.kernel.namespaces import Clone, unshare
from podtree.kernel.sys import syscall
from podtree.objects import insight, mqueue
from podtree.objects.held import OWN_MQUEUE
from podtree.objects.mqueue import PosixQueue, QueuedMessage, QueueFile

__all__ = ["world"]
RECEIVE = 243  # mq_timedreceive
SEED = int(os.environ.get("PODTREE_TEST_SEED", str(random.SystemRandom().randrange(10**6))))


def own_queues() -> None:
    """In an IPC namespace of its own, with /dev/mqueue."""
    unshare(Clone.NEWIPC)
    os.mkdir(OWN_MQUEUE)
    subprocess.run(["mount", "-t", "mqueue", "mqueue", OWN_MQUEUE], check=True)


def receive(fd: int, size: int) -> tuple[int, bytes]:
    """(priority, data)."""
    buffer, priority = bytearray(size), bytearray(4)
    got = syscall(RECEIVE, fd, buffer, size, priority, None)
    return int.from_bytes(priority, "little"), bytes(buffer[:got])


def test_random_histories(world: World) -> None:
    """Messages of all sizes come and go at random: what is left comes back in the order in which it is received."""
    print(f"PODTREE_TEST_SEED={SEED}")
    size, most = 9000 if int(Path("/proc/sys/fs/mqueue/msgsize_max").read_text()) >= 9000 else 8192, 10

    def history() -> list[Any]:
        chance = random.Random(SEED)
        steps: list[Any] = []
        inside = 0
        for _ in range(300):
            if inside < most and chance.random() < 0.55:
                edge = chance.choice([0, 1, 4047, 4048, 4049, 8136, 8137, size, chance.randrange(size)])
                steps.append((chance.randrange(5), chance.randbytes(min(edge, size))))
                inside += 1
            elif inside:
                steps.append(None)
                inside -= 1
        return steps

    def play(fd: int) -> None:
        for step in history():
            if step is None:
                receive(fd, size)
            else:
                kernel.mq_send(fd, step[1], step[0])

    def hold() -> dict[str, Any]:
        own_queues()
        flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK
        made = {"named": kernel.mq_open(b"named", flags, 0o600, most, size)}
        made["gone"] = kernel.mq_open(b"named.too", flags, 0o600, most, size)
        kernel.mq_unlink(b"named.too")
        for fd in made.values():
            play(fd)
        return made

    def check(names: dict[str, Any]) -> None:
        messages: list[tuple[int, bytes]] = []
        for step in history():
            if step is None:
                messages.remove(max(messages, key=lambda message: message[0]))
            else:
                messages.append(step)
        for name in ("named", "gone"):
            left = sorted(messages, key=lambda message: -message[0])
            assert kernel.mq_attributes(names[name]).waiting == len(left)
            assert [receive(names[name], size) for _ in left] == left
        assert os.listdir(OWN_MQUEUE) == ["named"]

    pid = world.hold(hold)
    saved = world.collect([pid])
    assert saved.problems == []
    world.end(pid)
    restored = world.restore(saved, check, prepare=own_queues)
    again = world.collect([restored])
    assert again.problems == [] and again.queues == saved.queues
    world.finish(restored)


def test_refused_without_kernel_memory(podtree: Podtree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a word about a pod without queues; one with a queue is refused by name."""
    monkeypatch.setitem(podtree.env, insight.SWITCH, "off")
    pod = podtree.run("sleep", "600", name="queued")
    podtree("check", pod.name)
    pod.sh("touch /dev/mqueue/tasks")
    done = podtree("check", pod.name, code=3)
    assert "POSIX message queue /tasks: what it holds is told by no call" in done.out + done.err
    assert f"{insight.SWITCH} is off" in done.out + done.err


def queue(**more: Any) -> PosixQueue:
    fields = {"name": "q", "mode": 0o600, "uid": 0, "gid": 0, "max_messages": 2, "message_size": 5}
    return PosixQueue(**{**fields, **more})


@pytest.mark.parametrize(
    "state",
    [
        queue(name="../dev/shm/x"),
        queue(name=".."),
        queue(name="x" * 300),
        queue(max_messages=0),
        queue(messages=(QueuedMessage(0, b""),) * 3),
        queue(messages=(QueuedMessage(0, b"123456"),)),
        queue(messages=(QueuedMessage(1 << 20, b""),)),
    ],
)
def test_hostile_images(state: PosixQueue) -> None:
    with pytest.raises(Damaged):
        mqueue.restore_queues((state,), [])
    with pytest.raises(Damaged):
        mqueue.restore_queues((), [(0, os.O_RDWR, QueueFile(state.name, key="7", queue=state))])


def test_hostile_files() -> None:
    for state in (QueueFile("a/b"), QueueFile("q", key="7"), QueueFile("../null", by_path=True)):
        with pytest.raises(Damaged):
            mqueue.restore_queues((), [(0, os.O_RDWR, state)])
