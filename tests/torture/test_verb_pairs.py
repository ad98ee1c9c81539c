"""Any two verbs at once on the same pod: each does its work or says why not; pod and pool are whole afterwards.

PODTREE_PAIRS sets how many pairs are tried (default 3; all of them with a large number), PODTREE_SEED which.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from driver import Pod, Podtree, until
from pod_fixtures import start

PAIRS = int(os.environ.get("PODTREE_PAIRS", "3"))
SEED = int(os.environ.get("PODTREE_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
COUNT = "i=0; while :; do i=$((i+1)); echo $i > /srv/i; sleep 0.02; done"
VERBS = {
    "checkpoint": "checkpoint {pod}",
    "captured": "checkpoint --no-wait {pod}",
    "stopped": "checkpoint --stop {pod}",
    "mark": "mark {pod} text",
    "record": "record {pod} --every 100ms --keep-last 2",
    "off": "record {pod} --off",
    "check": "check {pod}",
    "look": "diff {ref} {pod}",
    "rewind": "rewind {pod} {ref}",
    "branch": "branch {ref}",
    "exec": "exec {pod} -- sleep 0.2",
    "show": "show {pod}",
    "log": "log {pod} --graph",
    "tag": "tag {ref} kept --force",
    "export": "export {ref} -o {file}",
    "import": "import {export}",
    "discard": "discard {other}",
    "gc": "gc",
    "fsck": "fsck",
    "top": "top --once",
    "metrics": "metrics",
    "stop": "stop -t 1 {pod}",
    "kill": "kill {pod}",
    "rm": "rm --force {pod}",
}
ENDS = {"stopped", "stop", "kill", "rm"}
#: Done; refused for the moment; not there; in another state; of exec: ended with the pod.
CODES = {0, 3, 4, 5, 137, 143}


@pytest.fixture(autouse=True)
def no_tags(podtree: Podtree) -> Iterator[None]:
    yield
    for tag in podtree.json("tag"):
        podtree("untag", tag["name"])
    podtree("gc")


def pairs() -> list[tuple[str, str]]:
    every = list(itertools.combinations_with_replacement(VERBS, 2))
    return random.Random(SEED).sample(every, min(PAIRS, len(every)))


@pytest.mark.parametrize("pair", pairs(), ids="+".join)
def test_two_at_once(podtree: Podtree, pair: tuple[str, str], tmp_path: Path) -> None:
    print(f"PODTREE_SEED={SEED}")
    pod = podtree.run("sh", "-c", COUNT)
    until(lambda: pod.sh("cat /srv/i 2>/dev/null; true"), "it counts")
    other, ref = pod.checkpoint(), pod.checkpoint()
    podtree("export", ref, "-o", tmp_path / "export")
    words = {"pod": pod.name, "ref": ref, "other": other, "export": str(tmp_path / "export")}
    commands = [
        start(podtree, *(word.format(**words, file=tmp_path / str(n)) for word in VERBS[verb].split()))
        for n, verb in enumerate(pair)
    ]
    for verb, command in zip(pair, commands, strict=True):
        _, err = command.communicate(timeout=120)
        assert b"Traceback" not in err, err.decode()
        assert command.returncode in CODES, (verb, command.returncode, err)
    assert podtree("fsck").code == 0
    if not ENDS & set(pair):
        goes_on(pod)
        pod.checkpoint()
        for branch in podtree.pods():
            if branch["name"] != pod.name:
                goes_on(Pod(podtree, branch["name"]))
    podtree.remove_all()
    until(lambda: podtree.processes() == [], "no process is left", dump=podtree.dump)
    for name in ("0", "1"):
        if (tmp_path / name).exists():
            subprocess.run(["tar", "tf", tmp_path / name], check=True, capture_output=True)


def goes_on(pod: Pod) -> None:
    before = int(pod.read("/srv/i") or 0)
    until(lambda: int(pod.read("/srv/i") or 0) > before, f"{pod.name} counts on")
