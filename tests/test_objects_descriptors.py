"""The hub: sharing of descriptions, numbers, owners, refusals, hostile images."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

from holder import SLOTS, World, again, world
from podtree.errors import Damaged, RestoreFailed
from podtree.kernel import fdops
from podtree.objects.context import RestoreContext
from podtree.objects.descriptors import OpenFile, Owner, restore_files
from podtree.objects.devices import Device
from podtree.objects.epoll import Epoll, Watch
from podtree.objects.eventfd import EventFd

__all__ = ["world"]


def test_descriptions_shared_between_processes(world: World) -> None:
    def hold() -> dict[str, Any]:
        shared = os.open("/tmp/shared", os.O_RDWR | os.O_CREAT)
        os.write(shared, b"0123456789")
        own = again(shared, os.O_RDONLY)
        child = os.fork()
        if child == 0:
            os.dup2(shared, 2000)
            os.close(own)
            os.open("/tmp/shared", os.O_RDONLY)  # as `own`, yet another description
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(0)
        os.waitpid(child, os.WUNTRACED)
        return {"shared": shared, "own": own, "child": child, "dup": os.dup(shared)}

    pid = world.hold(hold)
    child = world.read_names()["child"]
    saved = world.collect([pid, child])
    os.kill(child, signal.SIGKILL)
    assert saved.problems == []
    names = saved.names
    parents, childs = ({fd.fd: fd for fd in saved.fds[p]} for p in (pid, child))
    assert parents[names["shared"]].file == parents[names["dup"]].file == childs[2000].file
    assert childs[names["own"]].file != parents[names["own"]].file
    assert len(saved.files) == 4  # /dev/null, shared, own, and the child's own
    assert not childs[2000].cloexec
    world.end(pid)


def test_hundreds_of_equal_files_are_told_apart(world: World) -> None:
    def hold() -> dict[str, Any]:
        opened = [os.open("/tmp", os.O_RDONLY) for _ in range(200)]
        copies = [os.dup(fd) for fd in opened]
        return {"opened": opened, "copies": copies}

    pid = world.hold(hold)
    saved = world.collect([pid])
    by_number = {fd.fd: fd.file for fd in saved.fds[pid]}
    names = saved.names
    assert len(saved.files) == 201
    for a, b in zip(names["opened"], names["copies"], strict=True):
        assert by_number[a] == by_number[b]
    assert [f.id for f in saved.files] == list(range(201))


def test_owner_and_signal(world: World) -> None:
    def hold() -> dict[str, Any]:
        reader, writer = os.pipe()
        fcntl.fcntl(reader, fdops.F_SETSIG, signal.SIGRTMIN + 1)
        fcntl.fcntl(reader, fdops.F_SETOWN_EX, struct.pack("ii", fdops.OwnerType.PID, os.getpid()))
        fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
        return {"r": reader, "w": writer}

    pid = world.hold(hold)
    saved = world.collect([pid])
    assert saved.problems == []
    owner = saved.of("r").owner
    assert owner == Owner(1, pid, signal.SIGRTMIN + 1, True, pid, saved.names["r"])
    assert saved.of("w").owner is None
    world.end(pid)

    def late(deferred: Any) -> None:
        ((file, deferred_owner),) = deferred.owners
        assert (file, deferred_owner) == (saved.of("r").id, owner)

    def check(names: dict[str, Any]) -> None:
        assert fcntl.fcntl(names["r"], fcntl.F_GETFL) & os.O_NONBLOCK

    world.finish(world.restore(saved, check, late=late))


def test_what_is_refused_is_named(world: World) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def hold() -> dict[str, Any]:
        made = {"fanotify": libc.fanotify_init(0, 0), "pidfd": os.pidfd_open(1)}
        made["lease"] = os.open("/tmp/leased", os.O_RDONLY | os.O_CREAT)
        fcntl.fcntl(made["lease"], fcntl.F_SETLEASE, fcntl.F_RDLCK)
        made["io_uring"] = libc.syscall(425, 4, ctypes.create_string_buffer(120))
        return made

    pid = world.hold(hold)
    saved = world.collect([pid])
    text = "\n".join(saved.problems)
    for name, number in saved.names.items():
        if number >= 0:  # io_uring may be switched off on this machine
            assert f"fd {number} (" in text, name
    assert "fanotify can't be saved" in text
    assert "is of a process outside of the pod" in text
    assert "a lease (fcntl F_SETLEASE) is on it" in text
    assert all(f"process {pid} (" in p for p in saved.problems)


def test_dry_run_writes_nothing(world: World) -> None:
    def hold() -> dict[str, Any]:
        fd = os.open("/tmp/gone", os.O_RDWR | os.O_CREAT)
        os.unlink("/tmp/gone")
        return {"fd": fd}

    pid = world.hold(hold)
    saved = world.collect([pid], dry_run=True)
    assert saved.problems == []
    with pytest.raises(FileNotFoundError):
        os.stat(".podtree", dir_fd=world.root_fds[0])


@contextlib.contextmanager
def in_a_child() -> Any:
    """Run the body in a forked child; its exception is raised here (by type name and text)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        with open(reader) as file:
            said = file.read()
        os.waitpid(pid, 0)
        kinds = {"Damaged": Damaged, "RestoreFailed": RestoreFailed}
        name, _, text = said.partition(":")
        raise kinds.get(name, AssertionError)(text)
    try:
        yield
        os.write(writer, b"none:")
    except BaseException as error:
        os.write(writer, f"{type(error).__name__}:{error}".encode())
    finally:
        os._exit(0)


@pytest.mark.parametrize(
    ("entries", "error", "text"),
    [
        ([OpenFile(-1, 0, 0, EventFd(0, False))], Damaged, "impossible numbers"),
        ([OpenFile(1 << 40, 0, 0, EventFd(0, False))], Damaged, "impossible numbers"),
        ([OpenFile(1, 0, 0, EventFd(0, False))] * 2, Damaged, "impossible numbers"),
        ([OpenFile(0, os.O_RDWR, 0, Epoll((Watch(5, 77, 1, 0),)))], Damaged, "not in it"),
        ([OpenFile(0, 0, 0, Device("/dev/mem", 1, 1))], RestoreFailed, "not allowed"),
        ([OpenFile(0, os.O_WRONLY, 0, EventFd(0, False))], RestoreFailed, "flags"),
    ],
)
def test_hostile_images(tmp_path: Path, entries: list[OpenFile], error: type[Exception], text: str) -> None:
    root = os.open(tmp_path, os.O_RDONLY)
    entries = msgspec.msgpack.decode(msgspec.msgpack.encode(entries), type=list[OpenFile])

    def attempt() -> None:
        with in_a_child():
            restore_files(entries, RestoreContext(root, -1, -1, -1), SLOTS)

    with pytest.raises(error, match=text):
        attempt()
    os.close(root)
