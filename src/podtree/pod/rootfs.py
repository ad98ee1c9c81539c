"""`--rootfs`: a directory as it is, or a tar file, unpacked once into the pool.

Unpacking is done by a child whose root is the target directory, so no name or link in the archive can
reach out of it. Device nodes are left out: pods have their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import IO

from podtree.errors import PodtreeError, UsageError
from podtree.kernel import caps
from podtree.kernel.caps import Cap

_XATTR = "SCHILY.xattr."  # pax(5) as GNU tar and others extend it


def prepare(pool_root: Path, source: str) -> str:
    """The directory that is to be the pod's lower layer; raises UsageError."""
    path = Path(source).resolve()
    if path.is_dir():
        return str(path)
    if not path.is_file():
        raise UsageError(f"--rootfs {source}: no such directory or tar file")
    if not tarfile.is_tarfile(path):
        raise UsageError(
            f"--rootfs {source}: neither a directory nor a tar file",
            "a tar file may be compressed by gzip, bzip2 or xz; unpack others into a directory",
        )
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        target = pool_root / "rootfs" / digest[:32]
        if not target.is_dir():
            file.seek(0)
            _unpack_into(file, target, source)
    return str(target)


def _unpack_into(file: IO[bytes], target: Path, source: str) -> None:
    """By way of a directory of another name: `target` is whole or isn't there."""
    target.parent.mkdir(mode=0o700, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
    try:
        _in_child(file, draft, source)
        with contextlib.suppress(OSError):  # somebody else was faster
            os.rename(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _in_child(file: IO[bytes], draft: Path, source: str) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.chmod(draft, 0o755)
            with tarfile.open(fileobj=file) as archive:
                first = archive.next()  # imports what the compression needs, while there is a file system
                os.chroot(draft)
                os.chdir("/")
                _lay_down_arms()
                if first is not None:
                    _unpack(archive)
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


def _unpack(archive: tarfile.TarFile) -> None:
    def wanted(member: tarfile.TarInfo, _path: str) -> tarfile.TarInfo | None:
        return None if member.isdev() and not member.isfifo() else member

    archive.extractall(".", numeric_owner=True, filter=wanted)
    for member in archive.getmembers():
        for key, value in member.pax_headers.items():
            if key.startswith(_XATTR + "security.capability"):
                with contextlib.suppress(OSError):
                    raw = value.encode("utf-8", "surrogateescape")
                    os.setxattr(member.name, key.removeprefix(_XATTR), raw, follow_symlinks=False)
