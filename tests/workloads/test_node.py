"""A Node.js server with timers, a worker thread, a child process and a stream; clients in mid-answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from branching import branch_twice

from conftest import find_program
from driver import SYSTEM_PYTHON, WORKLOADS, Pod, Podtree, until

PLACE = "/var/lib/podtest-node"
CLIENT = """
import http.client, json, os, time
slow = http.client.HTTPConnection("127.0.0.1", 8081)
slow.request("GET", "/slow")
answer = slow.getresponse()
first = answer.readline()
print("READY", flush=True)
rest = [answer.readline() for _ in range(49)] + [answer.read()]
wanted = [b"piece %d\\n" % n for n in range(50)] + [b""]
print("OK" if [first, *rest] == wanted else f"BAD {first} {rest}", flush=True)
kept = http.client.HTTPConnection("127.0.0.1", 8081)
last = 0
while True:
    kept.request("GET", "/")
    state = json.loads(kept.getresponse().read())
    if state["requests"] <= last:
        print(f"BAD requests {state['requests']} after {last}", flush=True)
    last = state["requests"]
    if os.path.exists("calm"):
        time.sleep(0.2)
"""
START = f"""
mkdir -p {PLACE} && cd {PLACE}
"$NODE" {WORKLOADS}/server.js {PLACE} &
until {SYSTEM_PYTHON} -c 'import socket; socket.create_connection(("127.0.0.1", 8081))' 2> /dev/null
do sleep 0.1; done
{SYSTEM_PYTHON} -c "$CLIENT" &
wait
"""


def state(pod: Pod) -> dict[str, Any]:
    """What the server says of itself."""
    found: dict[str, Any] = json.loads(
        pod.python("import urllib.request as u; print(u.urlopen('http://127.0.0.1:8081/').read().decode())")
    )
    return found


def mark(pod: Pod, word: str) -> None:
    assert (
        pod.python(f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:8081/', b'{word}').read().decode())")
        == "stored"
    )


def seen(pod: Pod) -> object:
    memory, file = state(pod)["mark"], pod.read(f"{PLACE}/mark").strip()
    return memory if memory == file else (memory, file)


def goes_on(pod: Pod) -> None:
    """Timers, worker, child and clients go on; from then on the clients ask slowly."""
    before = state(pod)

    def all_did() -> bool:
        now = state(pod)
        return all(now[key] > before[key] for key in ("ticks", "worker", "echoed", "late", "requests"))

    until(all_did, f"timers, worker, child and clients of {pod.name} go on", dump=pod.podtree.dump)
    pod.sh(f"touch {PLACE}/calm")


@pytest.mark.needs("node")
@pytest.mark.timeout(300)
def test_node(podtree: Podtree) -> None:
    node = find_program("node")
    pod = podtree.run("sh", "-c", START, name="node", options=["-e", f"CLIENT={CLIENT}", "-e", f"NODE={node}"])
    pod.wait_log("READY", 60)
    lives = branch_twice(podtree, pod, mark, seen, goes_on)
    for one in lives.all:
        log = one.wait_log("OK", 60)
        assert "BAD" not in log, log
        lines = one.read(f"{PLACE}/appended").split("\n")[:-1]
        assert [int(line) for line in lines] == list(range(len(lines))), "lines of the appended file"
