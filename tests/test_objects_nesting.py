"""Namespaces that programs of a pod make (`run --nested`): saved and made again, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from driver import PROGRAMS, SYSTEM_PYTHON, Podtree
from lives import IN_POD, End, cases_of, ends, generations, start_together
from podtree.errors import Damaged, RestoreFailed
from test_restore_hostile import Edit, Image, Victim

CASES = cases_of("nesting.py")
NESTED = ("--nested",)


@pytest.fixture(scope="module")
def lives(session_podtree: Podtree, request: pytest.FixtureRequest) -> Iterator[dict[str, dict[str, End]]]:
    """All selected cases side by side in one pod, through several lives."""
    items = [item for item in request.session.items if item.path == request.path and isinstance(item, pytest.Function)]
    selected = [
        item.callspec.params["case"] for item in items if hasattr(item, "callspec") and "case" in item.callspec.params
    ]
    commands: dict[str, list[str | Path]] = {c: [SYSTEM_PYTHON, PROGRAMS / "nesting.py", c] for c in selected}
    pods = generations(session_podtree, start_together(session_podtree, commands, "nesting", NESTED))
    yield dict(zip((pod.name for pod in pods), ends(pods), strict=True))
    session_podtree.remove_all()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_nesting(lives: dict[str, dict[str, End]], case: str) -> None:
    wrong = [
        f"{pod}: {found.get(case)}" for pod, found in lives.items() if not (end := found.get(case)) or not end.good()
    ]
    assert not wrong, "\n".join(wrong)


REFUSED = {  # how it comes about: which object, and why
    "unshare -Urm sleep 1000": ("mount namespace", "not the pod's own"),
    "unshare -Urn sh -c 'ip address add 10.0.0.1/8 dev lo; exec sleep 1001'": ("net namespace", "addresses"),
    "unshare -Urn sh -c 'ip link set lo mtu 1400; exec sleep 1002'": ("net namespace", "links"),
    "unshare -Uri sh -c 'ipcmk -Q; exec sleep 1004'": ("ipc namespace", "message queues"),
}  # fmt: skip


def test_refused(podtree: Podtree) -> None:
    """By check and checkpoint, naming object and reason."""
    starts = " ".join(f"{command} &" for command in REFUSED)
    pod = podtree.run("sh", "-c", f"{starts} wait", name="refused", options=NESTED)
    pod.wait_output("ps ax | grep -c '[s]leep 100'", lambda out: int(out) >= len(REFUSED), "all are there")
    for command in ("check", "checkpoint"):
        problems = json.loads(podtree(command, pod.name, "--json", code=3).out)["problems"]
        for source, (what, why) in REFUSED.items():
            found = [p for p in problems if p["object"] == what and why in p["reason"]]
            assert found, f"{source}: {problems}"


def test_refused_of_the_first(podtree: Podtree) -> None:
    pod = podtree.run("unshare", "-Urn", "sleep", "1000", name="first", options=NESTED)
    pod.wait_output("readlink /proc/1/exe", lambda out: "sleep" in out, "it has executed its program")
    assert "process 1 has left the pod's own" in podtree("checkpoint", pod.name, code=3).err


def test_only_when_asked_for(podtree: Podtree) -> None:
    pod = podtree.run("sleep", "1000", name="plain")
    assert "not permitted" in pod.exec("sh", "-c", "unshare -Ur true 2>&1", code=1)


# ---- images that somebody has changed


@pytest.fixture(scope="module")
def victim(session_podtree: Podtree, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    options = (*NESTED, "-e", f"PT_DIR={IN_POD}")
    made = Victim(session_podtree, tmp_path_factory.mktemp("shown"), "nesting.py", "all_kinds", options=options)
    yield made
    made.pool.close()
    session_podtree.remove_all()


def each(change: Callable[[Any], object], *path: str) -> Edit:
    """An edit of every object in a list of `nesting`, or of every process."""

    def edit(image: Image) -> None:
        for one in image["nesting"][path[0]] if path else image["processes"]:
            change(one)

    return edit


IMPOSSIBLE: dict[str, Edit] = {
    "its own parent": each(lambda user: user.update(parent=user["id"]), "users"),
    "no parent": each(lambda user: user.update(parent=77), "users"),
    "strange ids": each(lambda user: user.update(uids=[[0, -1, 1 << 40]]), "users"),
    "ids twice": each(lambda user: user.update(uids=[[0, 0, 10], [0, 5, 10]]), "users"),
    "of nobody": each(lambda space: space.update(user=0), "spaces"),
    "of no kind": each(lambda space: space.update(kind="mnt"), "spaces"),
    "of another kind": each(lambda space: space.update(kind="uts"), "spaces"),
    "another first": each(lambda one: one.update(first=1), "pids"),
    "first of nothing": each(lambda one: one.update(first=9999), "pids"),
    "none of them": lambda image: image.update(nesting={}),
    "at home, with all capabilities": each(lambda process: process.update(member={})),
    "pids of nowhere": each(lambda process: process["place"].update(inner=[])),
    "threads of nowhere": each(lambda process: process["threads"][0].update(inner_tids=[1, 2, 3])),
}  # fmt: skip


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_impossible(victim: Victim, what: str) -> None:
    image = victim.payload()
    IMPOSSIBLE[what](image)
    error = victim.attempt(msgspec.msgpack.encode(image))
    assert isinstance(error, (Damaged, RestoreFailed)), error
    print(error)


def test_unchanged(victim: Victim) -> None:
    assert victim.attempt(msgspec.msgpack.encode(victim.payload())) is None
