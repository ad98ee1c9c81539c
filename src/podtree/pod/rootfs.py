"""`--rootfs`: a directory as it is, or a tar file or the layers of an OCI image, unpacked once into the pool.

Unpacking is done by a child whose root is the target directory, so no name or link in the archive can
reach out of it. Device nodes are left out: pods have their own.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from podtree.errors import PodtreeError, UsageError
from podtree.kernel import caps
from podtree.kernel.caps import Cap
from podtree.kernel.sys import NR, syscall
from podtree.pod import ocilayout

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
_XATTR = "SCHILY.xattr."  # pax(5) as GNU tar and others extend it


def prepare(pool_root: Path, source: str) -> str:
    """The directory that is to be the pod's lower layer; raises UsageError."""
    path = Path(source).resolve()
    layout = ocilayout.find(source)
    if layout is not None:
        image = ocilayout.read(*layout)
        return _unpacked(pool_root, image.digest, image.layers, source, layered=True)
    if path.is_dir():
        return str(path)
    if not path.is_file():
        raise UsageError(f"--rootfs {source}: no such directory, tar file or OCI layout")
    if not tarfile.is_tarfile(path):
        raise UsageError(
            f"--rootfs {source}: neither a directory nor a tar file",
            "a tar file may be compressed by gzip, bzip2 or xz; unpack others into a directory",
        )
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return _unpacked(pool_root, digest, (path,), source, layered=False)


def _unpacked(pool_root: Path, digest: str, layers: tuple[Path, ...], source: str, *, layered: bool) -> str:
    """Where the tar files are unpacked, one above the other; `digest` names them all.

    `layered`: they are layers of an image, in which some names take files away (image-spec, layer.md: whiteouts).
    """
    def fill(draft: Path) -> None:
        with contextlib.ExitStack() as stack:
            _in_child([stack.enter_context(open(layer, "rb")) for layer in layers], draft, source, layered)

    return keep(pool_root, digest, fill)


def find(pool_root: Path, name: str) -> str | None:
    """The directory in the pool of that name, if it is there; see `keep`."""
    if not re.fullmatch("[0-9a-f]{32}", name):
        return None
    with contextlib.suppress(FileNotFoundError):
        return str(pool_root / "rootfs" / name) if _keep(pool_root / "rootfs" / name) else None
    return None


def keep(pool_root: Path, digest: str, fill: Callable[[Path], None]) -> str:
    """The directory in the pool for what has that digest (hex digits), made by `fill` unless it is there."""
    target = pool_root / "rootfs" / digest[:32]
    target.parent.mkdir(mode=0o700, exist_ok=True)
    if not _keep(target):
        _make(target, fill)
    return str(target)


def _keep(target: Path) -> bool:
    """Whether it is there; gc leaves it alone for a while then (Pool.gc): no pod names it yet."""
    fd = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        os.utime(target)
    except FileNotFoundError:
        return False
    finally:
        os.close(fd)
    return True


def _make(target: Path, fill: Callable[[Path], None]) -> None:
    """By way of a directory of another name: `target` is whole or isn't there."""
    draft = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
    try:
        fill(draft)
        os.utime(draft)  # the archive may say otherwise
        _make_durable(draft)
        with contextlib.suppress(OSError):  # somebody else was faster
            os.rename(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _make_durable(directory: Path) -> None:
    """The rename could outlive a power failure, and what was written to the files before not: syncfs(2)."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscall(NR.syncfs, fd)
    finally:
        os.close(fd)


def _in_child(layers: list[IO[bytes]], draft: Path, source: str, layered: bool) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.chmod(draft, 0o755)
            archives = [tarfile.open(fileobj=file) for file in layers]
            for archive in archives:
                archive.next()  # imports what the compression needs, while there is a file system
            os.chroot(draft)
            os.chdir("/")
            _lay_down_arms()
            for archive in archives:
                _unpack(archive, layered)
            code = 0
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode()[:4000])
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    _, status = os.waitpid(pid, 0)
    if status:
        raise PodtreeError(f"--rootfs {source}: unpacking failed: {said}")


def _lay_down_arms() -> None:
    """Keep what unpacking needs and no more: the archive is untrusted, and from here on / is what it says."""
    sys.meta_path.clear()  # a module that is imported only now would be one of the archive's
    kept = caps.mask(frozenset({Cap.CHOWN, Cap.DAC_OVERRIDE, Cap.FOWNER, Cap.FSETID, Cap.SETFCAP}))
    caps.capset(kept, kept, 0)


def _unpack(archive: tarfile.TarFile, layered: bool) -> None:
    if layered:
        for member in archive.getmembers():
            _white_out(member.name)

    def wanted(member: tarfile.TarInfo, _path: str) -> tarfile.TarInfo | None:
        if member.isdev() and not member.isfifo():
            return None
        if layered:
            if Path(member.name).name.startswith(_WHITEOUT):
                return None
            _make_way(member)
        return member

    archive.extractall(".", numeric_owner=True, filter=wanted)
    for member in archive.getmembers():
        for key, value in member.pax_headers.items():
            if key.startswith(_XATTR + "security.capability"):
                with contextlib.suppress(OSError):
                    raw = value.encode("utf-8", "surrogateescape")
                    os.setxattr(member.name, key.removeprefix(_XATTR), raw, follow_symlinks=False)


def _white_out(name: str) -> None:
    """Take away what a whiteout names: a file or tree of the layers below, or all that is in a directory."""
    path = Path(name)
    if path.name == _OPAQUE:
        for entry in path.parent.iterdir() if path.parent.is_dir() else ():
            _remove(entry)
    elif path.name.startswith(_WHITEOUT):
        _remove(path.with_name(path.name.removeprefix(_WHITEOUT)))


def _make_way(member: tarfile.TarInfo) -> None:
    """Only a directory may stay where one is to be: a file would be written through a link, or into its other names."""
    path = Path(member.name)
    if not (member.isdir() and path.is_dir() and not path.is_symlink()):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
