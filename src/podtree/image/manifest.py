"""The manifest: all state of a checkpoint but its pages, typed and versioned.

On disk: 8 bytes magic, 32 bytes blake2b-256 of the payload, the payload (msgpack). See docs/format.md.
"""

from __future__ import annotations

import hashlib
import os
from typing import Literal

import msgspec

from podtree.errors import Damaged
from podtree.objects.descriptors import OpenFile
from podtree.objects.mqueue import PosixQueue
from podtree.objects.nesting import Nesting
from podtree.objects.processes import Process, Zombie
from podtree.objects.sysvipc import IpcState
from podtree.objects.tmpfs import TmpfsMount

MAGIC = b"PODTREE\x01"
VERSION = 1
StdioMode = Literal["tty", "pipes", "log", "null"]
NAME = "manifest"
SUM_SIZE = 32


class Clock(msgspec.Struct, frozen=True):
    """What the pod's clocks showed at the instant, in nanoseconds; `realtime` since the epoch."""

    monotonic_ns: int
    boottime_ns: int
    realtime_ns: int


class StdioSet(msgspec.Struct, frozen=True):
    """Stdin, stdout and stderr of a process started from outside, whose other ends the supervisor has.

    `pid` is that process (0: it has ended, others use its stdio); `mode` "tty", "pipes", "log" or "null";
    `index` the pty's number. Set number i has the pipes 3i, 3i+1, 3i+2 that StdioPipe.index counts.
    """

    name: str
    pid: int
    mode: StdioMode
    index: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was saved of a pod's processes at one instant."""

    version: int = VERSION
    machine: str  # uname -m
    kernel: str  # uname -r
    vdso: str  # hash of the vdso's code: a program may be stopped inside it
    xstate_size: int  # of the XSAVE area
    hostname: str
    domainname: str
    clock: Clock
    spec: bytes  # PodSpec as JSON
    stdio: tuple[StdioSet, ...]
    processes: tuple[Process, ...]
    zombies: tuple[Zombie, ...]
    last_pid: int  # given out in the pid namespace; 0 if unknown
    files: tuple[OpenFile, ...]
    ipc: IpcState
    tmpfs: tuple[TmpfsMount, ...]
    queues: tuple[PosixQueue, ...] = ()
    nesting: Nesting = Nesting()


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Manifest)


def save(manifest: Manifest, dir_fd: int) -> int:
    """Write the manifest into an image directory; returns its size in bytes."""
    payload = _encoder.encode(manifest)
    data = MAGIC + hashlib.blake2b(payload, digest_size=SUM_SIZE).digest() + payload
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    with open(os.open(NAME + ".new", flags, 0o600, dir_fd=dir_fd), "wb") as file:
        file.write(data)
    os.rename(NAME + ".new", NAME, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    return len(data)


def load(dir_fd: int) -> Manifest:
    """Read and verify the manifest of an image directory; raises Damaged."""
    try:
        with open(os.open(NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=dir_fd), "rb") as file:
            data = file.read()
    except OSError as error:
        raise Damaged(f"the manifest can't be read: {error.strerror}") from error
    head, payload = data[: len(MAGIC) + SUM_SIZE], data[len(MAGIC) + SUM_SIZE :]
    if head[: len(MAGIC)] != MAGIC:
        raise Damaged("the manifest has another format (wrong magic)", "was it written by a newer podtree?")
    if hashlib.blake2b(payload, digest_size=SUM_SIZE).digest() != head[len(MAGIC) :]:
        raise Damaged("the manifest is damaged (checksum)")
    try:
        manifest = _decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise Damaged(f"the manifest is invalid: {error}") from error
    if manifest.version != VERSION:
        raise Damaged(f"manifest version {manifest.version} is not known")
    return manifest
