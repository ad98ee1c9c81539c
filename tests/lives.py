"""Programs of tests/programs through several lives: frozen half-way, branched, and asked to verify themselves."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from driver import PROGRAMS, SYSTEM_PYTHON, CommandFailed, Pod, Podtree

IN_POD = "/var/tmp/podtest"
"""The programs' own directory inside a pod."""

TOGETHER = """
mkdir -p {base}; cd {base}
one() {{
    name=$1; shift; export PT_DIR={base}/$name; mkdir -m 0777 $PT_DIR
    setsid "$@" >$name.out 2>&1
    code=$?; touch $name.end
    {{ echo "=== $name $code"; tail -c 3000 $name.out; }} >$name.result
    cat $name.result
}}
{starts}
wait
"""
"""Pid 1 of a pod of many programs: each has a directory and a session of its own; how it ended goes to the log.

In one write(2) of less than PIPE_BUF bytes: nobody else's lines come in between."""


def cases_of(source: str) -> list[str]:
    """The names of the cases of a program, read from its source."""
    text = (PROGRAMS / source).read_text()
    if source.endswith(".py"):
        return re.findall(r"^@case\ndef (\w+)", text, re.MULTILINE)
    return re.findall(r'\{"(\w+)", \w+\}', text)


def start(
    podtree: Podtree, program: str | Path, *words: str, name: str, options: tuple[str, ...] = (), ready: int = 1
) -> Pod:
    """Runs a program (a .py of tests/programs, or a compiled one) in a new pod, until it says READY."""
    command = [SYSTEM_PYTHON, PROGRAMS / program] if str(program).endswith(".py") else [program]
    pod = podtree.run(*command, *words, name=name, options=["-e", f"PT_DIR={IN_POD}", *options])
    pod.wait_log("READY", 60, ready)
    return pod


def go(pod: Pod) -> None:
    """Tells the program that the time to verify has come."""
    pod.exec("touch", f"{IN_POD}/go")


def verify(*pods: Pod, seconds: float = 90) -> None:
    """Lets the program in each pod verify itself, and asserts that all found everything as it was."""
    for pod in pods:
        go(pod)
    wrong = []
    for pod in pods:
        code, log = pod.wait(seconds), pod.logs()
        if code != 0 or "BAD" in log or "OK" not in log.split():
            wrong.append(f"{pod.name} ended with {code}\n{log}")
    assert not wrong, "\n".join(wrong)


def generations(podtree: Podtree, origin: Pod) -> list[Pod]:
    """Checkpoints a ready pod, branches it and a branch of it; returns the pods whose programs shall verify.

    The origin runs on to the end; the branch between is killed before its own checkpoint is brought back.
    """
    first = origin.checkpoint()
    second = origin.checkpoint()
    one, two = podtree.branch(first, origin.name), podtree.branch(second, origin.name)
    third = two.checkpoint()
    two.kill()
    two.wait()
    three = podtree.branch(third, origin.name)
    return [one, three, origin]


def live_on(podtree: Podtree, origin: Pod) -> None:
    """A ready program through several generations; all of them must verify."""
    verify(*generations(podtree, origin))


@dataclass(frozen=True)
class End:
    """How one program of many ended: its exit code and the end of what it printed."""

    code: int
    text: str

    def good(self) -> bool:
        """Whether it verified itself."""
        return self.code == 0 and "BAD" not in self.text and "OK" in self.text.split()


def start_together(
    podtree: Podtree, commands: Mapping[str, Sequence[str | Path]], name: str, options: tuple[str, ...] = ()
) -> Pod:
    """Runs programs side by side in one pod until each has said READY (or ended, which `ends` tells)."""
    starts = "\n".join(f"one {case} {shlex.join(map(str, words))} &" for case, words in commands.items())
    pod = podtree.run("bash", "-c", TOGETHER.format(base=IN_POD, starts=starts), name=name, options=options)
    missing = f"""cd {IN_POD}; for c in {" ".join(commands)}; do
        [ -e $c.end ] || grep -qsx READY $c.out || echo $c; done; echo all"""
    pod.wait_output(missing, lambda out: out == "all\n", "all programs are READY", 90)
    return pod


def ends(pods: Sequence[Pod], seconds: float = 120) -> list[dict[str, End]]:
    """Lets the programs in all pods verify themselves; for each pod how each ended. One that hangs is missing."""
    for pod in pods:
        pod.sh(f"for d in {IN_POD}/*/; do touch $d/go; done")
    found = []
    for pod in pods:
        try:
            pod.wait(seconds)
        except CommandFailed as failed:
            print(failed)
        parts = re.split(r"^=== (\w+) (\d+)\n", pod.logs(), flags=re.MULTILINE)[1:]
        found.append({case: End(int(code), text) for case, code, text in zip(*[iter(parts)] * 3, strict=True)})
    return found
