"""Interactive programs on a terminal: Python with arrays, threads, generators and a transaction; bash with jobs."""

from __future__ import annotations

import sys

import pytest
from branching import branch_twice

from driver import Pod, Podtree
from terminal import Terminal, attached

PLACE = "/var/lib/podtest-tty"
SETUP = f"""
import os, sqlite3, threading, time, itertools, hashlib
os.makedirs("{PLACE}", exist_ok=True); os.chdir("{PLACE}")
numpy = __import__("numpy"); rng = numpy.random.default_rng(42)
big = rng.standard_normal((1000, 1000)); inverse = numpy.linalg.inv(big); expected = float(inverse.sum())
mapped = numpy.memmap("mapped.dat", dtype="int64", mode="w+", shape=(100000,)); mapped[:] = numpy.arange(100000)
primes = (n for n in itertools.count(2) if all(n % d for d in range(2, int(n ** 0.5) + 1)))
first = [next(primes) for _ in range(1000)]
db = sqlite3.connect("data.sqlite", isolation_level=None, check_same_thread=False)
db.execute("create table t(n, word)").fetchall()
db.execute("insert into t values (0, 'committed')").rowcount
db.execute("begin immediate").rowcount
db.executemany("insert into t values (?, 'open')", ((n,) for n in range(1, 101))).rowcount
mark = "none"; counts = [0, 0]; running = True
def count(i):
    while running: counts[i] += 1; time.sleep(0.001)

threads = [threading.Thread(target=count, args=(i,), daemon=True) for i in range(2)]; [t.start() for t in threads]
rows = db.execute("select n from t order by n"); half = [next(rows)[0] for _ in range(50)]
print("all", "set")
"""


def ask(terminal: Terminal, expression: str) -> str:
    """The value of an expression, typed at the prompt."""
    terminal.type(f"print('<' + str({expression}) + '>')\n")
    return terminal.expect(r"^<(.*)>\r?$")[1]


def seen_here(pod: Pod) -> object:
    with attached(pod) as terminal:
        memory = ask(terminal, "mark")
    file = pod.read(f"{PLACE}/mark").strip()
    return memory if memory == file else (memory, file)


def mark(pod: Pod, word: str) -> None:
    with attached(pod) as terminal:
        assert ask(terminal, f"[mark := {word!r}, open('mark', 'w').write(mark)][0]") == word


@pytest.mark.timeout(300)
def test_python_on_a_terminal(podtree: Podtree) -> None:
    pod = podtree.run(sys.executable, "-q", name="python", options=["-t", "-e", "PYTHON_BASIC_REPL=1"])
    with attached(pod) as terminal:
        terminal.type("\n")
        terminal.expect(">>> ")
        for line in SETUP.strip("\n").split("\n"):
            terminal.type(line + "\n")
        terminal.expect(r"^all set", 60)
        terminal.type("unfinished = 6 * ")  # half a line stays in the terminal's line buffer
        terminal.expect(r"6 \* ")
    first = pod.checkpoint()
    branch = podtree.branch(first, "half-a-line")
    for one in (branch, pod):
        with attached(one) as terminal:
            terminal.type("7\n")
            assert ask(terminal, "unfinished") == "42"
    lives = branch_twice(podtree, pod, mark, seen_here)
    following = {}
    for one in lives.all:
        with attached(one) as terminal:
            assert ask(terminal, "float(inverse.sum()) == expected") == "True"
            assert ask(terminal, "bool(numpy.allclose(big @ inverse, numpy.eye(1000), atol=1e-6))") == "True"
            assert ask(terminal, "int(mapped.sum())") == str(sum(range(100000)))
            following[one.name] = ask(terminal, "next(primes)")
            assert ask(terminal, "[next(rows)[0] for _ in range(51)] == list(range(50, 101))") == "True"
            before = ask(terminal, "min(counts)")
            ask(terminal, "time.sleep(0.3)")
            assert int(ask(terminal, "min(counts)")) > int(before), "the threads go on"
            assert ask(terminal, "[db.execute('commit').rowcount, db.in_transaction][1]") == "False"
            ask(terminal, "mapped.__setitem__(0, 7) or mapped.flush()")
        rows = "import sqlite3; print(sqlite3.connect('data.sqlite').execute('select count(*) from t').fetchone()[0])"
        assert one.python(f"import os; os.chdir('{PLACE}'); {rows}") == "101"
        assert (
            one.python(f"import struct; print(struct.unpack('q', open('{PLACE}/mapped.dat', 'rb').read(8))[0])") == "7"
        )
    assert set(following.values()) == {"7927"}, following  # the 1001st prime, in every life


BASH_SETUP = [
    f"mkdir -p {PLACE}; cd {PLACE}; PS1='ready$ '; word=none",
    "counter() { i=0; while [ ! -e go ]; do echo $i; i=$((i + 1)); [ ! -e calm ] || sleep 0.1; done; }",
    "counter | cat | awk '{ print $1 * 3; fflush() }' | sed -u s/^/x/ | tee out > last &",
    "sleep 10000",  # this one is stopped by ^Z
]


def bash_mark(pod: Pod, word: str) -> None:
    with attached(pod) as terminal:
        terminal.type(f"word={word}; echo $word > mark; echo '<'done'>'\n")
        terminal.expect("<done>")


def bash_seen(pod: Pod) -> object:
    with attached(pod) as terminal:
        terminal.type("echo '<'$word'>'\n")
        memory = terminal.expect(r"<([\w-]+)>")[1]  # the line typed has quotes there
    file = pod.read(f"{PLACE}/mark").strip()
    return memory if memory == file else (memory, file)


def bash_goes_on(pod: Pod) -> None:
    """The pipeline writes on; from then on slowly."""
    size = f"stat -c %s {PLACE}/out"
    at = int(pod.sh(size))
    pod.wait_output(size, lambda out: int(out) > at, "the pipeline goes on")
    pod.sh(f"touch {PLACE}/calm")


@pytest.mark.timeout(300)
def test_bash_with_jobs(podtree: Podtree) -> None:
    pod = podtree.run("bash", "--norc", "--noprofile", "-i", name="bash", options=["-t"])
    with attached(pod) as terminal:
        terminal.type("\n")
        terminal.expect(r"[#$] ")
        for line in BASH_SETUP:
            terminal.type(line + "\n")
            terminal.expect("ready\\$ |sleep 10000")
        terminal.expect("sleep 10000|\n")
        pod.wait_output("pgrep -x sleep", lambda out: bool(out.strip()), "sleep runs in the foreground")
        terminal.type("\x1a")
        terminal.expect(r"Stopped\s+sleep 10000")
    lives = branch_twice(podtree, pod, bash_mark, bash_seen, bash_goes_on)
    for one in lives.all:
        with attached(one) as terminal:
            terminal.type("jobs\n")
            terminal.expect(r"\[1\].*Running")
            terminal.expect(r"\[2\].*Stopped\s+sleep 10000")
            terminal.type("fg 2\n")
            terminal.expect(r"sleep 10000")
            state = "ps -o stat= -p $(pgrep -xf 'sleep 10000')"
            one.wait_output(state, lambda out: out.startswith("S"), "sleep goes on")
            terminal.type("\x03")
            terminal.type("touch go; wait %1; echo '<'ended $?'>'\n")
            terminal.expect("<ended 0>")
        for name in ("out", "last"):
            lines = one.read(f"{PLACE}/{name}").split()
            assert lines == [f"x{3 * n}" for n in range(len(lines))] and len(lines) > 1, (one.name, name, len(lines))
