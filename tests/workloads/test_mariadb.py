"""MariaDB: clients over a unix socket and TCP, a transaction open across the checkpoint, tables checked afterwards."""

from __future__ import annotations

import pytest
from branching import branch_twice, lines_grow

from conftest import find_program
from driver import Pod, Podtree

PLACE = "/var/lib/podtest-mariadb"
SOCKET = f"{PLACE}/mariadb.sock"
TABLES = """
create database podtest; use podtest;
create table mark (word varchar(50)) engine=innodb; insert into mark values ('none');
create table filled (id int primary key, sum char(64)) engine=innodb;
create table begun (word varchar(50)) engine=innodb;
create table aria (id int auto_increment primary key, word varchar(50)) engine=aria;
"""
FILL = f"""
i=0
while [ ! -e calm ] || sleep 0.3; do
    i=$((i + 1))
    echo "insert into filled values ($i, sha2('$i', 256)); insert into aria (word) values ('$i');"
    [ $((i % 10)) -ne 0 ] || echo "system echo $i >> {PLACE}/progress"
done | mariadb -S {SOCKET} podtest
echo BAD the client has ended
"""
START = f"""
mkdir -p {PLACE}/data && cd {PLACE} && chown mysql . data
mariadb-install-db --no-defaults --user=mysql --datadir={PLACE}/data \
    --auth-root-authentication-method=normal > install.log
"$SERVER" --no-defaults --user=mysql --datadir={PLACE}/data --socket={SOCKET} --bind-address=127.0.0.1 --port=3308 \
    --innodb-buffer-pool-size=16M --innodb-log-file-size=8M --innodb-use-native-aio=0 2> server.log &
until mariadb -S {SOCKET} -e 'select 1' > /dev/null 2>&1; do sleep 0.1; done
mariadb -S {SOCKET} -e "$TABLES"
bash -c "$FILL" &
mkfifo typed
mariadb -h 127.0.0.1 -P 3308 --unbuffered -N podtest < typed > answers &
exec 7> typed
echo "begin; insert into begun values ('not yet'); select 'OPEN';" >&7
until grep -q OPEN answers && [ -s progress ]; do sleep 0.1; done
echo READY
wait
"""


def sql(pod: Pod, statement: str) -> str:
    """What a statement answers, over the unix socket."""
    return pod.exec("mariadb", "-N", "-S", SOCKET, "podtest", "-e", statement).strip()


def mark(pod: Pod, word: str) -> None:
    sql(pod, f"update mark set word = '{word}'")
    pod.sh(f"echo {word} > {PLACE}/mark")


def seen(pod: Pod) -> object:
    table, file = sql(pod, "select word from mark"), pod.read(f"{PLACE}/mark").strip()
    return table if table == file else (table, file)


def goes_on(pod: Pod) -> None:
    """The client that was connected goes on; then it fills slowly."""
    lines_grow(pod, f"{PLACE}/progress")
    pod.sh(f"touch {PLACE}/calm")


@pytest.mark.needs("mariadbd", "mariadb-install-db")
@pytest.mark.timeout(400)
def test_mariadb(podtree: Podtree) -> None:
    options = [f"-e{name}={text}" for name, text in (("TABLES", TABLES), ("FILL", FILL))]
    pod = podtree.run("sh", "-c", START, name="mariadb", options=[*options, "-e", f"SERVER={find_program('mariadbd')}"])
    pod.wait_log("READY", 120)
    lives = branch_twice(podtree, pod, mark, seen, goes_on)
    for one in lives.all:
        check(one)


def check(pod: Pod) -> None:
    """The transaction that was open can be committed, by the one who began it; all rows and indexes are right."""
    assert sql(pod, "select count(*) from begun") == "0"
    pod.python(f"open('{PLACE}/typed', 'w').write('commit;\\n')")
    pod.wait_output(f"mariadb -N -S {SOCKET} podtest -e 'select * from begun'", lambda out: "not yet" in out, "commit")
    assert sql(pod, "select count(*) from filled where sum <> convert(sha2(id, 256) using latin1)") == "0"
    assert sql(pod, "select count(*) = max(id) from filled; select count(*) = max(id) from aria").split() == ["1", "1"]
    checked = sql(pod, "check table filled, begun, mark, aria extended")
    assert checked.count("status\tOK") == 4, checked
    assert "BAD" not in pod.logs(), pod.logs()
    assert "ERROR" not in pod.read(f"{PLACE}/server.log")
