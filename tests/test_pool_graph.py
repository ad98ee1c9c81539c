"""The drawing of the tree."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from podtree.pool.graph import draw, tree_of
from podtree.pool.records import CheckpointId, CheckpointRecord, PodId, PodRecord, PodState


def record(name: str, parent: str | None, time: int, **more: object) -> CheckpointRecord:
    return CheckpointRecord(
        id=CheckpointId(name),
        pod=PodId("p"),
        pod_name="web",
        number=time,
        parent=None if parent is None else CheckpointId(parent),
        time_ns=10**18 + time * 10**9,
        **more,  # type: ignore[arg-type]
    )


def history(*edges: str) -> list[CheckpointRecord]:
    """history("a", "b<a") : a, then b with parent a."""
    records = []
    for time, edge in enumerate(edges, 1):
        name, _, parent = edge.partition("<")
        records.append(record(name, parent or None, time))
    return records


def drawing(*edges: str) -> list[str]:
    return draw(history(*edges), label=lambda record: record.id).splitlines()


def test_nothing() -> None:
    assert draw([]) == ""


def test_a_line() -> None:
    assert drawing("a", "b<a", "c<b") == ["* c", "* b", "* a"]


def test_two_branches() -> None:
    assert drawing("a", "b<a", "c<b", "x<b") == ["* x", "| * c", "|/", "* b", "* a"]


def test_branches_of_branches() -> None:
    assert drawing("a", "b<a", "c<b", "x<b", "y<x", "z<x", "d<c") == [
        "* d",
        "* c",
        "| * z",
        "| | * y",
        "| |/",
        "| * x",
        "|/",
        "* b",
        "* a",
    ]


def test_many_branches_of_one_stay_narrow() -> None:
    assert drawing("a", "b<a", "c<a", "d<a") == ["* d", "| * c", "|/", "| * b", "|/", "* a"]


def test_trees_are_apart() -> None:
    assert drawing("a", "x", "b<a", "y<x") == ["* y", "* x", "", "* b", "* a"]


def test_an_absent_parent_is_a_beginning() -> None:
    assert drawing("b<a", "c<b") == ["* c", "* b"]


def test_a_clock_that_was_set_back_does_not_turn_the_tree_over() -> None:
    records = [record("a", None, 9), record("b", "a", 1)]
    assert draw(records, label=lambda record: record.id).splitlines() == ["* b", "* a"]


def test_a_line_says_what_matters() -> None:
    one = record("0123456789ab", None, 1, tags=("gold",), message="before\nmore", summary={"bytes_written": 3 << 20})
    pod = PodRecord(
        id=PodId("q"), name="try1", state=PodState.RUNNING, created_ns=0, parent=one.id, head=one.id, spec={}
    )
    (line,) = draw([one], [pod]).splitlines()
    for word in ("0123456789ab", "web@1", "tag: gold", "try1: running", "3.0 MiB", "before"):
        assert word in line
    assert "more" not in line


def test_a_message_can_not_drive_the_terminal() -> None:
    assert "\x1b" not in draw([record("a", None, 1, message="\x1b[2J\x07")])


def test_the_tree_of_a_pod() -> None:
    records = history("a", "b<a", "x", "c<a")
    pod = PodRecord(
        id=PodId("q"), name="n", state=PodState.EXITED, created_ns=0, parent=CheckpointId("b"), head=None, spec={}
    )
    assert {record.id for record in tree_of(records, pod)} == {"a", "b", "c"}


@given(st.lists(st.integers(0, 40), max_size=40))
def test_every_drawing_shows_each_once_below_its_children(parents: list[int]) -> None:
    """Following the lines down from any checkpoint leads to its parent."""
    edges = [f"{index}" if parent >= index else f"{index}<{parent}" for index, parent in enumerate(parents)]
    records = {item.id: item for item in history(*edges)}
    lines = draw(records.values(), label=lambda record: record.id).splitlines()
    column_of: dict[int, str] = {}  # the checkpoint whose line comes down in that column
    seen = []
    for line in lines:
        if "*" in line:
            marks, name = line.split("* ")
            at = len(marks)
            seen.append(name)
            if at in column_of:
                assert records[CheckpointId(column_of[at])].parent == name
            column_of[at] = name
        elif line.endswith("|/"):
            left, joining = len(line) - 2, column_of.pop(len(line))
            assert records[CheckpointId(joining)].parent == records[CheckpointId(column_of[left])].parent
        else:
            assert line == ""
            column_of.clear()
    assert sorted(seen) == sorted(records)
