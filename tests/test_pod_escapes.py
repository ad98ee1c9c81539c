"""What a pod's root tries against the host, against podtree's own hands, and by way of checkpoints: all in vain."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from driver import PROGRAMS, SYSTEM_PYTHON, Podtree
from podtree.pod import privileges

ESCAPES = PROGRAMS / "escapes.py"


def assert_harmless(output: str) -> None:
    """The program went through all its attempts, and none succeeded."""
    assert "BAD" not in output and "DONE" in output, output


def test_known_escapes(podtree: Podtree) -> None:
    """By the first process, by one that was exec'ed, and by one that was brought back in a branch."""
    pod = podtree.run(SYSTEM_PYTHON, ESCAPES, "/tmp/go", name="cell")
    pod.wait_log("READY")
    assert_harmless(pod.exec(SYSTEM_PYTHON, ESCAPES))
    branch = podtree.branch(f"{pod.name}@{1 if pod.checkpoint() else 0}")
    for one in (pod, branch):
        one.sh("touch /tmp/go")
        one.wait()
        assert_harmless(one.logs())


def test_known_escapes_from_a_user_namespace(podtree: Podtree) -> None:
    """With --nested: outside of a user namespace as without, but for the calls themselves; in one no more."""
    pod = podtree.run("sleep", "1000", name="nest", options=["--nested"])
    assert_harmless(pod.exec(SYSTEM_PYTHON, ESCAPES, "--nested"))
    assert pod.exec("sh", "-c", "unshare -m true 2>&1; mount -t tmpfs none /mnt 2>&1", code=None).count("ermi") == 2


def test_nothing_of_the_host_is_open_with_a_terminal(podtree: Podtree) -> None:
    """A pod's terminal is one of its own /dev/pts, whatever the command's is."""
    pod = podtree.run("sleep", "1000", name="cell", options=["-t"])
    init = int(pod.info()["pid"])
    assert {os.readlink(f"/proc/{init}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/pts/0"}
    assert os.stat(f"/proc/{init}/fd/0").st_dev != os.stat("/dev/pts").st_dev


# ---- directories that the host shows


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of the host."""
    subprocess.run(["mount", "-t", "tmpfs", "none", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_tmpfs_of_the_host_is_not_put_back(podtree: Podtree, tmpfs: Path) -> None:
    """What -v shows is the host's: neither saved nor put back, also where it is memory, as the pod's /dev/shm is."""
    (tmpfs / "file").write_text("before")
    pod = podtree.run("sh", "-c", "exec sleep 1000 < /shown/file", name="shown", options=["-v", f"{tmpfs}:/shown"])
    pod.checkpoint()
    (tmpfs / "file").write_text("after")
    (tmpfs / "new").write_text("new")
    branch = podtree.branch(f"{pod.name}@1")
    assert branch.sh("readlink /proc/1/fd/0") == "/shown/file"
    assert {path.name: path.read_text() for path in tmpfs.iterdir()} == {"file": "after", "new": "new"}


@pytest.mark.parametrize("verb", ["branch", "rewind"])
def test_link_in_place_of_a_shown_directory(podtree: Podtree, tmp_path: Path, verb: str) -> None:
    """A pod that can write above a directory that -v shows puts a link there: no branch follows it."""
    (tmp_path / "top" / "shown").mkdir(parents=True)
    secret = tmp_path / "secret"
    secret.mkdir()
    options = ["-v", f"{tmp_path}/top:/top", "-v", f"{tmp_path}/top/shown:/shown"]
    pod = podtree.run("sleep", "1000", name="swapper", options=options)
    pod.sh(f"mv /top/shown /top/away && ln -s {secret} /top/shown")
    pod.checkpoint()
    ref = f"{pod.name}@1"
    done = podtree("branch", ref, code=8) if verb == "branch" else podtree("rewind", pod.name, ref, code=8)
    assert "symbolic link" in done.err
    (tmp_path / "top" / "shown").unlink()
    (tmp_path / "top" / "away").rename(tmp_path / "top" / "shown")
    assert podtree.branch(ref).sh("ls /shown") == ""


def test_pool_is_hidden_below_a_shown_directory(podtree: Podtree) -> None:
    above, name = podtree.home.parent, podtree.home.name
    pod = podtree.run("sleep", "1000", name="shown", options=["-v", f"{above}:/above"])
    assert pod.sh(f"ls -A /above/{name}; touch /above/{name}/x 2>/dev/null || echo refused") == "refused"
    assert pod.sh(f"ls /above | grep -x {name}") == name
    for source in (podtree.home, podtree.home / "pool"):
        done = podtree("run", "--rm", "-v", f"{source}:/shown", "--", "true", code=None)
        assert done.code not in (0, None) and "isn't shown to pods" in done.err


# ---- podtree's own hands


def test_paths_of_a_pod_are_looked_at_with_its_own_rights() -> None:
    """/etc/passwd of a pod may be a link to /proc/kmsg: who looks a user up must not be able to read that."""
    with open("/proc/kmsg", "rb"):
        pass
    with privileges.limited(), pytest.raises(PermissionError):
        open("/proc/kmsg", "rb")
    with open("/proc/kmsg", "rb"):
        pass


def test_hidden_directory_cannot_be_faked(podtree: Podtree) -> None:
    """Files of the pod that are called as podtree's own are left alone, and are in nobody's way."""
    pod = podtree.run(
        "sh", "-c", "echo kept > /tmp/one; ln /tmp/one /tmp/two; exec 3< /tmp/one; rm /tmp/one; exec sleep 1000",
        name="faker",
    )  # fmt: skip
    pod.sh("mkdir /.podtree-g0 /.podtree-socket-1; echo mine > /.podtree-g1; echo mine > /.podtree-lost")
    pod.checkpoint()
    branch = podtree.branch(f"{pod.name}@1")
    for one in (pod, branch):
        assert one.sh("cat /.podtree-g1 /.podtree-lost /proc/1/fd/3; ls -d /.podtree*").splitlines() == [
            "mine", "mine", "kept", "/.podtree", "/.podtree-g0", "/.podtree-g1", "/.podtree-lost", "/.podtree-socket-1",
        ]  # fmt: skip
