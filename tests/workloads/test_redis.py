"""redis-server: jemalloc, snapshots by a forked child, clients over TCP and unix sockets, a transaction open."""

from __future__ import annotations

import subprocess

import pytest
from branching import branch_twice

from driver import SYSTEM_PYTHON, WORKLOADS, Pod, Podtree, until

PLACE = "/var/lib/podtest-redis"
START = f"""
mkdir -p {PLACE} && cd {PLACE}
redis-server --port 6379 --unixsocket {PLACE}/redis.sock --dir {PLACE} --save '' --appendonly yes \
    --enable-debug-command yes --logfile redis.log &
{SYSTEM_PYTHON} {WORKLOADS}/inside_redis.py {PLACE}
wait
"""


def cli(pod: Pod, *words: str) -> str:
    """`redis-cli` inside the pod, over TCP."""
    return pod.exec("redis-cli", *words).strip()


def mark(pod: Pod, word: str) -> None:
    assert cli(pod, "SET", "mark", word) == "OK"
    pod.sh(f"echo {word} > {PLACE}/mark")


def seen(pod: Pod) -> object:
    memory, file = cli(pod, "GET", "mark"), pod.read(f"{PLACE}/mark").strip()
    return memory if memory == file else (memory, file)


def progress(pod: Pod) -> int:
    """How far the first worker has come."""
    return int(pod.sh(f"cat {PLACE}/progress0") or 0)


def goes_on(pod: Pod) -> None:
    """The clients count on, the exec'ed one too; from then on slowly."""
    at, count = progress(pod), int(cli(pod, "GET", "by-exec"))
    until(lambda: progress(pod) > at, f"clients of {pod.name} go on", dump=pod.podtree.dump)
    until(lambda: int(cli(pod, "GET", "by-exec")) > count, f"exec'ed client of {pod.name}", dump=pod.podtree.dump)
    pod.sh(f"touch {PLACE}/calm")


@pytest.mark.needs("redis-server", "redis-cli")
@pytest.mark.timeout(300)
def test_redis(podtree: Podtree) -> None:
    pod = podtree.run("sh", "-c", START, name="redis")
    pod.wait_log("READY", 60)
    outside = subprocess.Popen(  # a client that came by `podtree exec`, and whose other end is not in the pod
        [podtree.program, "exec", pod.name, "--", "redis-cli", "-r", "-1", "-i", "0.02", "INCR", "by-exec"],
        env=podtree.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: int(cli(pod, "GET", "by-exec") or 0) > 5, "the exec'ed client counts")
        lives = branch_twice(podtree, pod, mark, seen, goes_on)
        assert outside.poll() is None, "the origin's exec'ed client is still connected"
    finally:
        outside.kill()
        outside.wait()
    for one in lives.all:
        one.sh(f"touch {PLACE}/go")
    for one in lives.all:
        log = one.wait_log("OK", 60)
        assert "BAD" not in log, log
        check_files(one)


COMPARE = f"""
set -e
cd {PLACE}
pkill -x -f 'redis-cli -r -1 .*' || true  # the exec'ed one: nothing may change from here on
digest=$(redis-cli DEBUG DIGEST)
keys=$(redis-cli DBSIZE)
while redis-cli INFO persistence | grep -q rdb_bgsave_in_progress:1; do sleep 0.1; done
redis-cli SAVE
redis-check-rdb dump.rdb > check.log
redis-check-aof appendonlydir/*.manifest >> check.log
mkdir copy
cp dump.rdb copy
redis-server --port 7000 --dir {PLACE}/copy --save '' --daemonize yes --enable-debug-command yes > /dev/null
until [ "$(redis-cli -p 7000 PING)" = PONG ]; do sleep 0.1; done
echo "$keys $digest" "$(redis-cli -p 7000 DBSIZE) $(redis-cli -p 7000 DEBUG DIGEST)"
"""


def check_files(pod: Pod) -> None:
    """Memory, snapshot and log of commands agree: what a fresh server loads from the files is what was there."""
    saved, keys, digest, keys_read, digest_read = pod.sh(COMPARE, timeout=120).split()
    assert saved == "OK" and int(keys) > 0
    assert (keys_read, digest_read) == (keys, digest)
