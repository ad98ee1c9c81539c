"""A file as a FUSE file system of its own, which notes every write and flush, and fails them when it is told to.

Mounted over a pool's image it lies below the loop device. Whatever a disk may do to unflushed writes when the power
goes, drop some and keep others, can be tried on copies afterwards. Protocol: include/uapi/linux/fuse.h (Linux 6.18).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import signal
import stat
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from podtree.kernel.mount import detach

_IN, _OUT = struct.Struct("=IIQQIIIHH"), struct.Struct("=IiQ")
_ATTR = struct.Struct("=QQQ QQQ III IIIIIII")
_RECORD = struct.Struct("=cQI")
_GETATTR, _SETATTR, _OPEN, _READ, _WRITE, _STATFS, _RELEASE, _FSYNC, _FLUSH, _INIT, _DESTROY = (
    3, 4, 14, 15, 16, 17, 18, 20, 25, 26, 38,
)  # fmt: skip
_SILENT = (2, 36, 42)  # FORGET, INTERRUPT, BATCH_FORGET: no reply is expected
_MAX_WRITE = 1 << 20
_SECTOR = 4096  # what a disk writes whole: btrfs asks as much for its superblock


@dataclass(frozen=True)
class Event:
    """`end`: position in the log behind it. `kind`: b"W" a write, b"T" a new size (`offset`), b"F" a flush."""

    end: int
    kind: bytes
    offset: int
    data: bytes


class FaultyDisk:
    """`image` is served through itself from `mount` to `unmount`; what it was before is `start`."""

    def __init__(self, image: Path, place: Path) -> None:
        self.image = image
        self.start, self._disk, self._log = place / "start", place / "disk", place / "log"
        self._control = mmap.mmap(-1, mmap.PAGESIZE)
        self._pid = 0
        self._read: list[Event] = []

    def mount(self) -> None:
        for copy in (self.start, self._disk):
            subprocess.run(["cp", "--sparse=always", self.image, copy], check=True)
        self._log.touch()
        fuse = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={fuse},rootmode={stat.S_IFREG:o},user_id=0,group_id=0,max_read={_MAX_WRITE}"
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"faulty", os.fsencode(self.image), b"fuse", 0, options.encode()):
            raise OSError(ctypes.get_errno(), "mounting a FUSE file system", str(self.image))
        self._pid = os.fork()
        if self._pid == 0:
            try:
                _Server(fuse, self._disk, self._log, self._control).serve()
            finally:
                os._exit(0)
        os.close(fuse)

    def unmount(self) -> None:
        if self._pid:
            detach(str(self.image))
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0

    @property
    def position(self) -> int:
        """How much has been written: later events have a larger `end`."""
        return self._log.stat().st_size

    def fail(self, code: int, after: int) -> None:
        """All writes fail with that errno once `after` more have been made; 0: none."""
        struct.pack_into("=II", self._control, 0, code, after)

    def events(self) -> list[Event]:
        """All that has happened, in order."""
        if not self._read or self._read[-1].end < self.position:
            self._read = list(self._events())
        return self._read

    def _events(self) -> Iterator[Event]:
        end = 0
        with open(self._log, "rb") as file:
            while head := file.read(_RECORD.size):
                kind, offset, size = _RECORD.unpack(head)
                end += _RECORD.size + size
                yield Event(end, kind, offset, file.read(size))

    def cut(self, at: int, chance: random.Random, result: Path) -> None:
        """`result` becomes what a disk might hold whose power went when the log had got so far.

        All that was written before the last flush, and of what came then some writes, whole or in part.
        """
        subprocess.run(["cp", "--sparse=always", self.start, result], check=True)
        events = [event for event in self.events() if event.end <= at]
        flushed = max((n for n, event in enumerate(events) if event.kind == b"F"), default=-1)
        share = chance.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        with open(result, "r+b") as file:
            for number, event in enumerate(events):
                if event.kind == b"F" or (number > flushed and chance.random() >= share):
                    continue
                if event.kind == b"T":
                    file.truncate(event.offset)
                    continue
                data = event.data
                if number > flushed and chance.random() < 0.1:
                    data = data[: chance.randrange(len(data) // _SECTOR + 1) * _SECTOR]
                file.seek(event.offset)
                file.write(data)


class _Server:
    """The other side of /dev/fuse, in a process of its own."""

    def __init__(self, fuse: int, disk: Path, log: Path, control: mmap.mmap) -> None:
        self._fuse = fuse
        self._disk = os.open(disk, os.O_RDWR)
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND)
        self._control = control

    def serve(self) -> None:
        while True:
            try:
                request = os.read(self._fuse, _MAX_WRITE + 4096)
            except OSError as error:
                if error.errno in (errno.ENODEV, errno.EBADF):
                    return
                continue
            _size, opcode, unique, *_rest = _IN.unpack_from(request)
            if opcode in _SILENT:
                continue
            code, reply = self._answer(opcode, memoryview(request)[_IN.size :])
            try:
                os.write(self._fuse, _OUT.pack(_OUT.size + len(reply), -code, unique) + reply)
            except OSError:
                pass

    def _answer(self, opcode: int, body: memoryview) -> tuple[int, bytes]:
        if opcode == _INIT:
            _major, _minor, ahead = struct.unpack_from("=III", body)
            return 0, struct.pack("=IIIIHHIIHHI28x", 7, 31, ahead, 1 << 5 | 1 << 22, 16, 12, _MAX_WRITE, 1, 256, 0, 0)
        if opcode == _SETATTR:
            valid, _, _, size = struct.unpack_from("=IIQQ", body)
            if valid & 8:
                os.ftruncate(self._disk, size)
                os.write(self._log, _RECORD.pack(b"T", size, 0))
        if opcode in (_GETATTR, _SETATTR):
            return 0, struct.pack("=QII", 1, 0, 0) + self._attributes()
        if opcode == _OPEN:
            return 0, struct.pack("=QII", 1, 0, 0)
        if opcode == _READ:
            _, offset, size = struct.unpack_from("=QQI", body)
            return 0, os.pread(self._disk, size, offset)
        if opcode == _WRITE:
            return self._write(body)
        if opcode == _FSYNC:
            if self._failing(0):
                return errno.EIO, b""
            os.write(self._log, _RECORD.pack(b"F", 0, 0))
            return 0, b""
        if opcode == _STATFS:
            return 0, struct.pack("=QQQQQIII28x", 1 << 20, 1 << 19, 1 << 19, 100, 100, 4096, 255, 4096)
        if opcode in (_FLUSH, _RELEASE, _DESTROY):
            return 0, b""
        return errno.ENOSYS, b""

    def _attributes(self) -> bytes:
        found = os.fstat(self._disk)
        now = int(time.time())
        return _ATTR.pack(
            1, found.st_size, found.st_blocks, now, now, now, 0, 0, 0, stat.S_IFREG | 0o600, 1, 0, 0, 0, 4096, 0
        )

    def _write(self, body: memoryview) -> tuple[int, bytes]:
        _, offset, size = struct.unpack_from("=QQI", body)
        code = self._failing(1)
        if code:
            return code, b""
        data = body[40 : 40 + size]
        os.pwrite(self._disk, data, offset)
        os.write(self._log, _RECORD.pack(b"W", offset, size) + data)
        return 0, struct.pack("=II", size, 0)

    def _failing(self, step: int) -> int:
        code, after = struct.unpack_from("=II", self._control)
        if code and after:
            struct.pack_into("=I", self._control, 4, after - step)
            return 0
        return int(code)
