"""`--rootfs`: another root than the host's, as a directory and as a tar file, also a hostile one."""

from __future__ import annotations

import hashlib
import io
import json
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


class Layout:
    """An OCI image layout in the making (image-spec 1.1)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifests: list[dict[str, object]] = []
        (path / "blobs" / "sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def blob(self, data: bytes, kind: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (self.path / "blobs" / "sha256" / digest).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    def image(self, name: str, *layers: bytes, kind: str = "layer.v1.tar+gzip") -> None:
        config = self.blob(b"{}", "config.v1+json")
        manifest = {"schemaVersion": 2, "config": config, "layers": [self.blob(layer, kind) for layer in layers]}
        found = self.blob(json.dumps(manifest).encode(), "manifest.v1+json")
        self.manifests.append({**found, "annotations": {"org.opencontainers.image.ref.name": name}})
        self.write(self.manifests)

    def write(self, manifests: list[dict[str, object]]) -> None:
        (self.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))


def layer(*members: tuple[str, str | None], links: dict[str, str] | None = None) -> bytes:
    """A gzipped tar: names with their text, or None for a directory; symbolic links."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode = (tarfile.DIRTYPE, 0o755) if text is None else (tarfile.REGTYPE, 0o644)
            info.size = len(text or "")
            tar.addfile(info, io.BytesIO((text or "").encode()))
        for name, to in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, to
            tar.addfile(info)
    return buffer.getvalue()


@pytest.fixture
def layout(small_root: Path, tmp_path: Path) -> Layout:
    """An image of three layers: the small root, files upon it, changes to them."""
    made = Layout(tmp_path / "layout")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(small_root, ".")
    second = layer(
        ("srv", None), ("srv/gone", "x"), ("srv/kept", "kept"), ("srv/tree", None), ("srv/tree/below", "x"),
        ("srv/full", None), ("srv/full/old", "x"), ("srv/dir", None), ("srv/dir/x", "x"),
        links={"srv/link": "kept", "srv/tofull": "full"},
    )  # fmt: skip
    third = layer(
        ("srv/.wh.gone", ""), ("srv/.wh.tree", ""), ("srv/full/new", "new"), ("srv/full/.wh..wh..opq", ""),
        ("srv/link", "a file"), ("srv/dir", "a file"), ("srv/tofull", None), ("srv/tofull/inner", "x"),
    )  # fmt: skip
    made.image("small", buffer.getvalue(), second, third)
    return made


def test_oci_layout(podtree: Podtree, layout: Layout) -> None:
    """Layers upon layers: what one takes away is gone, and what it replaces isn't written through a link."""
    show = "cd /srv; ls -A . full tofull; cat kept link dir; cat /etc/mark"
    for source in (f"{layout.path}", f"{layout.path}:small"):
        done = podtree("run", "--rm", "--rootfs", source, "--", "/bin/sh", "-c", show)
        words = ".: dir full kept link tofull full: new tofull: inner kepta filea filesmall root"
        assert done.out.split() == words.split()
    layout.image("other", layer(("srv", None)))
    assert "small" in podtree("run", "--rootfs", str(layout.path), "--", "sh", code=2).err
    assert "no image third" in podtree("run", "--rootfs", f"{layout.path}:third", "--", "sh", code=2).err
    podtree("run", "--rm", "--rootfs", f"{layout.path}:small", "--", "/bin/sh", "-c", "true")


def test_oci_image_for_this_machine(podtree: Podtree, layout: Layout) -> None:
    """An index of images for several machines, itself below the layout's index, as registries have them."""
    mine = {**layout.manifests[0], "platform": {"architecture": "amd64", "os": "linux"}}
    other = {**layout.blob(b"{}", "manifest.v1+json"), "platform": {"architecture": "riscv64", "os": "linux"}}
    index = json.dumps({"schemaVersion": 2, "manifests": [other, mine]}).encode()
    layout.write([layout.blob(index, "index.v1+json")])
    done = podtree("run", "--rm", "--rootfs", str(layout.path), "--", "/bin/sh", "-c", "cat /srv/kept")
    assert done.out == "kept"


def test_hostile_oci_layout(podtree: Podtree, layout: Layout, tmp_path: Path) -> None:
    """What isn't what its digest says, or wants out of the layout or the root, is refused by name or stays inside."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("x")

    def refused(words: str) -> None:
        assert words in podtree("run", "--rm", "--rootfs", str(layout.path), "--", "sh", code=2).err

    good = layout.manifests
    layout.write([{**good[0], "digest": "sha256:../../../../etc/passwd"}])
    refused("isn't a SHA-256 digest")
    layout.write([{**good[0], "digest": "sha256:" + "0" * 64}])
    refused("is missing")
    layout.write([])
    refused("0 images")
    (layout.path / "index.json").write_text('{"manifests": 7}')
    refused("can't be read")
    layout.manifests = []
    layout.image("squashed", b"squashfs", kind="layer.v1.squashfs")
    refused("not a tar file")
    layout.manifests = []
    layout.image("zstd", b"x", kind="layer.v1.tar+zstd")
    refused("zstd")
    layout.manifests = []
    evil = layer(("a/../../../../.." + str(outside) + "/.wh.file", ""), links={"out": str(outside)})
    layout.image("evil", evil, layer((f"{outside}/.wh.file", ""), ("out/.wh..wh..opq", ""), ("out/written", "x")))
    podtree("run", "--rm", "--rootfs", str(layout.path), "--", "sh", code=None)
    assert [path.name for path in outside.iterdir()] == ["file"]
    blob = layout.path / "blobs" / "sha256" / str(good[0]["digest"]).partition(":")[2]
    layout.write(good)
    blob.write_bytes(blob.read_bytes() + b" ")
    refused("damaged")


def test_unused_roots_are_freed(podtree: Podtree, small_root: Path, tmp_path: Path) -> None:
    """gc removes what a tar file was unpacked to, once it is old and neither a pod nor a checkpoint needs it."""
    archive = tmp_path / "root.tar"
    (tmp_path / "only-here").touch()
    with tarfile.open(archive, "w") as tar:
        tar.add(small_root, ".")
        tar.add(tmp_path / "only-here", "only-here")
    podtree("run", "-d", "--name", "rooted", "--rootfs", archive, "--", "/bin/cat", "/etc/mark")
    (unpacked,) = (path.parent for path in (podtree.home / "pool" / "rootfs").glob("*/only-here"))
    os.utime(unpacked, (0, 0))
    podtree("gc")
    assert unpacked.exists()
    podtree("rm", "--force", "rooted")
    os.utime(unpacked)
    podtree("gc")
    assert unpacked.exists()
    os.utime(unpacked, (0, 0))
    assert unpacked.name in podtree.json("gc", "--dry-run")["leftovers"]
    assert unpacked.name in podtree.json("gc")["leftovers"] and not unpacked.exists()


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
