"""A pool of a test's own, on a real btrfs in a loop file, which is unmounted whatever happens."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from podtree.image import manifest
from podtree.objects.sysvipc import IpcState
from podtree.pool import CheckpointRecord, PodRecord, Pool, faults

MIB = 1 << 20
PAGE = 4096


@pytest.fixture
def pool_home() -> Iterator[Path]:
    """An empty PODTREE_HOME."""
    if os.geteuid() != 0:
        pytest.fail("mounting a pool needs root", pytrace=False)
    home = Path(tempfile.mkdtemp(prefix="ptpool", dir=os.environ.get("PODTREE_TEST_DIR", "/tmp")))
    try:
        yield home
    finally:
        Pool.close_home(home)
        shutil.rmtree(home)


@pytest.fixture
def pool(pool_home: Path) -> Iterator[Pool]:
    """An open pool in a file of 256 MiB."""
    with Pool.open(pool_home, initial_size=256 * MIB) as opened:
        try:
            yield opened
        finally:
            faults.hook = None


def page_file(path: Path, pages: dict[int, bytes]) -> None:
    """Write a file of pages with its map and its sums."""
    path.parent.mkdir(exist_ok=True)
    runs = b"".join(struct.pack("<QQ", number, 1) for number in sorted(pages))
    with open(path, "wb") as data, open(f"{path}.sum", "wb") as sums:
        for number, page in pages.items():
            data.seek(number * PAGE)
            data.write(page)
            sums.seek(number * 8)
            sums.write(struct.pack("<Q", xxhash.xxh3_64_intdigest(page)))
    Path(f"{path}.map").write_bytes(hashlib.blake2b(runs, digest_size=32).digest() + runs)


def empty_manifest(hostname: str, spec: dict[str, Any]) -> manifest.Manifest:
    """Of a pod without a single process."""
    return manifest.Manifest(
        machine="x86_64", kernel="6.18", vdso="", xstate_size=0, hostname=hostname, domainname="",
        clock=manifest.Clock(0, 0, 0), spec=json.dumps(spec).encode(), stdio=(), processes=(), zombies=(),
        last_pid=1, files=(), ipc=IpcState(), tmpfs=(),
    )  # fmt: skip


def fill(pool: Pool, pod: PodRecord, text: str) -> None:
    """Give the pod a file and an image that are `text` throughout."""
    word = (text.encode() or b"-") * (2 * PAGE)
    (pool.vol_dir(pod.id) / "upper" / "file").write_bytes(word)
    image = pool.img_dir(pod.id)
    image_fd = os.open(image, os.O_RDONLY | os.O_DIRECTORY)
    manifest.save(empty_manifest(text, pod.spec), image_fd)
    os.close(image_fd)
    for name, first in (("mem/1", 0x7F0000000), ("shm/1", 0)):
        page_file(image / name, {first + index: word[index : index + PAGE] for index in range(3)})


def take(pool: Pool, pod: PodRecord, text: str, summary: dict[str, Any] | None = None) -> CheckpointRecord:
    """Fill the pod and take a checkpoint of it, as a checkpointer does."""
    fill(pool, pod, text)
    with pool.begin_checkpoint(pod.id) as draft:
        draft.flush_volume()
        draft.snapshot_volume()
        draft.snapshot_image()
        return draft.commit(text, summary or {"bytes_written": 4096})


def content(pool: Pool, directory: Path) -> str:
    """What `fill` wrote into a pod's or a checkpoint's directory; fails if its parts are of different times."""
    word = (directory / "vol/upper/file").read_bytes()
    first = (directory / "img/shm/1").read_bytes()[:PAGE]
    assert word[:PAGE] == first, "volume and image are of different instants"
    return word.decode()


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked child; its wait status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]
