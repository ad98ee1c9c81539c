"""Nobody reads a page that isn't what was saved: what is filled in at once is compared before a pod is let go.

The tasks read these pages themselves. Meanwhile a second process reads the same files, whose pages the page cache
then has once for both, and compares: where a processor is to spare this takes no time. Pages that come in when the
pod runs already are compared by who brings them in (`podtree.restore.pager`).
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import NoReturn

from podtree.errors import RestoreFailed
from podtree.image import verify
from podtree.image.manifest import Manifest
from podtree.image.pages import load_map
from podtree.kernel import userfaultfd
from podtree.kernel.pageruns import Run, merge_runs
from podtree.kernel.prctl import Prctl, prctl
from podtree.kernel.sys import PAGE_SIZE
from podtree.pod import wire
from podtree.restore import pager

_FORK_FROM = 8 << 20  # bytes: what is less is compared sooner than forked


Wanted = dict[str, list[Run]]


def filled_at_once(image_fd: int, manifest: Manifest) -> Wanted:
    """The pages that are there before a process runs, by page file. Raises Damaged where a map is."""
    lazily = userfaultfd.is_available()
    maps = {name: load_map(image_fd, f"mem/{name}") for name in verify.page_files(manifest)}
    wanted: Wanted = {name: [] for name in maps}
    for process in manifest.processes:
        if process.shared.memory:
            continue
        runs = maps[process.memory.pages]
        later = lazily and not process.shared.files
        wanted[process.memory.pages] += pager.split(process.memory.vmas, runs)[0] if later else runs
    return {name: merge_runs(runs) for name, runs in wanted.items()}


def compare(image_fd: int, wanted: Wanted) -> None:
    """Raises Damaged, naming the page."""
    for name, runs in wanted.items():
        verify.verify_pages(image_fd, f"mem/{name}", runs)


class PageCheck:
    """The comparison of what is filled in at once (`wanted`), under way."""

    def __init__(self, image_fd: int, wanted: Wanted) -> None:
        self._image_fd = image_fd
        self._wanted = wanted
        self._pid = 0
        pages = sum(count for runs in self._wanted.values() for _, count in runs)
        if pages * PAGE_SIZE >= _FORK_FROM:
            self._report_r, report_w = os.pipe2(os.O_CLOEXEC)
            self._pid = os.fork()
            if self._pid == 0:
                _in_fork(image_fd, self._wanted, report_w)
            os.close(report_w)

    def finish(self) -> None:
        """Wait for the outcome. Raises Damaged, naming the page, or RestoreFailed when there is none."""
        if not self._pid:
            compare(self._image_fd, self._wanted)
            return
        failure = wire.read_report(self._report_r, "")
        _, status = os.waitpid(self._pid, 0)
        self._forget()
        if failure is not None:
            raise failure
        if status != 0:
            raise RestoreFailed("the process that compares the pages with their checksums was killed")

    def close(self) -> None:
        """Leave off, if it isn't finished."""
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._forget()

    def _forget(self) -> None:
        self._pid = 0
        os.close(self._report_r)


def _in_fork(image_fd: int, wanted: Wanted, report_w: int) -> NoReturn:
    try:
        prctl(Prctl.SET_PDEATHSIG, signal.SIGKILL)
        wire.isolate_child([image_fd, report_w])
        compare(image_fd, wanted)
    except BaseException as error:
        wire.report_failure(report_w, error)
        os._exit(1)
    os._exit(0)
