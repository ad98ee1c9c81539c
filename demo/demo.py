"""The main job, narrated: a real Redis and a real interactive Python, wrecked beyond repair, come back to life.

Both run in one pod, which is checkpointed each second. Then everything in it is destroyed: data, files, memory,
processes. Two of its past seconds are brought back at the same time, and asked what they know.
Uses a PODTREE_HOME of its own, and leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PODTREE = Path(sys.executable).parent / "podtree"
SECONDS = 5
COLOUR = sys.stdout.isatty() and "NO_COLOR" not in os.environ
PYTHON_SESSION = """\
import time, os, ctypes, itertools
began = time.monotonic()
primes = (n for n in itertools.count(2) if all(n % d for d in range(2, int(n ** 0.5) + 1)))
found = []
while True: found.append(next(primes)); open('/srv/demo/latest', 'w').write(str(found[-1])); time.sleep(0.02)
"""
SHOP = Path(__file__).with_name("shop.sh")


def paint(code: int, text: str) -> str:
    """Text in a colour, where the terminal has colours."""
    return f"\033[{code}m{text}\033[0m" if COLOUR else text


def say(text: str) -> None:
    """A sentence of the narrator."""
    print(f"\n{paint(1, text)}", flush=True)


def podtree(*words: str, show: bool = True, check: bool = True) -> str:
    """Runs a podtree command, showing it and what it prints."""
    if show:
        print(paint(36, "$ podtree " + " ".join(shlex.quote(word) for word in words)), flush=True)
    done = subprocess.run([PODTREE, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    if check and done.returncode != 0:
        sys.exit(f"podtree {' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    if show and (done.stdout or done.stderr):
        print(done.stdout + done.stderr, end="", flush=True)
    return done.stdout.strip()


def redis(pod: str, *words: str, show: bool = False) -> str:
    """redis-cli inside a pod."""
    return podtree("exec", pod, "--", "redis-cli", *words, show=show)


def type_to_python(pod: str, line: str) -> None:
    """Types a line to the interactive Python."""
    podtree("exec", pod, "--", "sh", "-c", f"printf '%s\\n' {shlex.quote(line)} > /srv/demo/keyboard", show=False)


def until(ready: Callable[[], bool], what: str) -> None:
    """Waits for something of the pod's to be there."""
    end = time.monotonic() + 30
    while not ready():
        if time.monotonic() > end:
            sys.exit(f"the demo waited in vain: {what}")
        time.sleep(0.1)


def file_there(pod: str, path: str) -> bool:
    """Whether a file exists inside."""
    return podtree("exec", pod, "--", "sh", "-c", f"test -s {path} && echo yes", show=False, check=False) == "yes"


def what_python_knows(pod: str) -> str:
    """Interrupts the interactive Python in its loop and asks it: its answer is from its own memory."""
    answer = f"/srv/demo/answer-{time.monotonic_ns()}"
    podtree("exec", pod, "--", "pkill", "-INT", "-x", "python3", show=False)
    line = "f'{len(found)} primes found, the last is {found[-1]}; my clock says {time.monotonic() - began:.1f} s'"
    type_to_python(pod, "")
    type_to_python(pod, f"open({answer!r}, 'w').write({line})")
    until(lambda: file_there(pod, answer), f"Python's answer in {pod}")
    return podtree("exec", pod, "--", "cat", answer, show=False)


def main() -> None:
    home = tempfile.mkdtemp(prefix="podtree-demo-", dir="/tmp")
    os.environ["PODTREE_HOME"] = home
    try:
        play()
    finally:
        for pod in json.loads(podtree("ps", "--json", show=False, check=False) or "[]"):
            podtree("rm", "--force", pod["name"], show=False, check=False)
        podtree("pool", "unmount", show=False, check=False)
        shutil.rmtree(home, ignore_errors=True)


def play() -> None:
    say("A pod: a real Redis and a real interactive Python, over this machine's own files.")
    elsewhere = SHOP.stat().st_dev != os.stat("/").st_dev  # not on the root file system: show it
    volume = ["-v", f"{SHOP.parent}:{SHOP.parent}:ro"] if elsewhere else []
    podtree("run", "--name", "shop", "-d", *volume, "--", "sh", str(SHOP))
    until(lambda: redis("shop", "PING") == "PONG", "Redis answers")
    for line in PYTHON_SESSION.splitlines():
        type_to_python("shop", line)
    type_to_python("shop", "")
    until(lambda: file_there("shop", "/srv/demo/latest"), "Python finds primes")
    podtree("exec", "shop", "--", "ps", "-e", "-o", "pid,args")

    say(f"Work goes on in it for {SECONDS} seconds, and each second it is checkpointed while it runs.")
    for second in range(1, SECONDS + 1):
        until_next = time.monotonic() + 1
        redis("shop", "RPUSH", "orders", *(f"order {second}.{number}" for number in range(10 * second)))
        redis("shop", "SET", "second", str(second))
        found = json.loads(podtree("checkpoint", "shop", "-m", f"second {second}", "--json", show=False))
        print(
            f"  shop@{second}  {found['id']}  {found['processes']} processes stopped for {found['pause_ms']:.0f} ms,"
            f" {found['bytes_written'] / 1e6:.1f} MB written",
            flush=True,
        )
        time.sleep(max(0.0, until_next - time.monotonic()))

    say("Then it is wrecked beyond repair: the data wiped, the files overwritten and deleted, Python sent astray.")
    redis("shop", "FLUSHALL", show=True)
    podtree(
        "exec",
        "shop",
        "--",
        "sh",
        "-c",
        "for f in $(find /srv/demo -type f); do head -c 100000 /dev/urandom > $f; done;"
        " find /srv/demo -mindepth 1 ! -name keyboard -delete",
    )
    podtree("exec", "shop", "--", "pkill", "-KILL", "redis-server")
    podtree("exec", "shop", "--", "pkill", "-INT", "-x", "python3", show=False)
    type_to_python("shop", "")
    print(paint(36, ">>> ctypes.string_at(0)"), flush=True)
    type_to_python("shop", "ctypes.string_at(0)")
    until(lambda: podtree("ps", "--running", "-q", show=False) == "", "the pod is dead")
    podtree("ps")

    early, late = 2, SECONDS - 1
    say(f"Two seconds of its past come back, both at the same time: the {early}nd and the {late}th.")
    podtree("branch", f"shop@{early}", "--name", "early")
    podtree("branch", f"shop@{late}", "--name", "late")
    podtree("ps")
    answers = {}
    for pod, second in (("early", early), ("late", late)):
        answers[pod] = redis(pod, "GET", "second"), redis(pod, "LLEN", "orders"), what_python_knows(pod)
        assert answers[pod][0] == str(second), answers
        print(f"  {paint(32, pod):6}  Redis: second {answers[pod][0]}, {answers[pod][1]} orders", flush=True)
        print(f"  {'':6}  Python: {answers[pod][2]}", flush=True)
    assert answers["early"] != answers["late"]

    say("They live apart from now on: what one writes, the other does not see.")
    redis("early", "SET", "winner", "early")
    redis("late", "SET", "winner", "late")
    for pod in ("early", "late"):
        assert redis(pod, "GET", "winner", show=True) == pod

    say("And either can be checkpointed and branched again. The tree so far:")
    podtree("checkpoint", "early", "-m", "a second life", show=False)
    podtree("log", "--graph")
    say("Everything above ran for real on this machine. What it used is now removed.")


if __name__ == "__main__":
    main()
