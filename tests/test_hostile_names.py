"""Names that a pod's programs choose, shown to people and programs outside: no UTF-8, escape sequences."""

from __future__ import annotations

import json

import pytest

from driver import SYSTEM_PYTHON, Podtree
from podtree.errors import Problem, Refused, printable
from podtree.pod import wire

HOLDER = r"""
import ctypes, fcntl, os, time
libc = ctypes.CDLL(None)
libc.prctl(15, b"\xff\x1b[31m", 0, 0, 0)
leased = os.open("/tmp/leased", os.O_WRONLY | os.O_CREAT)
fcntl.fcntl(leased, fcntl.F_SETLEASE, fcntl.F_WRLCK)  # refused
print("READY", flush=True)
time.sleep(1000)
"""
MAKER = r"""
import os
os.makedirs(b"/tmp/\xff\x1b[31m")
open(b"/tmp/\xff\x1b[31m/file", "w").write("x")
"""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, grün, 文", "plain, grün, 文"),
        ("\udcff", r"\xff"),
        ("\x1b[31m\n", r"\x1b[31m\n"),
        ("\u202e\ud800", r"\u202e\ud800"),
        ("", ""),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()


def test_problems_are_printable() -> None:
    problem = Problem(pid=1, comm="\udcff", object="fd 3 (\x1b[2J)", reason="r\x07", hint="\udc80")
    texts = (problem.comm, problem.object, problem.reason, problem.hint)
    assert texts == (r"\xff", r"fd 3 (\x1b[2J)", r"r\x07", r"\x80")
    again = wire.decode_error(wire.encode_error(Refused([problem])))
    assert isinstance(again, Refused) and again.problems == [problem]
    assert wire.encode_error(OSError(2, "gone", "/\udcff"))["error"] == r"/\xff: gone"


def test_refusal_names_an_odd_process(podtree: Podtree) -> None:
    pod = podtree.run(SYSTEM_PYTHON, "-c", HOLDER, name="odd")
    pod.wait_log("READY")
    name = r"\xff\x1b[31m"
    assert f"process 1 ({name})" in podtree("check", pod.name, code=3).out
    (problem,) = json.loads(podtree("check", "--json", pod.name, code=3).out)["problems"]
    assert problem["comm"] == name
    assert f"process 1 ({name})" in podtree("checkpoint", pod.name, code=3).err
    assert pod.running()


def test_odd_paths_in_a_diff(podtree: Podtree) -> None:
    pod = podtree.run("sleep", "1000", name="odd")
    pod.checkpoint()
    pod.python(MAKER)
    pod.checkpoint()
    for after in (f"{pod.name}@2", pod.name):
        assert r"A /tmp/\xff\x1b[31m/file  (1 B)" in podtree("diff", f"{pod.name}@1", after).out
        files = podtree.json("diff", f"{pod.name}@1", after)["files"]
        assert "/tmp/\\xff\x1b[31m/file" in [file["path"] for file in files]
