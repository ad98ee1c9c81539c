"""A Go and a JVM program that trust freed memory to come back as zeros, and check their whole heap."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from branching import branch_twice

from conftest import find_program
from driver import BUILD, WORKLOADS, Pod, Podtree

PLACE = "/var/lib/podtest-runtime"


def mark(pod: Pod, word: str) -> None:
    """The program takes the word into its memory and says so by a file of its own."""
    pod.sh(f"echo {word} > {PLACE}/new && mv {PLACE}/new {PLACE}/mark")
    pod.wait_output(f"cat {PLACE}/seen", lambda out: out.strip() == word, f"sees the mark {word}")


def seen(pod: Pod) -> object:
    return pod.read(f"{PLACE}/seen").strip()


def goes_on(pod: Pod) -> None:
    """From here on it allocates slowly; that it goes on, the marks show that it takes, and its check at the end."""
    pod.sh(f"touch {PLACE}/calm")


def prove(podtree: Podtree, name: str, command: list[str], env: dict[str, str]) -> None:
    """Runs the program, branches it, and lets each life verify its whole heap and tell its own mark."""
    options = [word for key, value in env.items() for word in ("-e", f"{key}={value}")]
    pod = podtree.run("sh", "-c", f'mkdir -p {PLACE}; exec "$@"', "sh", *command, PLACE, name=name, options=options)
    pod.wait_log("READY", 60)
    lives = branch_twice(podtree, pod, mark, seen, goes_on)
    marks = {one.name: seen(one) for one in lives.all}
    for one in lives.all:
        one.sh(f"touch {PLACE}/go")
    for one in lives.all:
        code, log = one.wait(120), one.logs()
        assert code == 0 and "BAD" not in log and f"MARK {marks[one.name]}\nOK" in log, (code, log)


@pytest.mark.needs("go")
@pytest.mark.usefixtures("memory_mode")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("advice", ["madvdontneed=1", "madvdontneed=0"])
def test_go(podtree: Podtree, advice: str) -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    source, program = WORKLOADS / "heap.go", BUILD / "heap-go"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        env = {
            **os.environ,
            "GO111MODULE": "off",
            "GOCACHE": str(BUILD / "go-cache"),
            "GOFLAGS": "",
            "CGO_ENABLED": "0",
        }
        subprocess.run([str(find_program("go")), "build", "-o", program, source], env=env, check=True, timeout=300)
    prove(podtree, "go", [str(program)], {"GODEBUG": advice, "GOGC": "50"})


@pytest.mark.needs("java", "javac")
@pytest.mark.usefixtures("memory_mode")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("collector", ["-XX:+UseSerialGC", "-XX:+UseG1GC"])
def test_jvm(podtree: Podtree, collector: str) -> None:
    source, classes = WORKLOADS / "Heap.java", BUILD / "java"
    if not (classes / "Heap.class").exists() or (classes / "Heap.class").stat().st_mtime < source.stat().st_mtime:
        classes.mkdir(parents=True, exist_ok=True)
        subprocess.run([str(find_program("javac")), "-d", classes, source], check=True, timeout=120)
    java = Path(str(find_program("java"))).resolve()
    prove(podtree, "jvm", [str(java), "-Xmx64m", collector, "-cp", str(classes), "Heap"], {})
