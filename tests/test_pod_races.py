"""Two commands at once on the same pod: each does its work or says why not, and the pod is there once or not at all."""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path

import pytest

from driver import Pod, Podtree, until
from pod_fixtures import start, status

COUNT = "i=0; while :; do i=$((i+1)); echo $i > /srv/i; sleep 0.02; done"
ROUNDS = 4


def ended_pod(podtree: Podtree) -> tuple[Pod, str]:
    """A pod that has ended, and its checkpoint."""
    pod = podtree.run("sh", "-c", COUNT)
    ref = pod.checkpoint()
    pod.kill()
    pod.wait()
    return pod, ref


def finish(*commands: subprocess.Popen[bytes]) -> list[tuple[int, str]]:
    """Exit code and stderr of each."""
    done = []
    for command in commands:
        _, err = command.communicate(timeout=120)
        assert b"Traceback" not in err, err.decode()
        done.append((command.returncode, err.decode()))
    return done


def assert_once(podtree: Podtree, pod: Pod) -> None:
    """It runs, it answers, and there is one keeper of it with one supervisor and one first process."""
    assert pod.running()
    before = int(pod.read("/srv/i"))
    until(lambda: int(pod.read("/srv/i") or 0) > before, "it counts")
    host = [status(pid) for pid in podtree.processes() if Path(f"/proc/{pid}").exists()]
    names = [one["Name"] for one in host if one["Name"].startswith("podtree-")]
    assert sorted(names) == ["podtree-keeper", "podtree-superv"]
    first = [one for one in host if one["NSpid"].split()[1:] == ["1"]]
    assert sum(not one["State"].startswith("t") for one in first) == 1  # but for what waits for the next rewind


def test_two_rewinds_of_an_ended_pod(podtree: Podtree) -> None:
    for _ in range(ROUNDS):
        pod, ref = ended_pod(podtree)
        done = finish(*(start(podtree, "rewind", pod.name, ref) for _ in range(2)))
        assert [code for code, _ in done] == [0, 0], done
        assert_once(podtree, pod)
        pod.remove()


@pytest.mark.parametrize("verb", ["rm", "discard"])
def test_a_rewind_and_a_removal_of_an_ended_pod(podtree: Podtree, verb: str) -> None:
    for _ in range(ROUNDS):
        pod, ref = ended_pod(podtree)
        (rewound, _), (removed, err) = finish(start(podtree, "rewind", pod.name, ref), start(podtree, verb, pod.name))
        names = [one["name"] for one in podtree.pods()]
        if removed == 0:
            assert names == []
            assert rewound in (0, 4, 5)
        else:
            assert (rewound, removed, names) == (0, 5, [pod.name]), err
            assert_once(podtree, pod)
            pod.remove()
        until(lambda: podtree.processes() == [], "no process is left")
        podtree("fsck")
        assert [one for one in podtree.json("log") if one["pod"] == pod.name] == []


def test_a_rewind_and_its_checkpoints_removal(podtree: Podtree) -> None:
    """The pod is as it was at that checkpoint, whether that is still there or not."""
    for ended, _ in itertools.product((False, True), range(2)):
        pod, ref = ended_pod(podtree)
        if not ended:
            podtree("rewind", pod.name, ref)
        (code, err), (discarded, _) = finish(start(podtree, "rewind", pod.name, ref), start(podtree, "discard", ref))
        assert discarded == 0 and code in (0, 4), err
        if code == 0 or not ended:
            assert_once(podtree, pod)
        pod.remove()


def test_a_damaged_checkpoint_does_not_cost_the_running_pod(podtree: Podtree) -> None:
    """Rewinding there is refused, and the pod runs on as if nothing had been asked; an ended one stays what it was."""
    pod = podtree.run("sh", "-c", COUNT)
    ref = pod.checkpoint()
    image = podtree.home / "pool" / "ckpts" / ref / "img"
    subprocess.run(["btrfs", "property", "set", str(image), "ro", "false"], check=True)
    with open(image / "mem" / "1", "r+b") as file:
        begin = os.lseek(file.fileno(), 0, os.SEEK_DATA)
        file.seek(begin + 8)
        byte = file.read(1)[0]
        file.seek(begin + 8)
        file.write(bytes([byte ^ 4]))
    pid = pod.info()["pid"]
    done = podtree("rewind", pod.name, ref, code=6)
    assert f"page {begin // 4096} of page file mem/1 is damaged" in done.err
    assert pod.info()["pid"] == pid
    assert_once(podtree, pod)
    done = podtree("branch", ref, code=6)
    assert "is damaged" in done.err and len(podtree.pods()) == 1
    pod.kill()
    podtree("rewind", pod.name, ref, code=6)
    assert pod.info()["state"] == "exited"
    until(lambda: podtree.processes() == [], "no process is left")
