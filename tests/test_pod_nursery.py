"""Branches are forked from a running keeper where there is one, and are the same where there is none."""

from __future__ import annotations

import os
import signal

from driver import Pod, Podtree
from pod_fixtures import parent, status, supervisor_of, wait_gone

LOOP = "while :; do sleep 0.05; done"


def keeper_of(pod: Pod) -> int:
    keeper = parent(supervisor_of(pod))
    assert status(keeper)["Name"] == "podtree-keeper"
    return keeper


def test_forked_from_the_origins_keeper(podtree: Podtree) -> None:
    """It is a child of it, in a session of its own, with none of its descriptors, and outlives it."""
    origin = podtree.run("sh", "-c", LOOP)
    ref = origin.checkpoint()
    branch = podtree.branch(ref)
    keeper, mother = keeper_of(branch), keeper_of(origin)
    assert parent(keeper) == mother
    assert os.getsid(keeper) == keeper
    held = {os.readlink(f"/proc/{keeper}/fd/{fd}") for fd in os.listdir(f"/proc/{keeper}/fd")}
    assert not any(str(origin.info()["id"]) in link for link in held), held
    origin.kill()
    origin.wait()
    wait_gone(mother)
    assert branch.sh("echo still") == "still"
    again = podtree.branch(ref)
    assert parent(keeper_of(again)) == keeper, "another running pod's keeper does it when the origin's is gone"


def test_without_anybody_to_ask(podtree: Podtree) -> None:
    origin = podtree.run("sh", "-c", LOOP)
    ref = origin.checkpoint()
    origin.kill()
    origin.wait()
    branch = podtree.branch(ref)
    assert status(parent(keeper_of(branch)))["Name"] != "podtree-keeper"
    assert branch.running()


def test_one_that_is_stuck_is_passed_over(podtree: Podtree) -> None:
    """A keeper that doesn't answer keeps nobody from branching."""
    origin = podtree.run("sh", "-c", LOOP)
    ref = origin.checkpoint()
    stuck = keeper_of(origin)
    os.kill(stuck, signal.SIGSTOP)
    try:
        assert podtree.branch(ref).running()
    finally:
        os.kill(stuck, signal.SIGCONT)
