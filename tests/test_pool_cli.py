"""The verbs of the pool: log, show, tag, rm, discard, gc, fsck, pool, doctor."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from click.testing import CliRunner, Result

from podtree.doctor import examine
from podtree.errors import Conflict, Damaged, NotFound, UsageError
from podtree.kernel import btrfs
from podtree.pool import PodState, Pool
from pool_fixtures import pool, pool_home, take  # noqa: F401

# ruff: noqa: F811

Verb = Callable[..., Result]


@pytest.fixture
def verb(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Verb:
    """Runs a verb on the test's pool; errors come out as they are."""
    monkeypatch.setenv("PODTREE_HOME", str(pool.home))

    def run(name: str, *args: str) -> Result:
        command = importlib.import_module(f"podtree.cli.{name}").command
        return CliRunner().invoke(command, args, catch_exceptions=False)

    return run


def data(result: Result) -> Any:
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_log_as_json(pool: Pool, verb: Verb) -> None:
    assert data(verb("log", "--json")) == []
    web = pool.create_pod("web", {})
    one = take(pool, web, "a", {"pause_ms": 1.5, "bytes_written": 10, "id": "not this"})
    pool.tag("gold", one.id)
    two = take(pool, web, "b")
    found = data(verb("log", "--json"))
    assert [entry["id"] for entry in found] == [two.id, one.id]
    entry = found[1]
    assert (entry["pod"], entry["parent"], entry["tags"], entry["number"], entry["message"]) == (
        "web", None, ["gold"], 1, "a",
    )  # fmt: skip
    assert (entry["pause_ms"], entry["bytes_written"]) == (1.5, 10)
    assert datetime.fromisoformat(entry["time"]).tzinfo is not None
    assert found[0]["parent"] == one.id
    assert [entry["id"] for entry in data(verb("log", "-n", "1", "--json"))] == [two.id]


def test_log_of_one_pod_and_of_its_tree(pool: Pool, verb: Verb) -> None:
    web, other = pool.create_pod("web", {}), pool.create_pod("other", {})
    one, _two = take(pool, web, "a"), take(pool, web, "b")
    take(pool, other, "o")
    branch = pool.clone_pod(one.id, "try1")
    take(pool, branch, "t")
    assert [entry["pod"] for entry in data(verb("log", "web", "--json"))] == ["web", "web"]
    lines = verb("log", "try1", "--graph").stdout.splitlines()
    assert [re.match("[*|/ ]*", line)[0].strip() for line in lines] == ["*", "| *", "|/", "*"]  # type: ignore[index]
    assert "other" not in "\n".join(lines)
    assert len(verb("log", "--graph").stdout.splitlines()) == 6
    assert "try1: created" in verb("log").stdout
    with pytest.raises(NotFound):
        verb("log", "nothing")


def test_show(pool: Pool, verb: Verb) -> None:
    web = pool.create_pod("web", {"argv": ["redis-server", "--port", "1"]})
    one = take(pool, web, "a message", {"pause_ms": 1.5})
    two = take(pool, web, "b")
    pool.clone_pod(one.id, "try1")
    shown = data(verb("show", "web@1", "--json"))
    assert (shown["kind"], shown["id"]) == ("checkpoint", one.id)
    assert (shown["children"], shown["branches"]) == ([two.id], ["try1"])
    assert shown["spec"]["argv"] == ["redis-server", "--port", "1"]
    shown = data(verb("show", "web", "--json"))
    assert (shown["kind"], shown["name"], shown["checkpoints"]) == ("pod", "web", ["web@1", "web@2"])
    for text in ("a message", "pause_ms", "redis-server --port 1"):
        assert text in verb("show", one.id[:6]).stdout
    assert "web@1, web@2" in verb("show", "web").stdout
    with pytest.raises(NotFound, match="no pod, checkpoint or tag"):
        verb("show", "nothing")


def test_tag(pool: Pool, verb: Verb) -> None:
    web = pool.create_pod("web", {})
    one, two = take(pool, web, "a"), take(pool, web, "b")
    verb("tag", "web@1", "gold")
    verb("tag", "silver", "web@2")  # the other order, as long as it's clear
    assert {entry["name"]: entry["id"] for entry in data(verb("tag", "--json"))} == {"gold": one.id, "silver": two.id}
    with pytest.raises(Conflict):
        verb("tag", "web@2", "gold")
    verb("tag", "--force", "web@2", "gold")
    assert pool.resolve("gold").id == two.id
    assert "gold" in verb("tag").stdout
    verb("tag", "--delete", "gold", "silver")
    assert pool.tags() == {}
    verb("tag", "web@1", "gold")
    assert verb("untag", "gold").stdout == "gold\n" and pool.tags() == {}
    with pytest.raises(NotFound, match="no tag gold"):
        verb("untag", "gold")
    for words in (("-d",), ("one",), ("a", "b", "c")):
        with pytest.raises(UsageError):
            verb("tag", *words)


