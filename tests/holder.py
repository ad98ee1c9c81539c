"""A small pod-like world for tests of single kernel objects: a real process in a mount namespace with an overlay root
on btrfs holds the objects; they are collected while it is stopped, and restored in another process on a snapshot.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from podtree.kernel import mount
from podtree.kernel.namespaces import Clone, unshare
from podtree.kernel.pidfd import pidfd_open
from podtree.objects import insight
from podtree.objects.contents import Contents
from podtree.objects.context import CollectContext, FrozenProcess, RestoreContext
from podtree.objects.descriptors import Deferred, Fd, FileTable, OpenFile, arm_timers, restore_files
from podtree.objects.mqueue import PosixQueue
from podtree.objects.tmpfs import TmpfsMount, collect_tmpfs, restore_tmpfs

SLOTS = 600
NODES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
Hold = Callable[[], dict[str, Any]]  # runs in the pod; names of descriptors -> numbers, and whatever else


@dataclass
class Saved:
    """What a collection gave, decoded again from its encoded form."""

    files: list[OpenFile]
    fds: dict[int, list[Fd]]
    names: dict[str, Any]
    problems: list[str]
    local: dict[str, int] = field(default_factory=dict)
    tmpfs: list[TmpfsMount] = field(default_factory=list)
    queues: tuple[PosixQueue, ...] = ()

    def of(self, name: str) -> OpenFile:
        """The OpenFile behind the descriptor that the holder gave that name."""
        number = self.names[name]
        ids = [fd.file for fds in self.fds.values() for fd in fds if fd.fd == number]
        return next(f for f in self.files if f.id == ids[0])


class World:
    """One volume with snapshots, and processes in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pool = directory / "pool"
        self.pool.mkdir()
        image = directory / "pool.img"
        with image.open("wb") as file:
            file.truncate(512 << 20)
        run("mkfs.btrfs", "-q", str(image))
        run("mount", "-o", "loop", str(image), str(self.pool))
        self.count = 0
        self.children: list[int] = []
        self.root_fds: list[int] = []
        self.binds: list[tuple[str, str]] = []  # host directory, directory in the pod
        self.volume = self.new_volume(None)

    def new_volume(self, origin: Path | None) -> Path:
        self.count += 1
        volume = self.pool / f"v{self.count}"
        if origin is None:
            run("btrfs", "-q", "subvolume", "create", str(volume))
            for name in ("upper", "work", "image"):
                (volume / name).mkdir()
            (volume / "log").write_text("log\n")
        else:
            run("btrfs", "-q", "subvolume", "snapshot", str(origin), str(volume))
        options: dict[str, str | None] = {
            "lowerdir": "/", "upperdir": f"{volume}/upper", "workdir": f"{volume}/work"
        }  # fmt: skip
        self.root_fds.append(mount.make_mount("overlay", options))
        return volume

    @property
    def root_fd(self) -> int:
        return self.root_fds[-1]

    def enter(self) -> None:
        """In a new child: the pod's root, /dev and /proc around it."""
        unshare(Clone.NEWNS)
        mount.make_private()
        point = self.directory / "root"
        point.mkdir(exist_ok=True)
        target = os.open(point, os.O_PATH | os.O_CLOEXEC)
        mount.attach(mount.clone_tree("", self.root_fd), target)
        os.chdir(point)
        _mount("tmpfs", "dev", "mode=755")
        for name, device in NODES.items():
            os.mknod(f"dev/{name}", 0o020666, os.makedev(*device))
            os.chmod(f"dev/{name}", 0o666)
        os.mkdir("dev/pts")
        os.mkdir("dev/shm")
        _mount("devpts", "dev/pts", "newinstance,ptmxmode=0666,mode=620")
        os.symlink("pts/ptmx", "dev/ptmx")
        _mount("tmpfs", "dev/shm", "mode=1777")
        _mount("proc", "proc", "")
        for source, point in self.binds:
            run("mount", "--bind", source, point)
        mount.pivot_into(os.open(".", os.O_PATH | os.O_CLOEXEC))
        os.chdir("/")

    def spawn(self, work: Callable[[], None], keep: tuple[int, ...] = ()) -> int:
        """A child that enters the world, closes what it inherited but `keep`, works, and stops itself."""
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.setsid()
                self.enter()
                close_others(keep)
                work()
                os.kill(os.getpid(), signal.SIGSTOP)
                status = 0
            except BaseException:
                Path("/failed").write_text(traceback.format_exc())
            finally:
                os._exit(status)
        self.children.append(pid)
        return pid

    def wait_stopped(self, pid: int) -> None:
        """Until the child has stopped itself; AssertionError with its traceback if it ended instead."""
        _, status = os.waitpid(pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            self.children.remove(pid)
            raise AssertionError(self.failure(f"the child ended with status {status}"))

    def failure(self, default: str) -> str:
        for root in reversed(self.root_fds):
            with contextlib.suppress(OSError), open(os.open("failed", os.O_RDONLY, dir_fd=root)) as file:
                return file.read()
        return default

    def read_names(self) -> dict[str, Any]:
        with open(os.open("names.json", os.O_RDONLY, dir_fd=self.root_fd)) as file:
            names: dict[str, Any] = json.load(file)
        return names

    def hold(self, hold: Hold, keep: tuple[int, ...] = ()) -> int:
        """Start a process that holds what `hold` makes, and wait until it has stopped."""

        def work() -> None:
            names = hold()
            Path("/names.json").write_text(json.dumps(names))

        pid = self.spawn(work, keep)
        self.wait_stopped(pid)
        return pid

    def context(self, pids: list[int], **more: Any) -> CollectContext:
        processes = []
        for pid in pids:
            with open(f"/proc/{pid}/comm") as file:
                processes.append(FrozenProcess(pid, pid, file.read().strip(), pidfd_open(pid)))
        (self.volume / "image").mkdir(exist_ok=True)
        return CollectContext(
            root_fd=self.root_fd,
            log_path=self.volume / "log",
            image_dir=self.volume / "image",
            processes=processes,
            **more,
        )

    def collect(self, pids: list[int], **options: Any) -> Saved:
        """Collect from stopped processes, write the contents, snapshot the volume as the new current one."""
        saved = self._collect(pids, **options)
        return self._collect(pids, **options) if saved.problems and insight.prepare() else saved

    def _collect(
        self, pids: list[int], *, local: dict[str, tuple[str, int]] | None = None, tmpfs: tuple[str, ...] = (),
        **more: Any,
    ) -> Saved:  # fmt: skip
        ctx = self.context(pids, **more)
        contents = Contents(ctx.image_dir)
        table = FileTable(ctx, contents)
        fds = {p.pid: table.add_process(p) for p in ctx.processes}
        added = {}
        for name, (path, flags) in (local or {}).items():
            fd = os.open(path, flags | os.O_CLOEXEC)
            added[name] = table.add_local(fd, os.readlink(path))
            os.close(fd)
        mounts = []
        for point in tmpfs:
            fd = os.open(f"/proc/{pids[0]}/root{point}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            mounts.append(collect_tmpfs(point, fd, ctx, contents))
            os.close(fd)
        files, queues = table.finish(), table.queues.named()
        image = os.open(ctx.image_dir, os.O_RDONLY | os.O_DIRECTORY)
        contents.write(image)
        os.close(image)
        names = self.read_names()
        self.volume = self.new_volume(self.volume)
        table.drop_ghosts()
        table.release()
        for process in ctx.processes:
            os.close(process.pidfd)
        files = msgspec.msgpack.decode(msgspec.msgpack.encode(files), type=list[OpenFile])
        return Saved(files, fds, names, [str(p) for p in ctx.problems], added, mounts, queues)

    def restore(
        self, saved: Saved, check: Callable[[dict[str, Any]], None], *, late: Callable[[Deferred], None] | None = None,
        keep: tuple[int, ...] = (), prepare: Callable[[], None] | None = None, **more: Any,
    ) -> int:  # fmt: skip
        """Restore in a new process on the current volume; returns it stopped, with its descriptors as they were.

        When it is continued (`finish`), it runs `check` with the names.
        """
        log = os.open(self.volume / "log", os.O_RDWR)
        image = os.open(self.volume / "image", os.O_RDONLY | os.O_DIRECTORY)

        def work() -> None:
            more.setdefault("host_proc_fd", os.open("/proc", os.O_PATH))
            if prepare:
                prepare()
            ctx = RestoreContext(self.root_fd, log, image, queues=saved.queues, **more)
            for each in saved.tmpfs:
                restore_tmpfs(each, ctx)
            deferred = restore_files(saved.files, ctx, SLOTS)
            arm_timers(saved.files, lambda number: os.dup(SLOTS + number), time.monotonic_ns())
            wanted = {fd.fd: fd for fds in saved.fds.values() for fd in fds}
            mine = [log, image, *self.root_fds]
            for number in range(3, SLOTS):
                if number in mine or number not in wanted:
                    with contextlib.suppress(OSError):
                        os.close(number)
            for fd in wanted.values():
                os.dup2(SLOTS + fd.file, fd.fd, inheritable=not fd.cloexec)
            if late:
                late(deferred)
            if not saved.local:
                os.closerange(SLOTS, deferred.end)
            os.kill(os.getpid(), signal.SIGSTOP)
            check(saved.names)

        pid = self.spawn(work, keep=(log, image, self.root_fd, *keep))
        os.close(log)
        os.close(image)
        self.wait_stopped(pid)
        return pid

    def finish(self, pid: int) -> None:
        """Continue a restored process, let it check, and end it."""
        os.kill(pid, signal.SIGCONT)
        self.wait_stopped(pid)
        self.end(pid)

    def end(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self.children.remove(pid)

    def round_trip(
        self, hold: Hold, check: Callable[[dict[str, Any]], None], *, again: bool = True, **options: Any
    ) -> Saved:
        """Hold, collect, kill, restore, collect again (the same states must come out), check behaviour."""
        pid = self.hold(hold)
        saved = self.collect([pid], **options)
        assert saved.problems == [], saved.problems
        self.end(pid)
        restored = self.restore(saved, check)
        if again:
            second = self.collect([restored], **options)
            assert second.problems == [], second.problems
            differ = [pair for pair in zip(normal(saved), normal(second), strict=True) if pair[0] != pair[1]]
            assert differ == [], f"another state after the restore: {differ}"
        self.finish(restored)
        return saved

    def end_all(self) -> None:
        for pid in list(self.children):
            self.end(pid)

    def close(self) -> None:
        self.end_all()
        for fd in self.root_fds:
            os.close(fd)
        try:
            run("umount", str(self.pool))
        except AssertionError:  # a failed test left descriptors open
            run("umount", "--lazy", str(self.pool))
        shutil.rmtree(self.directory)


def normal(saved: Saved) -> list[Any]:
    """States by descriptor, without what may differ: inode numbers in keys, ids, nanoseconds that went by."""
    by_id = {f.id: f for f in saved.files}
    result = []
    for fd in sorted((fd for fds in saved.fds.values() for fd in fds), key=lambda fd: fd.fd):
        file = by_id[fd.file]
        state = msgspec.to_builtins(file.what)
        for name in ("key", "remaining", "read_ns", "watches", "name", "expires"):
            state.pop(name, None)
        owner = msgspec.to_builtins(file.owner)
        if owner:
            owner.pop("pid"), owner.pop("id")
        locks = [(k.kind, k.write, k.start, k.end) for k in file.locks]
        result.append((fd.fd, fd.cloexec, file.flags, file.pos, state, owner, locks))
    return result


def close_others(keep: tuple[int, ...]) -> None:
    """Close everything but `keep`; 0, 1 and 2 become the pod's /dev/null."""
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    last = 3
    for number in sorted(n for n in keep if n > 2):
        os.closerange(last, number)
        last = number + 1
    os.closerange(last, 65536)


def again(fd: int, flags: int) -> int:
    """A new open file description of the same file."""
    return os.open(f"/proc/self/fd/{fd}", flags)


def _mount(fstype: str, point: str, options: str) -> None:
    run("mount", "-t", fstype, *(["-o", options] if options else []), fstype, point)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    try:
        yield made
    finally:
        made.close()
