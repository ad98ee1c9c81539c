"""strace and gdb with what they trace: through several lives, nobody notices."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from driver import Pod, Podtree

COUNTING = "i=0; while [ ! -e stop ]; do i=$((i+1)); echo $i; /bin/true; done > numbers"
COMMANDS = """
set pagination off
break step if n == 5
watch total if total > 21
run
"""


def three_lives(podtree: Podtree, pod: Pod) -> list[Pod]:
    first = podtree.branch(pod.checkpoint())
    second = podtree.branch(first.checkpoint())
    return [second, first, pod]


def say(pod: Pod, words: str) -> None:
    """To gdb, in one write."""
    pod.sh(f"printf %s {shlex.quote(words)} >> /srv/in")


@pytest.mark.needs("strace")
@pytest.mark.timeout(300)
def test_strace(podtree: Podtree) -> None:
    """Every call is made once, and in the log once."""
    run = f"strace -f -e trace=write -e signal=none -o log sh -c '{COUNTING}'; echo DONE; sleep 1000"
    pod = podtree.run("sh", "-c", f"mkdir /srv/traced; cd /srv/traced; {run}", name="strace")
    pod.wait_output("wc -l < /srv/traced/numbers", lambda out: int(out) > 20, "it counts")
    for _ in range(3):
        pod.checkpoint()
    for one in three_lives(podtree, pod):
        before = int(one.sh("wc -l < /srv/traced/numbers"))
        one.wait_output("wc -l < /srv/traced/numbers", lambda out, n=before: int(out) > n + 20, "it counts on")
        one.sh("touch /srv/traced/stop")
        one.wait_log("DONE", 60)
        numbers, log = one.read("/srv/traced/numbers").split(), one.read("/srv/traced/log")
        wanted = [str(n) for n in range(1, len(numbers) + 1)]
        assert numbers == wanted
        assert re.findall(r'write\(1, "(\d+)\\n", \d+\) += \d', log) == wanted
        assert "ERESTART" not in log and "EINTR" not in log and "<detached" not in log


@pytest.mark.needs("gdb", "gcc")
@pytest.mark.timeout(300)
def test_gdb(podtree: Podtree, compiled: Callable[[str], Path]) -> None:
    """At a breakpoint; its conditions, hardware watchpoints and what it knows of the program hold."""
    program = compiled("debugged")
    pod = podtree.run("sh", "-c", f"cd /srv; touch in; tail -f in | gdb -q -nx {program} > out 2>&1", name="gdb")
    say(pod, COMMANDS)
    pod.wait_output(
        "cat /srv/out", lambda out: "Breakpoint 1, " in out or "Breakpoint 1.1, " in out, "the breakpoint is reached"
    )
    for one in three_lives(podtree, pod):
        say(one, "print total\ncontinue\nprint total\ncontinue\nprint total\n")
        out = one.wait_output("cat /srv/out", lambda out: "$3 = " in out, "it goes on")
        assert re.findall(r"^(?:\(gdb\) )*\$\d = (\d+)$", out, re.MULTILINE) == ["10", "28", "36"], out
        assert re.findall(r"^(?:Old|New) value = (\d+)$", out, re.MULTILINE) == ["21", "28", "28", "36"], out
