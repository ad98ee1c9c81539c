"""memcached with four threads, under clients that check every answer."""

from __future__ import annotations

import pytest
from branching import branch_twice

from driver import SYSTEM_PYTHON, WORKLOADS, Pod, Podtree

PLACE = "/var/lib/podtest-memcached"
START = f"""
mkdir -p {PLACE} && cd {PLACE}
memcached -u root -l 127.0.0.1 -p 11311 -t 4 -m 64 &
until {SYSTEM_PYTHON} -c 'import socket; socket.create_connection(("127.0.0.1", 11311))' 2> /dev/null
do sleep 0.1; done
exec {SYSTEM_PYTHON} {WORKLOADS}/inside_memcached.py {PLACE}
"""
TALK = """
import socket
server = socket.create_connection(("127.0.0.1", 11311)).makefile("rwb")
server.write({request!r}); server.flush()
print(server.readline().decode().strip(), {answer})
"""


def mark(pod: Pod, word: str) -> None:
    request = f"set mark 0 0 {len(word)}\r\n{word}\r\n".encode()
    assert pod.python(TALK.format(request=request, answer="''")).strip() == "STORED"
    pod.sh(f"echo {word} > {PLACE}/mark")


def seen(pod: Pod) -> object:
    memory = pod.python(TALK.format(request=b"get mark\r\n", answer="server.readline().decode()")).split()[-1]
    file = pod.read(f"{PLACE}/mark").strip()
    return memory if memory == file else (memory, file)


def goes_on(pod: Pod) -> None:
    """All clients go on, on the connections that they had; from now on slowly."""
    counts = f"touch {PLACE}/calm; for i in 0 1 2; do wc -l < {PLACE}/progress$i; done"
    before = [int(count) for count in pod.sh(counts).split()]

    def all_did(out: str) -> bool:
        return all(int(now) > then for now, then in zip(out.split(), before, strict=True))

    pod.wait_output(counts, all_did, "all clients go on", 60)


@pytest.mark.needs("memcached")
@pytest.mark.timeout(300)
def test_memcached(podtree: Podtree) -> None:
    pod = podtree.run("sh", "-c", START, name="memcached")
    pod.wait_log("READY", 60)
    lives = branch_twice(podtree, pod, mark, seen, goes_on)
    for one in lives.all:
        assert "BAD" not in one.logs(), one.logs()
