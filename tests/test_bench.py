"""The benchmark measures, and writes what it says it writes; figures themselves are nobody's promise here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from bench.figures import Book, markdown, table
from bench.workload import pages_to_change

from driver import PROJECT


def bench(*words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *map(str, words)]
    return subprocess.run(
        command, cwd=PROJECT, env={**os.environ, **env}, capture_output=True, text=True, timeout=150
    )  # fmt: skip


def test_a_small_case_is_measured(tmp_path: Path) -> None:
    out, plots, pools = tmp_path / "out.json", tmp_path / "plots", tmp_path / "pools"
    pools.mkdir()
    done = bench("--quick", "--rounds", "1", "--case", "100mb", "--json", out, "--plots", plots, "--dir", pools)
    assert done.returncode == 0, done.stderr
    whole = json.loads(out.read_text())
    assert (
        whole["rounds"] == 1
        and whole["left_out"] == whole["failed"] == []
        and whole["machine"]["cpus"] == os.cpu_count()
    )
    rows = {row["what"]: row for row in whole["rows"]}
    assert {row["case"] for row in whole["rows"]} == {"100mb"}
    for what in ("pause, seen inside", "pause, as told", "durable", "branch ready, first of a checkpoint",
                 "branch ready, next of it", "rewind ready, next to it", "space"):  # fmt: skip
        assert len(rows[what]["values"]) == 1 and rows[what]["median"] > 0, what
        assert what in done.stdout
    assert rows["pause, seen inside"]["median"] <= rows["durable"]["median"]
    drawn = sorted(path.name for path in plots.iterdir())
    assert "pause-memory.svg" in drawn and "ready-memory.svg" in drawn
    for path in plots.iterdir():
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert list(pools.iterdir()) == []


def test_cases_are_listed() -> None:
    done = bench("--list")
    assert done.returncode == 0
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert {"100mb", "4gb", "history", "64-branches", "recorded-redis", "commands"} <= set(names)


def test_no_criu_is_told_by_name(tmp_path: Path) -> None:
    done = bench("--against", "criu", "--case", "100mb", PATH=str(tmp_path))
    assert done.returncode == 1 and "there is no criu on PATH" in done.stderr


def test_a_criu_that_cannot_work_is_told_by_name(tmp_path: Path) -> None:
    criu = tmp_path / "criu"
    criu.write_text('#!/bin/sh\necho "Error: this kernel has no checkpoints" >&2\nexit 1\n')
    criu.chmod(0o755)
    done = bench("--against", "criu", "--case", "100mb", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 1 and "criu check fails: Error: this kernel has no checkpoints" in done.stderr


def test_pages_to_change_are_different_ones() -> None:
    for pattern in ("dense", "sparse", "random"):
        pages = pages_to_change(pattern, 1000, 300)
        assert len(set(pages)) == 300 and set(pages) <= set(range(1000)), pattern
        assert len(pages_to_change(pattern, 100, 300)) == 100
    assert pages_to_change("sparse", 1000, 3) == [0, 16, 32]


def test_verdicts() -> None:
    book = Book()
    for value in (1.0, 2.0, 9.0):
        book.note("a", "pause", "ms", value, 3)
        book.note("a", "rate", "1/s", value, 3, at_least=True)
        book.note("a", "pause by criu", "ms", 10 * value)
    pause, rate = book.find("a", "pause"), book.find("a", "rate")
    assert pause is not None and rate is not None
    assert (pause.median(), pause.p95(), pause.verdict()) == (2, 9, "reached")
    assert (rate.p95(), rate.verdict()) == (1, "missed")
    assert markdown(book).splitlines()[2:] == [
        "| a | pause | 2 ms | 9 ms | ≤ 3 ms | reached |",
        "| a | rate | 2 1/s | 1 1/s | ≥ 3 1/s | missed |",
    ]
    assert "criu takes 10.0 times as long" in table(book)
