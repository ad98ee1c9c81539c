"""Random process trees with random objects in them, as many as a minute allows: frozen, branched, verified.

The trees are the same in every run, so that a failure tells of the change that it comes with; with
PODTREE_RANDOM_SECONDS (as `make torture` has it) they are new ones each time, for as long as that.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from driver import Podtree
from lives import cases_of, start, verify

NEW_ONES = "PODTREE_RANDOM_SECONDS" in os.environ
SECONDS = float(os.environ.get("PODTREE_RANDOM_SECONDS", "60"))
ALONE = {  # cases that need the pod for themselves: fixed ports and names, much disk, the pod's own pid 1
    "descriptors.unlinked_large",
    "sockets.tcp_listening",
    "sockets.fresh_ports",
    "credentials.shared_memory_files",
    "credentials.environment_of_the_pod",
    "processes.tree",
}
CASES = sorted(
    {
        f"{program}.{case}"
        for program in ("processes", "descriptors", "sockets", "signals", "credentials")
        for case in cases_of(f"{program}.py")
    }
    - ALONE
)


def node(children: st.SearchStrategy[list[dict[str, Any]]]) -> st.SearchStrategy[dict[str, Any]]:
    """A node of the tree with these children."""
    return st.fixed_dictionaries(
        {
            "cases": st.lists(st.sampled_from(CASES), max_size=4),
            "children": children,
            "session": st.booleans(),
            "group": st.booleans(),
            "threads": st.integers(0, 3),
            "pages": st.integers(0, 64),
            "niceness": st.integers(0, 3),
        }
    )


TREES = st.recursive(
    node(st.just([])), lambda below: node(st.lists(below, min_size=1, max_size=3)), max_leaves=5
).filter(lambda tree: 3 <= count(tree) <= 14)


def count(tree: dict[str, Any]) -> int:
    """How many READYs a tree says: one per node and per case."""
    return 1 + len(tree["cases"]) + sum(count(child) for child in tree["children"])


@pytest.mark.timeout(SECONDS + 240)
def test_random_trees(podtree: Podtree) -> None:
    deadline = time.monotonic() + SECONDS
    begun: list[dict[str, Any]] = []
    done: list[dict[str, Any]] = []

    @settings(
        max_examples=1000,
        deadline=None,
        database=None,
        derandomize=not NEW_ONES,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(TREES, st.integers(1, 3), st.booleans())
    def one(tree: dict[str, Any], checkpoints: int, kill_origin: bool) -> None:
        # One that failed is run again by Hypothesis to be told: the deadline isn't for it.
        if time.monotonic() > deadline and len(done) == len(begun):
            return
        begun.append(tree)
        origin = start(podtree, "random_tree.py", json.dumps(tree), name="tree", ready=count(tree))
        ids = [origin.checkpoint() for _ in range(checkpoints)]
        pods = [] if kill_origin else [origin]
        if kill_origin:
            origin.kill()
        pods += [podtree.branch(ids[0], "first"), podtree.branch(ids[-1], "last")]
        verify(*pods)
        podtree.remove_all()
        done.append(tree)

    one()
    assert done
