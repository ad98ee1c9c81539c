"""`--rootfs`: another root than the host's, as a directory and as a tar file, also a hostile one."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from driver import Podtree


@pytest.fixture(scope="module")
def small_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a shell and a few tools, and the libraries they need."""
    root = tmp_path_factory.mktemp("root")
    root.chmod(0o755)
    for name in ("bin", "etc", "usr/bin"):
        (root / name).mkdir(parents=True)
    for tool in ("/bin/sh", "/bin/ls", "/bin/cat", "/usr/bin/id", "/bin/touch"):
        real = Path(tool).resolve()
        shutil.copy(real, root / "bin" / Path(tool).name)
        libraries = subprocess.run(["ldd", str(real)], capture_output=True, text=True, check=True).stdout
        for word in libraries.split():
            if word.startswith("/"):
                target = root / word.lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(Path(word).resolve(), target)
    (root / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\napp:x:77:77::/app:/bin/sh\n")
    (root / "etc" / "mark").write_text("small root\n")
    return root


def test_directory(podtree: Podtree, small_root: Path) -> None:
    script = "cat /etc/mark; ls /; touch /new; id -u; echo $HOME; ls /proc/self/fd"
    done = podtree("run", "--rm", "--rootfs", str(small_root), "--", "/bin/sh", "-c", script)
    lines = done.out.splitlines()
    assert lines[0] == "small root" and {"proc", "sys", "dev", "bin"} <= set(lines) and "/root" in lines
    assert not (small_root / "new").exists() and not (small_root / "proc").exists()


def test_tar(podtree: Podtree, small_root: Path, tmp_path: Path) -> None:
    archive = tmp_path / "root.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(small_root, ".")
    for _ in range(2):
        options = ["--rm", "--rootfs", str(archive), "--user", "app"]
        done = podtree("run", *options, "--", "sh", "-c", "cat /etc/mark; id -u")
        assert done.out == "small root\n77\n"
    assert len(list((podtree.home / "pool" / "rootfs").iterdir())) == 1


def test_not_a_root(podtree: Podtree, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("no archive")
    podtree("run", "--rootfs", str(tmp_path / "x"), "--", "true", code=2)
    podtree("run", "--rootfs", str(tmp_path / "nowhere"), "--", "true", code=2)
    podtree("run", "--rootfs", str(tmp_path), "--", "true", code=127)


def test_hostile_links(podtree: Podtree, small_root: Path, tmp_path: Path) -> None:
    """/proc, /sys and /dev that are links lead to a refusal, not to a mount elsewhere."""
    for name in ("proc", "dev", "sys"):
        root = tmp_path / name
        shutil.copytree(small_root, root, symlinks=True)
        (root / name).symlink_to("/etc")
        done = podtree("run", "--rootfs", str(root), "--", "sh", "-c", "true", code=None)
        assert done.code != 0 and "link" in done.err, done


def test_hostile_archive(podtree: Podtree, small_root: Path, tmp_path: Path) -> None:
    """Names and links that want out of the directory stay in it; device nodes are left out."""
    outside = tmp_path / "outside"
    outside.mkdir()
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(small_root, ".")
        up = "../" * 20 + str(outside).lstrip("/")
        for name, kind, link in (("out", tarfile.SYMTYPE, str(outside)), ("up", tarfile.SYMTYPE, up)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            tar.addfile(info)
        for name in ("out/written", "up/written", f"{up}/written", f"{outside}/written"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"evil"))
        node = tarfile.TarInfo("bin/disk")
        node.type, node.devmajor, node.devminor = tarfile.BLKTYPE, os.major(os.stat("/").st_dev), 0
        tar.addfile(node)
    done = podtree("run", "--rm", "--rootfs", str(archive), "--", "sh", "-c", "cat /etc/mark; ls /bin", code=None)
    assert not list(outside.iterdir())
    if done.code == 0:
        assert done.out.startswith("small root") and "disk" not in done.out.split()


def test_hidden_directory_of_its_own(podtree: Podtree, small_root: Path, tmp_path: Path) -> None:
    """What a root has under the name of the pods' hidden directory is neither seen nor touched."""
    root = tmp_path / "root"
    shutil.copytree(small_root, root, symlinks=True)
    (root / ".podtree" / "directory").mkdir(parents=True)
    (root / ".podtree" / "g0").write_text("mine")
    pod = podtree.run("sh", "-c", "while :; do read x; done", name="rooted", options=["-i", "--rootfs", root])
    pod.checkpoint()
    branch = podtree.branch(f"{pod.name}@1")
    assert branch.sh("ls -A /.podtree") == ""
    assert (root / ".podtree" / "g0").read_text() == "mine"


def test_link_in_place_of_the_root(podtree: Podtree, small_root: Path, tmp_path: Path) -> None:
    """The directory that was a pod's root must still be one, and not a link to another."""
    root = tmp_path / "root"
    shutil.copytree(small_root, root, symlinks=True)
    pod = podtree.run("sh", "-c", "while :; do read x; done", name="rooted", options=["-i", "--rootfs", root])
    pod.checkpoint()
    root.rename(tmp_path / "away")
    root.symlink_to("/")
    assert "symbolic link" in podtree("branch", f"{pod.name}@1", code=None).err
