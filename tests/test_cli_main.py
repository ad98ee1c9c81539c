"""The command line as a whole: every verb is there, and what goes wrong is said in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from podtree.cli.main import _ALIASES, _VERBS
from pool_fixtures import pool_home  # noqa: F401

# ruff: noqa: F811

PROGRAM = Path(sys.executable).parent / "podtree"


def run(*args: str | bytes, home: Path | str = "/nonexistent") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PODTREE_HOME": str(home)}
    return subprocess.run([PROGRAM, *args], env=env, capture_output=True, text=True, errors="replace", timeout=60)


@pytest.mark.parametrize("verb", [*_VERBS, *_ALIASES])
def test_every_verb_helps(verb: str) -> None:
    done = run(verb, "--help")
    assert done.returncode == 0 and done.stderr == ""
    if verb != "pool":  # its own verbs have it
        assert "--json" in done.stdout


@pytest.mark.parametrize("place", ["file", "file/below", "dangling", "/proc/nothing"])
def test_a_place_where_no_pool_can_be(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    done = run("ps", home=tmp_path / place)
    assert done.returncode == 1
    assert done.stderr.startswith("podtree: there can't be a pool in ") and "PODTREE_HOME" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    error = json.loads(run("ps", "--json", home=tmp_path / place).stdout)
    assert set(error) == {"error", "hint", "problems"}


def test_wrong_options_with_json() -> None:
    done = run("show", "--json", "--nope")
    assert done.returncode == 2
    assert "--nope" in json.loads(done.stdout)["error"]


def test_an_error_does_not_drive_the_terminal(pool_home: Path) -> None:
    done = run("show", "a\x1b[31mb", home=pool_home)
    assert done.returncode == 4
    assert "a\\x1b[31mb" in done.stderr and "\x1b" not in done.stderr
