"""Private mappings of which pages are dropped after a checkpoint has marked them: what comes back at the next access?

A page of a file that was changed and is dropped (MADV_DONTNEED) is the file's again; one that was reclaimed
(MADV_PAGEOUT, as when memory is short) too; of anonymous memory it is zeros.
"""

from __future__ import annotations

import mmap
import time
from pathlib import Path

PAGE, PAGES = 4096, 64
MADV_PAGEOUT = 21  # asm-generic/mman-common.h


def text(number: int, what: str) -> bytes:
    """What a page holds."""
    return (f"{what} {number} " * 1024).encode()[:PAGE]


def wait(step: str) -> None:
    """Until the test says so."""
    print(step, flush=True)
    while not Path("/tmp", step).exists():
        time.sleep(0.02)


def main() -> None:
    """Fill, checkpoint, drop, checkpoint, verify."""
    path = Path("/tmp/mapped")
    path.write_bytes(b"".join(text(n, "file") for n in range(PAGES)))
    with open(path, "r+b") as file:
        mapped = mmap.mmap(file.fileno(), PAGES * PAGE, flags=mmap.MAP_PRIVATE)
    anonymous = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    assert sum(mapped[at] for at in range(0, PAGES * PAGE, PAGE))  # all pages of the file are there
    for n in range(16):
        mapped[n * PAGE : (n + 1) * PAGE] = text(n, "changed")
    for n in range(PAGES):
        anonymous[n * PAGE : (n + 1) * PAGE] = text(n, "anonymous")
    wait("filled")
    for area in (mapped, anonymous):
        area.madvise(mmap.MADV_DONTNEED, 8 * PAGE, 8 * PAGE)
    mapped.madvise(MADV_PAGEOUT, 0, PAGES * PAGE)
    wait("dropped")
    for n in range(PAGES):
        page = slice(n * PAGE, (n + 1) * PAGE)
        assert mapped[page] == text(n, "changed" if n < 8 else "file"), n
        assert anonymous[page] == (bytes(PAGE) if 8 <= n < 16 else text(n, "anonymous")), n
    print("OK", flush=True)


if __name__ == "__main__":
    main()
