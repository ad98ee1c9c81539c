"""`podtree diff`: everything that a program could see to be different is told, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from driver import BUILD, SYSTEM_PYTHON, Pod, Podtree
from podtree.diff import files

LOWER = BUILD / "diff"  # on the host's root file system, so that the pod has it below its own writes

PROGRAM = """
import ctypes, mmap, os, time
shared = mmap.mmap(-1, 16 * 4096)
private = mmap.mmap(-1, 16 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for area in (shared, private):
    area[:] = b"a" * len(area)
first, second = os.pipe()
print("ready", flush=True)
while not os.path.exists("/tmp/go"):
    time.sleep(0.02)
shared[0] = shared[5 * 4096] = 7
for page in range(4):
    private[page * 4096] = 8
os.write(second, b"hello")
os.open("/etc/hostname", os.O_RDONLY)
if os.fork() == 0:
    ctypes.CDLL(None).prctl(15, b"newcomer", 0, 0, 0)
    time.sleep(1000)
ctypes.CDLL(None).prctl(15, b"renamed", 0, 0, 0)
print("done", flush=True)
time.sleep(1000)
"""

BEFORE = """
mkdir own; cd own
for name in gone changed mode owner attribute type moved; do echo $name > $name; done
mkdir directory; echo x > directory/inside; ln -s gone link; mkfifo fifo
echo gone > /dev/shm/gone; echo changed > /dev/shm/changed; echo same > /dev/shm/same
"""
AFTER = r"""
cd own; rm gone; echo CHANGED > changed; chmod 700 mode; chown 5:6 owner; mv moved moved2; touch new
python3 -c 'import os; os.setxattr("attribute", "user.note", b"1")'
rm type; mkdir type; rm -r directory; echo now > directory; rm link; ln -s new link; chmod 600 fifo
touch "$(printf 'bad\377name')" "$(printf 'esc\033[31m')"
rm /dev/shm/gone; echo CHANGED > /dev/shm/changed; echo new > /dev/shm/new
cd ..
rm -r low-tree; rm -r low-replaced; mkdir low-replaced; touch low-replaced/new
touch low-touched; chmod 600 low-mode; chmod 700 low-directory; rm low-link; mkdir low-link; touch low-link/file
mv low-renamed low-elsewhere
"""
FILES = {
    "own/gone": ("removed", ()),
    "own/changed": ("changed", ("content",)),
    "own/mode": ("changed", ("mode 0644 -> 0700",)),
    "own/owner": ("changed", ("owner 0:0 -> 5:6",)),
    "own/attribute": ("changed", ("attributes user.note",)),
    "own/type": ("changed", ("type file -> directory", "mode 0644 -> 0755")),
    "own/directory": ("changed", ("type directory -> file", "mode 0755 -> 0644")),
    "own/directory/inside": ("removed", ()),
    "own/link": ("changed", ("target gone -> new",)),
    "own/fifo": ("changed", ("mode 0644 -> 0600",)),
    "own/moved": ("removed", ()),
    "own/moved2": ("added", ()),
    "own/new": ("added", ()),
    "own/bad\\xffname": ("added", ()),
    "own/esc\x1b[31m": ("added", ()),
    "low-tree": ("removed", ()),
    "low-tree/a": ("removed", ()),
    "low-tree/sub": ("removed", ()),
    "low-tree/sub/b": ("removed", ()),
    "low-replaced/old": ("removed", ()),
    "low-replaced/new": ("added", ()),
    "low-mode": ("changed", ("mode 0644 -> 0600",)),
    "low-directory": ("changed", ("mode 0755 -> 0700",)),
    "low-link": ("changed", ("type symbolic link -> directory",)),
    "low-link/file": ("added", ()),
    "low-renamed": ("removed", ()),
    "low-renamed/in": ("removed", ()),
    "low-renamed/in/file": ("removed", ()),
    "low-elsewhere": ("added", ()),
    "low-elsewhere/in": ("added", ()),
    "low-elsewhere/in/file": ("added", ()),
}
MEMORY_FILES = {
    "/dev/shm/gone": ("removed", ()),
    "/dev/shm/changed": ("changed", ("content",)),
    "/dev/shm/new": ("added", ()),
}


@pytest.fixture
def lower() -> Iterator[Path]:
    """A directory of the host's that pods see, and write to on their own."""
    script = """
    mkdir -p low-tree/sub low-replaced low-directory low-renamed/in; umask 022
    for name in low-tree/a low-tree/sub/b low-replaced/old low-touched low-mode low-renamed/in/file; do
        echo $name > $name
    done
    ln -s low-tree low-link; touch low-tree/file
    rm low-tree/file
    """
    LOWER.mkdir(parents=True)
    try:
        subprocess.run(["sh", "-ec", script], cwd=LOWER, check=True)
        yield LOWER
    finally:
        subprocess.run(["rm", "-r", str(LOWER)], check=True)


def changed_files(result: dict[str, Any]) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {file["path"]: (file["state"], tuple(file["changes"])) for file in result["files"]}


def start(podtree: Podtree, lower: Path) -> Pod:
    pod = podtree.run(SYSTEM_PYTHON, "-c", PROGRAM, options=["-w", lower])
    pod.wait_log("ready")
    pod.exec("sh", "-ec", f"cd {lower}; {BEFORE}")
    return pod


def test_between_two_checkpoints(podtree: Podtree, lower: Path) -> None:
    pod = start(podtree, lower)
    one = pod.checkpoint()
    pod.exec("sh", "-ec", f"cd {lower}; {AFTER}")
    pod.sh("touch /tmp/go")
    pod.wait_log("done")
    two = pod.checkpoint()
    result = podtree.json("diff", one, two)
    wanted = {f"{lower}/{name}": change for name, change in FILES.items()} | MEMORY_FILES | {"/tmp/go": ("added", ())}
    assert changed_files(result) == wanted
    by_pid = {process["pid"]: process for process in result["processes"]}
    main = by_pid.pop(1)
    assert (main["state"], main["before"], main["comm"]) == ("changed", "python3", "renamed")
    assert main["pages_changed"] >= 4 and main["shared_pages_changed"] == 2
    changes = {change["fd"]: (change["before"], change["after"]) for change in main["descriptors"]}
    assert ("pipe", "pipe, 5 bytes wait") in changes.values()
    assert ("", "file /etc/hostname") in changes.values()
    assert [(process["comm"], process["state"]) for process in by_pid.values()] == [("newcomer", "added")]
    text = podtree("diff", one, two).out
    assert "(python3 -> renamed) changed: 1 thread, " in text and "2 pages of shared memory changed" in text
    assert f"M {lower}/own/type  (type file -> directory, mode 0644 -> 0755)" in text
    assert f"A {lower}/own/esc\\x1b[31m  (0 B)" in text and "\x1b" not in text
    assert podtree("diff", one, one).out == "no difference\n"
    back = changed_files(podtree.json("diff", two, one))
    assert {path: state for path, (state, _) in back.items()} == {
        path: {"added": "removed", "removed": "added"}.get(state, state) for path, (state, _) in wanted.items()
    }


def test_pods_as_they_are(podtree: Podtree, lower: Path) -> None:
    """A running pod against a checkpoint, another pod, itself; nothing is left of looking; ended ones have files."""
    pod = start(podtree, lower)
    one = pod.checkpoint()
    branch = podtree.branch(one)
    pod.sh("echo a > /srv/a")
    branch.sh("echo b > /srv/b")
    assert changed_files(podtree.json("diff", one, pod.name)) == {"/srv/a": ("added", ())}
    assert changed_files(podtree.json("diff", pod.name, one)) == {"/srv/a": ("removed", ())}
    both = {"/srv/a": ("removed", ()), "/srv/b": ("added", ())}
    assert changed_files(podtree.json("diff", pod.name, branch.name)) == both
    assert changed_files(podtree.json("diff", pod.name, pod.name)) == {}
    assert [one["number"] for one in podtree.json("log", pod.name)] == [1]
    pod.checkpoint()
    assert os.listdir(podtree.home / "pool" / "drafts") == []
    branch.kill()
    result = podtree.json("diff", one, branch.name)
    assert changed_files(result) == {"/srv/b": ("added", ())}
    assert [(process["pid"], process["state"]) for process in result["processes"]] == [(1, "removed")]
    podtree("checkpoint", "--stop", pod.name)
    stopped = podtree.json("diff", one, pod.name)
    assert [process["state"] for process in stopped["processes"]] != ["removed"]


def test_a_directory_deeper_than_a_path_is_long(podtree: Podtree) -> None:
    pod = podtree.run("sleep", "1000")
    one = pod.checkpoint()
    pod.python(
        "import os\nos.chdir('/srv')\n"
        "for _ in range(60):\n    os.mkdir('d' * 200); os.chdir('d' * 200)\n"
        "open('bottom', 'w').close()"
    )
    two = pod.checkpoint()
    paths = changed_files(podtree.json("diff", one, two))
    assert len(paths) == 61
    assert paths["/srv/" + ("d" * 200 + "/") * 60 + "bottom"] == ("added", ())
    assert json.loads(podtree("fsck", "--json").out)["damage"] == []


def test_no_way_out_of_the_tree(tmp_path: Path) -> None:
    """Neither below nor in a pod's own files is a symbolic link followed: what it leads to is the host's."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "file").write_text("secret")
    lower, old, new = tmp_path / "lower", tmp_path / "old", tmp_path / "new"
    for vol in (old, new):
        (vol / "upper").mkdir(parents=True)
    lower.mkdir()
    (lower / "way").symlink_to(secret)
    (new / "upper" / "way").mkdir()
    (new / "upper" / "way" / "file").write_text("other")
    (old / "upper" / "out").symlink_to(secret)
    (new / "upper" / "out").symlink_to(secret, target_is_directory=True)
    found = {c.path: c.state for c in files.changes(files.trees(old, lower), files.trees(new, lower))}
    assert found == {"/way": "changed", "/way/file": "added"}


def test_a_damaged_side_is_said(podtree: Podtree) -> None:
    pod = podtree.run("sleep", "1000")
    one = pod.checkpoint()
    image = podtree.home / "pool" / "ckpts" / one / "img"
    subprocess.run(["btrfs", "property", "set", str(image), "ro", "false"], check=True)
    (image / "mem" / "1.sum").unlink()
    done = podtree("diff", one, pod.name, code=6)
    assert "1.sum" in done.err and "Traceback" not in done.err
