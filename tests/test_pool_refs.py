"""References: the grammar, and what they mean in a pool."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podtree.errors import NotFound, PodtreeError, UsageError
from podtree.pool import Pool, refs
from podtree.pool.lookup import checkpoint_id
from pool_fixtures import pool, pool_home, take  # noqa: F401

# ruff: noqa: F811

NOW = datetime(2026, 11, 23, 2, 10, 30).astimezone()
NOW_NS = int(NOW.timestamp()) * 10**9


@pytest.fixture(params=["UTC", "Asia/Kolkata", "America/New_York"], autouse=True)
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp()) * 10**9


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10s", 10),
        ("5m", 300),
        ("2h", 7200),
        ("1d", 86400),
        ("1w", 604800),
        ("1h30m", 5400),
        ("1.5s", 1.5),
        ("250ms", 0.25),
    ],
)
def test_ago(text: str, seconds: float) -> None:
    assert refs.parse(f"web@{text}", NOW_NS) == refs.AtTime("web", NOW_NS - round(seconds * 10**9))


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("2026-11-23 02:10", "2026-11-23T02:10:00"),
        ('"2026-11-23 02:10"', "2026-11-23T02:10:00"),
        ("2026-11-23T02:10:05", "2026-11-23T02:10:05"),
        ("2026-11-23 02:10:05+03:00", "2026-11-23T02:10:05+03:00"),
        ("2026-11-23T02:10:05Z", "2026-11-23T02:10:05+00:00"),
        ("2026-11-23", "2026-11-23T00:00:00"),
    ],
)
def test_times(text: str, meaning: str) -> None:
    assert refs.parse(f"web@{text}", NOW_NS) == refs.AtTime("web", at(meaning))


def test_a_time_without_a_date_is_of_today() -> None:
    today = datetime.fromtimestamp(NOW_NS / 1e9).date()
    assert refs.parse("web@1:30", NOW_NS) == refs.AtTime("web", at(f"{today}T01:30:00"))


def test_numbers_and_names() -> None:
    assert refs.parse("web") == refs.ByName("web")
    assert refs.parse("web@3") == refs.ByNumber("web", 3)
    assert refs.parse("web@latest") == refs.Latest("web")


@pytest.mark.parametrize("text", ["", "@", "web@", "@3", "web@x", "web@10", "web@-3", "web@10q", "web@99:99", "web@²"])
def test_nonsense(text: str) -> None:
    if text == "web@10":
        assert refs.parse(text) == refs.ByNumber("web", 10)
        return
    with pytest.raises(UsageError):
        refs.parse(text, NOW_NS)


@given(st.text(max_size=30))
def test_any_text_is_a_reference_or_a_usage_error(text: str) -> None:
    try:
        refs.parse(text, NOW_NS)
    except UsageError:
        pass


def test_in_a_pool(pool: Pool) -> None:
    web = pool.create_pod("web", {})
    records = [take(pool, web, text) for text in "abc"]
    pool.tag("gold", records[0].id)
    expected = {
        "web": 2, "web@latest": 2, "web@1": 0, "web@2": 1, "gold": 0, records[1].id: 1, records[1].id[:8]: 1,
        f"{web.id}@2": 1, f"{web.id[:8]}@2": 1, web.id: 2,
    }  # fmt: skip
    for ref, index in expected.items():
        assert pool.resolve(ref).id == records[index].id, ref
    for ref in ("nothing", "web@4", "web@0", "nothing@1", "web@1w", "000000000000"):
        with pytest.raises(NotFound):
            pool.resolve(ref)


def test_a_pod_without_checkpoints_has_no_latest(pool: Pool) -> None:
    pool.create_pod("web", {})
    for ref in ("web", "web@latest", "web@1", "web@0s"):
        with pytest.raises(NotFound) as caught:
            pool.resolve(ref)
        assert "web" in caught.value.message


def test_an_ambiguous_prefix_names_the_candidates(pool: Pool) -> None:
    web = pool.create_pod("web", {})
    one = take(pool, web, "a")
    with pool.index.transaction() as connection:
        twin = one.id[:11] + ("0" if one.id[11] != "0" else "1")
        copy = "INSERT INTO checkpoints SELECT ?, pod, 9, parent, time_ns, '', '{}' FROM checkpoints"
        connection.execute(copy, (twin,))
    with pytest.raises(NotFound, match=f"(?=.*{one.id})(?=.*{twin})"):
        pool.resolve(one.id[:6])
    assert pool.resolve(one.id).id == one.id


def test_by_time(pool: Pool) -> None:
    """The newest at or before the time; before a branch's first one its line of descent is followed."""
    web = pool.create_pod("web", {})
    records = [take(pool, web, text) for text in "abc"]
    branch = pool.clone_pod(records[1].id, "try1")
    mine = take(pool, branch, "d")
    second = 10**9
    with pool.index.transaction() as connection:
        for record, ago in zip([*records, mine], (40, 30, 20, 10), strict=True):
            connection.execute("UPDATE checkpoints SET time_ns = ? WHERE id = ?", (NOW_NS - ago * second, record.id))
    cases = {
        "web@0s": 2, "web@20s": 2, "web@21s": 1, "web@40s": 0, "try1@5s": 3, "try1@15s": 1, "try1@25s": 1,
        "try1@35s": 0,
    }  # fmt: skip
    for ref, index in cases.items():
        assert checkpoint_id(pool.index, ref, NOW_NS) == [*records, mine][index].id, ref
    when = datetime.fromtimestamp((NOW_NS - 25 * second) / 1e9)
    assert pool.resolve(f"web@{when:%Y-%m-%d %H:%M:%S}").id == records[1].id
    late = datetime.now() + timedelta(days=1)
    assert pool.resolve(f"web@{late:%Y-%m-%d %H:%M}").id == records[2].id
    with pytest.raises(NotFound, match="as old as"):
        checkpoint_id(pool.index, "web@41s", NOW_NS)


@pytest.mark.parametrize(
    "far", ["9" * 30, "9" * 5000, "9" * 400 + "s", "99999999999999d", "1970-01-01", "9" * 15 + "w"]
)
def test_what_is_too_far_back_is_not_found(pool: Pool, far: str) -> None:
    take(pool, pool.create_pod("web", {}), "a")
    with pytest.raises(NotFound):
        pool.resolve(f"web@{far}")


def test_the_far_future_is_the_latest(pool: Pool) -> None:
    record = take(pool, pool.create_pod("web", {}), "a")
    assert pool.resolve("web@2500-12-31 23:59:59").id == record.id


def test_hostile_references_do_not_reach_sql_or_the_disk(pool: Pool) -> None:
    for ref in ("' OR 1=1 --", "../..", "%", "_", "web@' OR 1", "\0", "a" * 10000, "\udcff"):
        with pytest.raises(PodtreeError):
            pool.resolve(ref)
    assert os.listdir(pool.root / "trash") == []
