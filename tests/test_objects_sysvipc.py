"""System V IPC comes back with its ids, owners and contents."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from pathlib import Path

import msgspec

from podtree.kernel.namespaces import Clone, unshare
from podtree.kernel.pidfd import pidfd_open
from podtree.kernel.sys import NR, syscall
from podtree.objects import sysvipc
from podtree.objects.contents import Contents
from podtree.objects.context import CollectContext, FrozenProcess, RestoreContext
from podtree.objects.sysvipc import IpcState
from socketcell import child, join

IPC_CREAT = 0o1000
BIG = 3 * 4096 + 5
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p


def attach(number: int) -> int:
    return syscall(NR.shmat, number, 0, 0)


def make() -> dict[str, int]:
    """Objects with gaps between their ids; the process stays attached to one segment."""
    ids = {}
    for number in range(3):
        ids[f"gone{number}"] = syscall(NR.shmget, 0, 100, IPC_CREAT | 0o600)
    ids["attached"] = syscall(NR.shmget, 0x1234, BIG, IPC_CREAT | 0o640)
    ids["idle"] = syscall(NR.shmget, 0x7FFFFFF0, 4096, IPC_CREAT | 0o600)
    ids["doomed"] = syscall(NR.shmget, 0, 8192, IPC_CREAT | 0o600)
    for number in range(3):
        syscall(NR.shmctl, ids.pop(f"gone{number}"), 0, None)
    for name, size in (("attached", BIG), ("idle", 4096), ("doomed", 8192)):
        address = attach(ids[name])
        ctypes.memmove(address, (name.encode() * 10000)[:size], size)
        if name == "idle":
            syscall(NR.shmdt, address)
    syscall(NR.shmctl, ids["doomed"], 0, None)
    os.setresgid(70, 71, 0)
    os.setresuid(60, 61, 0)
    ids["sem"] = syscall(NR.semget, 0x55, 3, IPC_CREAT | 0o666)
    ids["fresh"] = syscall(NR.semget, 0, 1, IPC_CREAT | 0o600)
    ids["msg"] = syscall(NR.msgget, 0x66, IPC_CREAT | 0o620)
    os.setresuid(0, 0, 0)
    os.setresgid(0, 0, 0)
    syscall(NR.semctl, ids["sem"], 0, 17, struct.pack("3H", 0, 7, 32767))
    syscall(NR.semop, ids["sem"], struct.pack("Hhh", 1, -2, 0), 1)
    for kind, data in ((5, b"first"), (1, b""), (9, b"x" * 5000)):
        syscall(NR.msgsnd, ids["msg"], struct.pack("q", kind) + data, len(data), 0)
    return ids


def inspect(ids: dict[str, int], doomed_attached: bool) -> None:
    assert syscall(NR.shmget, 0x1234, BIG, 0) == ids["attached"]
    assert syscall(NR.shmget, 0x7FFFFFF0, 0, 0) == ids["idle"]
    for name, size in (("attached", BIG), ("idle", 4096), ("doomed", 8192)):
        address = attach(ids[name])
        assert ctypes.string_at(address, size) == (name.encode() * 10000)[:size]
        if name != "doomed" or doomed_attached:
            syscall(NR.shmdt, address)
    assert syscall(NR.semget, 0x55, 3, 0) == ids["sem"] and syscall(NR.msgget, 0x66, 0) == ids["msg"]
    values = ctypes.create_string_buffer(6)
    syscall(NR.semctl, ids["sem"], 0, 13, values)
    assert struct.unpack("3H", values.raw) == (0, 5, 32767)
    rows = {row["semid"]: row for row in sysvipc._table("sem")}
    assert rows[ids["sem"]]["otime"] and not rows[ids["fresh"]]["otime"]
    assert (rows[ids["sem"]]["cuid"], rows[ids["sem"]]["cgid"], rows[ids["sem"]]["perms"]) == (61, 71, 0o666)
    row = sysvipc._table("msg")[0]
    assert (row["cuid"], row["uid"], row["perms"], row["qnum"]) == (61, 61, 0o620, 3)
    buffer = ctypes.create_string_buffer(8 + 8192)
    for kind, data in ((5, b"first"), (1, b""), (9, b"x" * 5000)):
        size = syscall(NR.msgrcv, ids["msg"], buffer, 8192, 0, 0)
        assert (int.from_bytes(buffer.raw[:8], "little"), buffer.raw[8 : 8 + size]) == (kind, data)


def transplanted(image: Path | None) -> None:
    told, tell = os.pipe()
    wait, go = os.pipe()

    def original() -> None:
        os.close(go)
        unshare(Clone.NEWIPC)
        ids = make()
        os.write(tell, msgspec.json.encode(ids))
        os.read(wait, 1)
        inspect(ids, True)

    pid = child(original)
    os.close(wait)
    os.close(tell)
    raw = os.read(told, 1 << 16)
    assert raw
    ids = msgspec.json.decode(raw, type=dict[str, int])
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    root = os.open("/", os.O_PATH)
    pidfd = pidfd_open(pid)
    ctx = CollectContext(root, Path("/"), image or Path("/"), [FrozenProcess(pid, 1, "cell", pidfd)])
    contents = Contents(image) if image else None
    state = sysvipc.collect(ctx, contents)
    image_fd = root
    if image and contents:
        image_fd = os.open(image, os.O_RDONLY)
        contents.write(image_fd)
    assert not ctx.problems
    state = msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=IpcState)
    assert any(segment.contents_key for segment in state.segments) == (image is not None)

    def copy() -> None:
        unshare(Clone.NEWIPC)
        sysvipc.restore(state, RestoreContext(root, root, image_fd, root))
        doomed = attach(ids["doomed"])
        sysvipc.settle(state, os.getpid())
        inspect(ids, True)
        syscall(NR.shmdt, doomed)
        assert ids["doomed"] not in [row["shmid"] for row in sysvipc._table("shm")]

    try:
        join(child(copy), "the copy")
        join(child(copy), "the second copy")
    finally:
        os.kill(pid, signal.SIGCONT)
        os.write(go, b"g")
        for fd in (told, go, root, pidfd):
            os.close(fd)
    join(pid, "the original")


def test_contents_in_the_state() -> None:
    transplanted(None)


def test_contents_in_the_image(tmp_path: Path) -> None:
    transplanted(tmp_path)


def test_empty_namespace() -> None:
    def empty() -> None:
        unshare(Clone.NEWIPC)
        pid = os.getpid()
        ctx = CollectContext(-1, Path("/"), Path("/"), [FrozenProcess(pid, 1, "cell", -1)])
        assert sysvipc.collect(ctx) == IpcState()
        sysvipc.restore(IpcState(), RestoreContext(-1, -1, -1, -1))

    join(child(empty), "the cell")
