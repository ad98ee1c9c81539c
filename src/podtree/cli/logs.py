"""podtree logs: what a pod's command wrote to its terminal, stdout and stderr."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import BinaryIO

import click

from podtree.cli import common
from podtree.errors import UsageError
from podtree.pod import control
from podtree.pool.pool import Pool
from podtree.pool.records import PodRecord

_CHUNK = 1 << 16


@click.command("logs")
@click.option("-f", "--follow", "following", is_flag=True, help="Go on until the pod ends.")
@click.option("-n", "--tail", type=click.IntRange(min=0), metavar="N", help="Only the last N lines.")
@common.json_option
@click.argument("ref", metavar="POD")
def command(following: bool, tail: int | None, as_json: bool, ref: str) -> None:
    """Show what a pod has written; with --json as one object, bytes that are no text replaced."""
    pool = common.open_pool()
    pod = pool.pod(ref)
    if as_json:
        if following:
            raise UsageError("--follow has no end that could be one JSON object")
        with open(control.dirs_of(pool, pod.id).log, "rb") as file:
            _seek_tail(file, tail)
            common.print_json({"pod": pod.name, "id": pod.id, "log": file.read().decode(errors="replace")})
        return
    if following:
        with contextlib.suppress(KeyboardInterrupt):
            follow(pool, pod, tail)
        return
    with open(control.dirs_of(pool, pod.id).log, "rb") as file:
        _seek_tail(file, tail)
        _copy(file)


def follow(pool: Pool, pod: PodRecord, tail: int | None) -> None:
    """Print the log as it grows, until the pod has ended. After a rewind: as it grows from there."""
    path = control.dirs_of(pool, pod.id).log
    file = open(path, "rb")
    _seek_tail(file, tail)
    while True:
        running = pool.pod(pod.id).is_running
        _copy(file)
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


def _copy(file: BinaryIO) -> None:
    while data := file.read(_CHUNK):
        sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


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
