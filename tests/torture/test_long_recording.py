"""A pod recorded for long, at the highest rate, with thinning: nothing that its supervisor or the pool has grows.

PODTREE_RECORD_SECONDS sets for how long (default 3; `make torture`: SECONDS, an hour).
"""

from __future__ import annotations

import os
import time
from typing import Any

from driver import SYSTEM_PYTHON, Pod, Podtree, until

SECONDS = float(os.environ.get("PODTREE_RECORD_SECONDS", "3"))
WORK = """
import os, random, time
kept = bytearray(16 << 20)
n = 0
while True:
    n += 1
    for _ in range(50):
        at = random.randrange(len(kept)); kept[at] = n & 255
    with open("/srv/file%d" % (n % 10), "wb") as file:
        file.write(os.urandom(20000))
    print(n, flush=True) if n % 50 == 0 else None
    time.sleep(0.02)
"""


def state(podtree: Podtree, pod: Pod) -> dict[str, Any]:
    """What must not grow."""
    (found,) = podtree.json("metrics", pod.name)
    info = podtree.json("pool", "info")
    return {**found, "used": info["used"], "checkpoints": info["checkpoints"]}


def test_flat(podtree: Podtree) -> None:
    pod = podtree.run(
        SYSTEM_PYTHON,
        "-c",
        WORK,
        options=["--every", "100ms", "--budget", "50%", "--keep-last", "5", "--keep-marks", "2"],
    )
    until(lambda: podtree.json("record", pod.name)["thinned"] > 10, "it is under way", 120)
    podtree("gc")
    before = state(podtree, pod)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        pod.sh("echo mark > /run/podtree/mark")
        time.sleep(min(5.0, SECONDS / 4))
    taken = podtree.json("record", pod.name)["taken"]
    until(lambda: podtree.json("record", pod.name)["taken"] > taken, "it goes on")
    podtree("gc")
    after = state(podtree, pod)
    print(before, after)
    assert after["tally"]["checkpoints"] > before["tally"]["checkpoints"]
    assert after["fds"] <= before["fds"] + 3
    assert after["rss"] <= before["rss"] + (8 << 20)
    assert after["checkpoints"] <= 5 + 10 + 4 + 1
    assert after["used"] <= before["used"] + (64 << 20)
    assert after["processes"] <= before["processes"]
    assert podtree.json("record", pod.name)["failed"] == 0
    podtree("fsck")
