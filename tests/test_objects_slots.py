"""Pods with very many open files: as many as this machine's limit allows come back, more are refused beforehand."""

from __future__ import annotations

import resource
import subprocess

from driver import SYSTEM_PYTHON, Pod, Podtree

PROGRAM = """
import os, sys, time
wanted = int(sys.argv[1])
os.makedirs("/var/lib/many", exist_ok=True)
numbers = [os.open("/var/lib/many", os.O_RDONLY | os.O_DIRECTORY) for _ in range(wanted)]
for number in numbers[::100]:
    os.lseek(number, 0, os.SEEK_SET)
print("READY", flush=True)
while not os.path.exists("/var/lib/go"):
    time.sleep(0.02)
same = all(os.path.samestat(os.fstat(number), os.stat("/var/lib/many")) for number in numbers)
print("OK" if same and numbers == list(range(3, 3 + wanted)) else "BAD", flush=True)
time.sleep(1000)
"""


def run(podtree: Podtree, files: int, hard: int) -> Pod:
    """A pod whose process has so many open files, made and kept by a podtree with that hard limit."""
    pod = Pod(podtree, podtree.new_name("many"))
    command = [podtree.program, "run", "-d", "--name", pod.name, "--", SYSTEM_PYTHON, "-c", PROGRAM, str(files)]
    limit = (hard, hard)
    subprocess.run(
        [str(word) for word in command],
        env=podtree.env,
        check=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit),
    )
    podtree.note_pods()
    pod.wait_log("READY")
    return pod


def test_nearly_half_the_limit(podtree: Podtree) -> None:
    """The builder holds every file beside the numbers that the process has: twice as many."""
    pod = run(podtree, 1900, 4096)
    branch = podtree.branch(pod.checkpoint())
    for one in (pod, branch):
        one.sh("touch /var/lib/go")
        assert "BAD" not in one.wait_log("OK")
    branch.remove()


def test_more_than_can_come_back_is_refused(podtree: Podtree) -> None:
    pod = run(podtree, 2100, 4096)
    refused = podtree("check", pod.name, code=None)
    if refused.code == 0:  # with CAP_SYS_RESOURCE the limit doesn't bind
        branch = podtree.branch(pod.checkpoint())
        branch.sh("touch /var/lib/go")
        assert "BAD" not in branch.wait_log("OK")
        return
    assert refused.code == 3 and "RLIMIT_NOFILE" in refused.out, refused
    podtree("checkpoint", pod.name, code=3)
    pod.sh("touch /var/lib/go")
    pod.wait_log("OK")
