"""Load on a PostgreSQL server from inside its pod, and a transaction left open until the next life.

    inside_postgres.py BIN DIRECTORY

Starts two pgbench clients (unix and TCP), and two psql sessions of its own: one with a transaction open (inserts,
a savepoint, a cursor half fetched), one that waits for a row lock that the first one holds. READY; when
DIRECTORY/calm appears: stops the load, CALM; when DIRECTORY/go appears: commits, compares, OK or BAD.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

BIN, DIRECTORY = Path(sys.argv[1]), Path(sys.argv[2])
ENV = {"PGUSER": "postgres", "PGDATABASE": "bench", "PATH": f"{BIN}:/usr/bin:/bin", "LC_ALL": "C"}
UNIX, TCP = ["-h", str(DIRECTORY)], ["-h", "127.0.0.1"]


class Session:
    """A psql process with its pipes."""

    def __init__(self, where: list[str]) -> None:
        self.process = subprocess.Popen(
            [BIN / "psql", "-XqAt", *where],
            env=ENV,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
        )

    def send(self, sql: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{sql};\n\\echo =done=\n")
        self.process.stdin.flush()

    def receive(self) -> list[str]:
        assert self.process.stdout
        lines = []
        for line in self.process.stdout:
            if line.strip() == "=done=":
                return lines
            lines.append(line.rstrip("\n"))
        raise RuntimeError(f"psql ended: {lines}")

    def expect(self, sql: str, *wanted: str) -> None:
        self.send(sql)
        got = self.receive()
        if got != list(wanted):
            print(f"BAD {sql}: {got} instead of {list(wanted)}", flush=True)
            sys.exit(1)


def wait_for(name: str) -> None:
    while not (DIRECTORY / name).exists():
        time.sleep(0.05)


def main() -> None:
    opened, waiting, look = Session(UNIX), Session(TCP), Session(UNIX)
    look.expect("create table open(n int primary key, t text)")
    look.expect("insert into open values (1, 'before')")
    opened.expect("begin")
    opened.expect("insert into open select g, repeat('x', 1000) from generate_series(2, 1000) g")
    opened.expect("savepoint here")
    opened.expect("update open set t = 'changed' where n = 1")
    opened.expect("declare c cursor for select n from open where n > 1 order by n")
    opened.expect("fetch 2 from c", "2", "3")
    waiting.send("update open set t = t || ' and waited for' where n = 1 returning t")
    load = [
        subprocess.Popen(
            [BIN / "pgbench", "-n", "-c", "2", "-T", "3600", *where],
            env=ENV,
            stdout=subprocess.DEVNULL,
            stderr=open(DIRECTORY / f"pgbench{number}.err", "w"),
        )
        for number, where in enumerate((UNIX, TCP))
    ]
    time.sleep(1)
    print("READY", flush=True)
    wait_for("calm")
    for number, process in enumerate(load):
        if process.poll() is not None:
            print(f"BAD pgbench ended: {(DIRECTORY / f'pgbench{number}.err').read_text()}", flush=True)
            sys.exit(1)
        process.terminate()
        process.wait()
    print("CALM", flush=True)
    wait_for("go")
    look.expect("select count(*) from open", "1")
    opened.expect("fetch 2 from c", "4", "5")
    opened.expect("commit")
    got = waiting.receive()
    if got != ["changed and waited for"]:
        print(f"BAD the waiting update gave {got}", flush=True)
        sys.exit(1)
    look.expect("select count(*), sum(n) from open", "1000|500500")
    look.expect(
        "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history),"
        " (select sum(bbalance) from pgbench_branches) = (select sum(delta) from pgbench_history),"
        " (select count(*) > 0 from pgbench_history)",
        "t|t|t",
    )
    print("OK", flush=True)


main()
