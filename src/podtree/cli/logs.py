"""podtree logs: what a pod's command wrote to its terminal, stdout and stderr."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import BinaryIO

import click

from podtree.cli import common
from podtree.errors import NotFound
from podtree.pod import control
from podtree.pool.pool import Pool
from podtree.pool.records import PodRecord

_CHUNK = 1 << 16


@click.command("logs")
@click.option("-f", "--follow", "following", is_flag=True, help="Go on until the pod ends.")
@click.option("-n", "--tail", type=click.IntRange(min=0), metavar="N", help="Only the last N lines.")
@common.json_flag("Print an object with the text as `log`; with -f one for each piece.")
@click.argument("ref", metavar="POD")
def command(following: bool, tail: int | None, as_json: bool, ref: str) -> None:
    """Show what a pod has written."""
    pool = common.open_pool()
    pod = pool.pod(ref)
    show = _json_writer(pod) if as_json else _write
    if following:
        with contextlib.suppress(KeyboardInterrupt):
            follow(pool, pod, tail, show)
        return
    with open(control.dirs_of(pool, pod.id).log, "rb") as file:
        _seek_tail(file, tail)
        if as_json:
            show(file.read())
        else:
            _copy(file, show)


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _json_writer(pod: PodRecord) -> Callable[[bytes], None]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(data: bytes) -> None:
        common.print_json({"pod": pod.name, "id": pod.id, "log": decoder.decode(data)})
        sys.stdout.flush()

    return write


def follow(pool: Pool, pod: PodRecord, tail: int | None, show: Callable[[bytes], None] = _write) -> None:
    """Print the log as it grows, until the pod has ended. After a rewind: as it grows from there."""
    path = control.dirs_of(pool, pod.id).log
    file = open(path, "rb")
    _seek_tail(file, tail)
    while True:
        running = _runs(pool, pod)
        _copy(file, show)
        if not running:
            return
        time.sleep(0.1)
        with contextlib.suppress(FileNotFoundError):
            now, old = os.stat(path), os.fstat(file.fileno())
            if (now.st_dev, now.st_ino) != (old.st_dev, old.st_ino):
                file.close()
                file = open(path, "rb")
                file.seek(0, os.SEEK_END)
            elif now.st_size < file.tell():
                file.seek(0, os.SEEK_END)


def _runs(pool: Pool, pod: PodRecord) -> bool:
    try:
        return pool.pod(pod.id).is_running
    except NotFound:  # it was run with --rm; what it wrote last can still be read
        return False


def _copy(file: BinaryIO, show: Callable[[bytes], None]) -> None:
    while data := file.read(_CHUNK):
        show(data)


def _seek_tail(file: BinaryIO, lines: int | None) -> None:
    """Go to where the last `lines` lines begin."""
    if lines is None:
        return
    end = position = file.seek(0, os.SEEK_END)
    if lines == 0:
        return
    while position:
        step = min(_CHUNK, position)
        position -= step
        file.seek(position)
        data = file.read(step)
        # The newline at the very end ends a line, it doesn't begin one.
        at = len(data) - 1 if position + step == end else len(data)
        while (at := data.rfind(b"\n", 0, at)) >= 0:
            lines -= 1
            if lines == 0:
                file.seek(position + at + 1)
                return
    file.seek(0)
