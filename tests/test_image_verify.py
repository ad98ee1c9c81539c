"""An image is compared with its checksums before anything of it runs, and fsck knows which files there have to be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from driver import SYSTEM_PYTHON, Podtree, until
from pod_fixtures import writable

PROGRAM = """
import mmap, os, sys, time
size = int(sys.argv[1])
private = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
shared = mmap.mmap(-1, 64 * 4096)
for area in (private, shared):
    area[:] = os.urandom(4096) * (len(area) // 4096)
print("ready", flush=True)
time.sleep(1000)
"""
SMALL, LARGE = 1 << 20, 24 << 20  # compared by the restorer itself, and in a process beside it


def flip(path: Path, page_from_end: bool) -> None:
    """One bit of the first or the last page that has data."""
    with open(path, "r+b") as file:
        fd = file.fileno()
        at = os.lseek(fd, 0, os.SEEK_DATA)
        if page_from_end:
            at = os.fstat(fd).st_size - 4096
        byte = os.pread(fd, 1, at + 100)[0]
        os.pwrite(fd, bytes([byte ^ 0x20]), at + 100)


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("what", ["first", "last", "shared"])
def test_a_flipped_bit_is_found_before_anything_runs(
    podtree: Podtree, monkeypatch: pytest.MonkeyPatch, size: int, what: str
) -> None:
    """Of memory that is filled in at once: here that is all."""
    monkeypatch.setitem(podtree.env, "PODTREE_LAZY_BYTES", str(1 << 40))
    monkeypatch.setitem(podtree.env, "PODTREE_STANDBY_S", "0")  # one made ready before the damage would have none
    pod = podtree.run(SYSTEM_PYTHON, "-c", PROGRAM, str(size))
    pod.wait_log("ready")
    ref = pod.checkpoint()
    podtree.branch(ref).remove()
    image = podtree.home / "pool" / "ckpts" / ref / "img"
    with writable(image):
        pages = (
            next(path for path in (image / "shm").iterdir() if not path.suffix) if what == "shared" else image / "mem/1"
        )
        flip(pages, what == "last")
    done = podtree("branch", ref, code=6)
    assert "is damaged" in done.err
    assert [one["name"] for one in podtree.pods()] == [pod.name]
    (damage,) = [one for one in podtree.json_of("fsck", "--json", code=6)["damage"] if one["where"] == ref]
    assert damage["file"] == str(pages.relative_to(image.parent)) and damage["what"].endswith("checksum is wrong")
    pod.remove()
    until(lambda: podtree.processes() == [], "nothing of the attempts runs")


def test_files_that_only_the_manifest_knows_of(podtree: Podtree) -> None:
    pod = podtree.run(SYSTEM_PYTHON, "-c", PROGRAM, str(SMALL))
    pod.wait_log("ready")
    ref = pod.checkpoint()
    image = podtree.home / "pool" / "ckpts" / ref / "img"
    assert podtree("fsck").err == ""
    with writable(image):
        key = next(path.name for path in (image / "shm").iterdir() if not path.suffix)
        names = [f"{stem}{suffix}" for stem in ("mem/1", f"shm/{key}") for suffix in ("", ".sum", ".map")]
        for name in names:
            (image / name).unlink()
    damage = podtree.json_of("fsck", "--json", code=6)["damage"]
    assert {(one["where"], one["file"], one["what"]) for one in damage} == {
        (ref, f"img/{name}", "is missing") for name in names
    }
    assert podtree("branch", ref, code=6).err.startswith("podtree: ")
    assert podtree("diff", ref, pod.name, code=6).err.startswith("podtree: ")
    assert podtree("show", ref).code == 0
