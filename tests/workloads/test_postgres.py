"""PostgreSQL: a process tree with shared memory and semaphores, unix and TCP clients, a transaction open."""

from __future__ import annotations

from pathlib import Path

import pytest
from branching import branch_twice

from conftest import find_program
from driver import SYSTEM_PYTHON, WORKLOADS, Pod, Podtree, until

PLACE = "/var/lib/podtest-postgres"
START = """
set -e
mkdir -p {place} && chown postgres:postgres {place} && cd {place}
as_postgres="setpriv --reuid postgres --regid postgres --init-groups env -i LC_ALL=C PATH={bin}:/usr/bin:/bin"
$as_postgres initdb -D {place}/data -A trust --no-sync --no-locale -E UTF8 > initdb.log
$as_postgres postgres -D {place}/data -k {place} -c shared_buffers=16MB -c max_connections=20 \\
    -c fsync=off -c autovacuum_naptime=1 2> server.log &
until $as_postgres pg_isready -q -h {place}; do sleep 0.1; done
$as_postgres createdb -h {place} bench
$as_postgres pgbench -i -q -h {place} bench 2> pgbench.log
{python} {workloads}/inside_postgres.py {bin} {place}
exec sleep infinity
"""


def bin_directory() -> Path:
    """Where Debian keeps the server's programs."""
    found = find_program("pg_amcheck")
    assert found
    return Path(found).resolve().parent


def psql(pod: Pod, sql: str) -> str:
    """One statement over TCP, from inside."""
    return pod.exec(bin_directory() / "psql", "-XqAt", "-h", "127.0.0.1", "-U", "postgres", "bench", "-c", sql).strip()


def mark(pod: Pod, word: str) -> None:
    psql(pod, f"create table if not exists mark(t text); truncate mark; insert into mark values ('{word}')")
    pod.sh(f"echo {word} > {PLACE}/mark")


def seen(pod: Pod) -> object:
    table, file = psql(pod, "select t from mark"), pod.read(f"{PLACE}/mark").strip()
    return table if table == file else (table, file)


def transactions(pod: Pod) -> int:
    """How many pgbench transactions have been committed."""
    return int(psql(pod, "select count(*) from pgbench_history"))


def dump(pod: Pod) -> str:
    text = pod.sh(f"{bin_directory()}/pg_dump -h {PLACE} -U postgres bench", timeout=120)
    return "\n".join(line for line in text.splitlines() if "restrict " not in line)  # holds a random key


def goes_on(pod: Pod) -> None:
    """The pgbench clients commit more; then they are ended, and have seen no error."""
    at = transactions(pod)
    until(lambda: transactions(pod) > at, f"clients of {pod.name} go on", dump=pod.podtree.dump)
    pod.sh(f"touch {PLACE}/calm")
    pod.wait_log("CALM")


@pytest.mark.needs("initdb", "pg_amcheck", "psql", "pg_dump")
@pytest.mark.timeout(420)
def test_postgres(podtree: Podtree) -> None:
    script = START.format(bin=bin_directory(), place=PLACE, python=SYSTEM_PYTHON, workloads=WORKLOADS)
    pod = podtree.run("sh", "-c", script, name="postgres")
    pod.wait_log("READY", 120)
    lives = branch_twice(podtree, pod, mark, seen, goes_on)
    for one in lives.all:
        one.sh(f"touch {PLACE}/go")
    for one in lives.all:
        log = one.wait_log("OK", 60)
        assert "BAD" not in log, log
        check_files(one)


def check_files(pod: Pod) -> None:
    """No damage in tables and indexes; what a server reads from the files after a restart is what was there."""
    pod.sh(
        f"{bin_directory()}/pg_amcheck -h {PLACE} -U postgres -d bench --install-missing --heapallindexed", timeout=120
    )
    log = pod.read(f"{PLACE}/server.log")
    assert "PANIC" not in log and "invalid page" not in log and "terminated by signal" not in log, log
    before = dump(pod)
    stop = f"setpriv --reuid postgres --regid postgres --init-groups {bin_directory()}/pg_ctl -D {PLACE}/data"
    pod.sh(f"{stop} restart -w -m fast -l {PLACE}/again.log -o '-k {PLACE}' > /dev/null", timeout=120)
    assert dump(pod) == before