def test_rm(pool: Pool, verb: Verb) -> None:
    web, other = pool.create_pod("web", {}), pool.create_pod("other", {})
    one, two = take(pool, web, "a"), take(pool, web, "b")
    pool.tag("gold", one.id)
    (done, _other) = data(verb("rm", "web", "other", "--json"))
    assert (done["pod"], done["checkpoints"], done["kept"]) == ("web", [two.id], ["web@1"])
    assert pool.pods() == []
    with pytest.raises(NotFound):
        verb("rm", other.name)


def test_rm_of_a_running_pod_wants_force(pool: Pool, verb: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    def end_pod(_pool: Pool, record: Any) -> None:
        ended.append(record.name)
        pool.set_pod_state(record.id, PodState.EXITED, exit_code=137)

    monkeypatch.setattr("podtree.pod.control.end_pod", end_pod, raising=False)
    for number, words in enumerate((("rm", "--force"), ("discard",))):
        web = pool.create_pod("web", {})
        pool.set_pod_state(web.id, PodState.RUNNING, init_pid=os.getpid())
        with pytest.raises(Conflict):
            verb("rm", "web")
        assert verb(*words, "web").exit_code == 0
        assert (ended, pool.pods()) == (["web"] * (number + 1), [])


def test_discard(pool: Pool, verb: Verb) -> None:
    web = pool.create_pod("web", {})
    one, two, three = (take(pool, web, text) for text in "abc")
    done = data(verb("discard", "web@2", one.id, "--json"))
    assert [entry["checkpoints"] for entry in done] == [[two.id], [one.id]]
    assert [entry["ref"] for entry in done] == ["web@2", "web@1"]
    assert [record.id for record in pool.checkpoints()] == [three.id]
    verb("discard", "web")
    assert pool.checkpoints() == pool.pods() == []


def test_gc(pool: Pool, verb: Verb) -> None:
    (pool.root / "drafts" / "0123456789ab").mkdir()
    assert "would be removed" in verb("gc", "--dry-run").stdout
    report = data(verb("gc", "--json"))
    assert (report["leftovers"], report["checkpoints"], report["finished"]) == (["0123456789ab"], [], True)
    assert "freed" in verb("gc").stdout


def test_fsck(pool: Pool, verb: Verb) -> None:
    record = take(pool, pool.create_pod("web", {}), "a")
    assert "1 checkpoints" in verb("fsck").stdout
    assert data(verb("fsck", "web@1", "--json"))["damage"] == []
    btrfs.destroy(str(pool.checkpoint_dir(record.id) / "img"))
    with pytest.raises(Damaged, match=record.id) as caught:
        verb("fsck")
    assert caught.value.exit_code == 6


def test_pool(pool: Pool, verb: Verb) -> None:
    pool.create_pod("web", {})
    assert data(verb("pool", "info", "--json"))["pods"] == 1
    assert "1 pods" in verb("pool", "info").stdout
    pool.close()
    assert data(verb("pool", "unmount", "--json")) == {"unmounted": True}
    assert data(verb("pool", "unmount", "--json")) == {"unmounted": False}
    assert [pod.name for pod in pool.pods()] == ["web"] if Pool.open(pool.home) else False


def test_doctor(verb: Verb) -> None:
    probes = {probe.name: probe for probe in examine()}
    assert all(probe.ok for probe in probes.values() if probe.needed)
    assert all(probe.detail for probe in probes.values())
    assert {probe["name"] for probe in data(verb("doctor", "--json"))} == set(probes)
    assert "PAGEMAP_SCAN" in verb("doctor").stdout


def test_doctor_without_privileges_says_what_is_missing() -> None:
    script = (
        "import os, podtree.pool.home; from podtree.doctor import examine;"  # nobody may not read the interpreter
        "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534);"
        "bad = {p.name for p in examine() if not p.ok}; assert {'root', 'overlay', 'namespaces'} <= bad, bad"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_log_starts_quickly(pool: Pool) -> None:
    """What `podtree log` imports, and no more."""
    script = "import podtree.cli.log, sys; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"asyncio", "http.client", "email", "podtree.pod.supervisor", "podtree.pool.fsck", "xxhash"}
