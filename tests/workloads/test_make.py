"""`make -j2` of a C program, frozen half-way: every life builds the very same program as an undisturbed make."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from make_sources import FILES

from driver import SYSTEM_PYTHON, WORKLOADS, Pod, Podtree

PLACE = "/var/lib/podtest-make"


def built(pod: Pod) -> int:
    """How many object files are there."""
    return int(pod.sh(f"ls {PLACE}/obj 2> /dev/null | grep -c '[.]o$' || true"))


def result(pod: Pod) -> tuple[str, str]:
    """Checksums of everything that was built, and what the program computes."""
    return pod.sh(f"cd {PLACE} && sha256sum obj/*.o program"), pod.sh(f"{PLACE}/program")


def start(podtree: Podtree, name: str) -> Pod:
    """A pod with the sources, whose make begins when the file `begin` is there."""
    generate = f"{SYSTEM_PYTHON} {WORKLOADS}/make_sources.py {PLACE}"
    script = f'{generate} && cd {PLACE} && echo READY && make -j2 && echo MADE; echo "make $?"; sleep 9999'
    pod = podtree.run("sh", "-c", script, name=name)
    pod.wait_log("READY", 60)
    return pod


@pytest.mark.needs("make", "gcc")
@pytest.mark.timeout(400)
def test_make(podtree: Podtree) -> None:
    pod = start(podtree, "make")
    pod.wait_output(f"ls {PLACE}/obj | wc -l", lambda out: int(out) > 5, "make has begun")
    first = pod.checkpoint()
    assert built(pod) < FILES, "make was too fast"
    at = built(pod)
    pod.wait_output(f"ls {PLACE}/obj | wc -l", lambda out: int(out) > at + 5, "make goes on")
    second = pod.checkpoint()
    branches = [podtree.branch(id, "make") for id in (first, first, second, second)]
    apart = f"extra-{random.randrange(10**6)}"
    branches[0].sh(f"touch {PLACE}/{apart}")
    for one in [*branches, pod]:
        log = one.wait_log("make ", 120)
        assert "MADE" in log and "Error" not in log, f"{one.name}\n{log}"
    for one in [*branches[1:], pod]:
        assert one.sh(f"ls {PLACE} | grep extra || true") == "", f"{one.name} sees a file of {branches[0].name}"
    undisturbed = start(podtree, "undisturbed")
    undisturbed.wait_log("make ", 120)
    wanted = result(undisturbed)
    for one in [*branches, pod]:
        assert result(one) == wanted, one.name
    assert not Path(PLACE).exists(), "the host's files were touched"
