"""The verbs from Python: podtree.Pool, podtree.Pod, podtree.Checkpoint."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

import podtree as package
from driver import SYSTEM_PYTHON, Podtree, until
from podtree.errors import Conflict, NotFound


@pytest.fixture
def pool(podtree: Podtree) -> Iterator[package.Pool]:
    with package.Pool(podtree.home) as opened:
        yield opened


def test_run_exec_stop(pool: package.Pool) -> None:
    pod = pool.run("sh", "-c", "echo up; trap 'exit 4' TERM; while :; do sleep 0.05; done", name="api", env={"A": "b"})
    assert (pod.name, pod.state) == ("api", "running") and pod.pid
    assert pool.pod("api") == pod and pool.pods() == [pod]
    until(lambda: pod.log == b"up\n", "the log")
    data = os.urandom(1_000_000)
    done = pod.exec("sh", "-c", "cat; echo $A >&2; exit 3", stdin=data, env={"A": "c"})
    assert (done.returncode, done.stdout, done.stderr) == (3, data, b"c\n")
    with pytest.raises(TimeoutError):
        pod.exec("sleep", "1000", timeout=0.3)
    with pytest.raises(Conflict):
        pod.remove()
    assert pod.stop() == 4 and pod.wait() == 4 and pod.state == "exited"
    pod.remove()
    with pytest.raises(NotFound):
        pool.pod("api")


def test_supervisor_is_no_copy_of_the_caller(pool: package.Pool) -> None:
    """Threads, memory and open files of the calling program don't live on in the pod's supervisor."""
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    pod = pool.run("sleep", "1000")
    stop.set()
    thread.join()
    os.close(write_end)
    assert os.read(read_end, 1) == b""
    os.close(read_end)
    pod.remove(force=True)


def test_checkpoint_branch_rewind_commit(pool: package.Pool) -> None:
    script = "import time\nn = 0\nwhile True:\n    n += 1; open('/tmp/n', 'w').write(str(n)); time.sleep(0.02)"
    pod = pool.run(SYSTEM_PYTHON, "-c", script, name="tree", cwd="/")
    until(lambda: pod.exec("cat", "/tmp/n").stdout, "it counts")
    assert pod.check() == []
    first = pod.checkpoint("first", tag="start")
    assert first.message == "first" and first.ref == "tree@1" and pool.checkpoint("start") == first
    assert {"pause_ms", "total_ms", "bytes_written", "processes"} <= set(first.summary)
    one, two = first.branch(n=2, name="try")
    assert (one.name, two.name) == ("try-1", "try-2") and one.record.parent == first.id
    second = one.checkpoint()
    assert second.parent == first
    pod.rewind(first)
    assert pod.state == "running"
    one.commit(pod)
    assert one.name == "tree" and pool.checkpoint("tree@1") == first
    two.remove(force=True)
    one.remove(force=True)
