"""Files of /proc and namespaces: which they are, and images that want others."""

from __future__ import annotations

import os
import stat
from typing import Any

import pytest

from driver import SYSTEM_PYTHON, Podtree
from holder import World, world
from podtree.errors import Damaged
from podtree.kernel import mount
from podtree.objects import nsfiles, procfiles
from podtree.objects.nsfiles import NamespaceFile
from podtree.objects.procfiles import ProcFile

__all__ = ["world"]
REG = stat.S_IFREG


def test_which_they_are(world: World) -> None:
    def hold() -> dict[str, Any]:
        ended = os.fork()
        if ended == 0:
            os.kill(os.getpid(), 19)
        paths = {"own": "/proc/self/status", "system": "/proc/meminfo", "top": "/proc", "net": f"/proc/{ended}/net/dev"}
        paths |= {"gone": f"/proc/{ended}/stat", "thread": f"/proc/{ended}/task/{ended}/stat"}
        made: dict[str, Any] = {name: os.open(path, os.O_RDONLY) for name, path in paths.items()}
        made["ns"] = os.open("/proc/self/ns/uts", os.O_RDONLY)
        os.kill(ended, 9)
        os.waitpid(ended, 0)
        os.read(made["own"], 10)
        return {**made, "ended": ended}

    pid = world.hold(hold)
    saved = world.collect([pid])
    assert saved.problems == []
    ended = saved.names["ended"]
    assert saved.of("own").what == ProcFile(f"/proc/{pid}/status", REG)
    assert saved.of("own").pos == 10
    assert saved.of("system").what == ProcFile("/proc/meminfo", REG)
    assert saved.of("top").what == ProcFile("/proc", stat.S_IFDIR)
    assert saved.of("net").what == ProcFile("/proc/1/net/dev", REG)
    assert saved.of("gone").what == ProcFile(f"/proc/{ended}/stat", REG, gone=ended)
    assert saved.of("thread").what == ProcFile(f"/proc/{ended}/task/{ended}/stat", REG, gone=ended)
    assert saved.of("ns").what == NamespaceFile("uts")
    world.end(pid)


def test_what_is_not_the_pods_is_refused(world: World) -> None:
    """The host's /proc, the namespace of another process, file systems of the kernel that are no views of the pod."""
    keep = (os.open("/proc/meminfo", os.O_RDONLY), os.open("/proc/self/ns/mnt", os.O_RDONLY))
    groups = next(m.point for m in mount.mountinfo() if m.fstype in ("cgroup", "cgroup2"))
    world.binds.append((groups, "mnt"))

    def hold() -> dict[str, Any]:
        return {"host": keep[0], "mnt": keep[1], "cgroup": os.open("/mnt/cgroup.procs", os.O_RDONLY)}

    pid = world.hold(hold, keep=keep)
    saved = world.collect([pid])
    text = "\n".join(saved.problems)
    assert len(saved.problems) == 3, text
    assert (
        "an open file of cgroup" in text
        and "outside of the pod's mounts" in text
        and "a namespace that is not the pod's" in text
    )
    world.end(pid)
    for fd in keep:
        os.close(fd)


@pytest.mark.parametrize(
    "state",
    [
        ProcFile("/etc/shadow", REG),
        ProcFile("/procfs/x", REG),
        ProcFile("/proc/meminfo", REG, gone=7),
        ProcFile("/proc/7/a\0b", REG),
    ],
)
def test_paths_that_an_image_may_not_have(state: ProcFile) -> None:
    with pytest.raises(Damaged):
        procfiles.path_of(state, 99)


def test_paths_of_what_has_ended() -> None:
    assert procfiles.path_of(ProcFile("/proc/7/maps", REG, gone=7), 99) == b"/proc/99/maps"
    assert procfiles.path_of(ProcFile("/proc/7/task/8/maps", REG, gone=7), 99) == b"/proc/99/task/99/maps"
    assert procfiles.path_of(ProcFile("/proc/7", stat.S_IFDIR, gone=7), 99) == b"/proc/99"
    with pytest.raises(Damaged):
        nsfiles.path_of(NamespaceFile("../root"))


def test_files_of_proc_are_opened_with_a_pods_rights(podtree: Podtree) -> None:
    """What many of them show depends on who opened them: no kernel addresses, no physical ones, in a branch either."""
    script = """
import os, time
symbols, pages = open('/proc/kallsyms'), open('/proc/self/pagemap', 'rb', buffering=0)
buffer = bytearray(1 << 16)
print('READY', flush=True)
while not os.path.exists('/tmp/go'): time.sleep(0.05)
print(sum(int(line.split()[0], 16) != 0 for line in symbols))
address = next(int(line.split('-')[0], 16) for line in open('/proc/self/maps') if 'heap' in line)
pages.seek(address // 4096 * 8)
entry = int.from_bytes(pages.read(8), 'little')
print(entry >> 63, entry & (1 << 55) - 1)
"""
    pod = podtree.run(SYSTEM_PYTHON, "-c", script, name="reader")
    pod.wait_log("READY")
    pod.checkpoint()
    for one in (pod, podtree.branch(f"{pod.name}@1")):
        one.sh("touch /tmp/go")
        one.wait()
        assert one.logs().split() == ["READY", "0", "1", "0"]
