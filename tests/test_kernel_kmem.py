"""Kernel memory read through BPF: what it shows is what other ways show, and what isn't there is an error."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from podtree.kernel.btf import VMLINUX, Btf
from podtree.kernel.kmem import WINDOW, KernelMemory, Unreadable
from podtree.kernel.sockmem import SocketMemory

pytestmark = pytest.mark.skipif(not Path(VMLINUX).exists(), reason="needs a kernel with CONFIG_DEBUG_INFO_BTF")
LARGE = os.urandom(300_000)


@pytest.fixture(scope="module")
def memory() -> Iterator[KernelMemory]:
    opened = KernelMemory()
    yield opened
    opened.close()


def test_layout() -> None:
    """Members of embedded and of anonymous structures; sizes; what isn't there."""
    btf = Btf()
    first, second = btf.member("list_head", "next"), btf.member("list_head", "prev")
    assert (first.offset, first.size, second.offset, btf.size("list_head")) == (0, 8, 8, 16)
    outer, inner = btf.member("task_struct", "tasks"), btf.member("task_struct", "tasks.prev")
    assert inner.offset == outer.offset + 8 and outer.size == 16
    assert btf.member("task_struct", "comm").size == 16
    assert btf.has("sk_buff", "next") and not btf.has("sk_buff", "nothing_of_the_kind")
    with pytest.raises(KeyError):
        btf.size("nothing_of_the_kind")


def test_tasks(memory: KernelMemory) -> None:
    """This thread, and processes by pidfd, are what /proc says they are."""
    found: dict[str, tuple[bytes, int]] = {}

    def other() -> None:
        task = memory.this_task()
        found["thread"] = task.raw("comm").rstrip(b"\0"), task.number("pid")
        found["own"] = Path("/proc/thread-self/comm").read_bytes().rstrip(), threading.get_native_id()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found["thread"] == found["own"]
    for pid in (os.getpid(), os.getppid()):
        pidfd = os.pidfd_open(pid)
        task = memory.task(pidfd)
        assert task.number("tgid") == pid
        assert task.raw("comm").rstrip(b"\0") == Path(f"/proc/{pid}/comm").read_bytes().rstrip()
        os.close(pidfd)


def test_what_is_not_there(memory: KernelMemory) -> None:
    for address in (0, 8, 1 << 46, 0xFFFF_FFFF_FFFF_F000, 0xDEAD_0000_0000_0000):
        with pytest.raises(Unreadable):
            memory.read(address, 16)
    with pytest.raises(Unreadable):
        memory.pointer(memory.file(0).address & ~(1 << 62))


def test_more_than_a_window(memory: KernelMemory) -> None:
    """A read in pieces gives what single reads give."""
    start = memory.this_task().pointer("stack")
    size = min(WINDOW + 100, 8192)
    assert len(memory.read(start, size)) == size
    comm = memory.this_task().at("comm")
    assert memory.read(comm, 16) == b"".join(memory.read(comm + at, 4) for at in range(0, 16, 4))


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_buffers(memory: KernelMemory, kind: int) -> None:
    """Every byte in a queue: in the buffers' own memory and in pages."""
    look = SocketMemory(memory)
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    sizes = [1, 100, 4000, 5000, 33_000, 150_000]
    for size in sizes:
        one.send(LARGE[:size])
    queue = memory.view("sock", memory.sock(other.fileno()))
    found = [look.bytes_of(skb) for skb in memory.each(queue.at("sk_receive_queue"), "sk_buff", "next")]
    assert b"".join(found) == b"".join(LARGE[:size] for size in sizes)
    other.recv(1)
    for end in (one, other):
        end.close()


def test_tcp_queues(memory: KernelMemory) -> None:
    """Of a connection with data under way, both ends: the bytes, and how they fit together."""
    look = SocketMemory(memory)
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        client.setblocking(False)
        sent = 0
        for _ in range(100):
            try:
                sent += client.send((LARGE * 20)[sent : sent + 100_000])
            except BlockingIOError:
                break
        near = look.tcp_end(memory.sock(client.fileno()))
        (far,) = look.waiting(server.fileno())
        assert near.local == far.remote and near.remote == far.local == (bytes((127, 0, 0, 1)), server.getsockname()[1])
        missing = near.sent_end - far.received_end & 0xFFFFFFFF
        assert far.received + near.sent[len(near.sent) - missing :] == (LARGE * 20)[:sent]
        ends = look.tcp_sockets(client.fileno())
        assert ends[(*near.local, *near.remote)] == near.address and ends[(*far.local, *far.remote)] == far.address
        assert look.error(client.fileno()) == (0, False)
        client.close()
