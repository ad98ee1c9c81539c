"""inotify: watches found again wherever the file went, hushed while the pod is looked at, hostile images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holder import SLOTS, Saved, World, world
from podtree.errors import Damaged
from podtree.kernel import inotify as kernel
from podtree.kernel.fdinfo import read_fdinfo
from podtree.kernel.inotify import Event
from podtree.kernel.pidfd import pidfd_getfd, pidfd_open
from podtree.objects import inotify
from podtree.objects.contents import Contents
from podtree.objects.descriptors import Deferred, FileTable
from podtree.objects.inotify import Inotify, Sleepers, Watch

__all__ = ["world"]
ALL = 0xFFF


def masks(fd: int) -> dict[int, int]:
    """Mask by watch number."""
    lines = (kernel.parse_watch(value) for value in read_fdinfo("self", fd).extra.get("inotify wd", ()))
    return {line.wd: line.mask for line in lines}


@contextlib.contextmanager
def borrowed(pid: int, number: int) -> Iterator[int]:
    """A duplicate of another process's descriptor."""
    pidfd = pidfd_open(pid)
    fd = pidfd_getfd(pidfd, number)
    try:
        yield fd
    finally:
        os.close(fd)
        os.close(pidfd)


def armed(saved: Saved) -> Any:
    """For World.restore: what the engine does when all processes are complete."""

    def late(_: Deferred) -> None:
        instances = [(file.id, file.what) for file in saved.files if isinstance(file.what, Inotify)]
        sleepers = Sleepers(instances, lambda number: os.dup(SLOTS + number))
        os.closerange(SLOTS, SLOTS + len(saved.files))
        sleepers.arm()
        sleepers.close()

    return late


def test_a_file_of_the_lower_layer_that_was_renamed(world: World) -> None:
    """Its handle leads to where it was below; also one in a directory that was renamed."""
    wanted = {"/etc/renamed": Event.MODIFY, "/usr/moved/fstab": Event.ATTRIB, "/usr/moved": Event.CREATE}

    def hold() -> dict[str, Any]:
        fd = kernel.inotify_init(os.O_NONBLOCK)
        os.mkdir("/usr/new")
        Path("/usr/new/fstab").write_text("text")
        for path, mask in (
            ("/etc/services", Event.MODIFY),
            ("/usr/new/fstab", Event.ATTRIB),
            ("/usr/new", Event.CREATE),
        ):
            kernel.add_watch(fd, path, mask)
        os.rename("/etc/services", "/etc/renamed")
        os.rename("/usr/new", "/usr/moved")
        return {"fd": fd}

    pid = world.hold(hold)
    saved = world.collect([pid])
    assert saved.problems == []
    world.end(pid)
    state = saved.of("fd").what
    assert isinstance(state, Inotify) and state.next == 4
    paths = {saved.files[watch.file].what.path: watch.mask for watch in state.watches}  # type: ignore[union-attr]
    assert paths == wanted

    def check(names: dict[str, Any]) -> None:
        assert masks(names["fd"]) == {1: Event.MODIFY, 2: Event.ATTRIB, 3: Event.CREATE}
        Path("/usr/moved/other").touch()
        os.chmod("/usr/moved/fstab", 0o600)
        with open("/etc/renamed", "a") as file:
            file.write("x")
        events = os.read(names["fd"], 4096)
        assert [events[at] for at in (0, 32, 48)] == [3, 2, 1]
        assert kernel.add_watch(names["fd"], "/tmp", ALL) == 4

    world.finish(world.restore(saved, check, late=armed(saved)))


def test_what_a_killed_checkpointer_had_hushed(world: World) -> None:
    """A successor gives watches of named, unlinked and tmpfs files their masks back."""

    def hold() -> dict[str, Any]:
        fd = kernel.inotify_init(os.O_NONBLOCK)
        gone = os.open("/tmp/gone", os.O_RDWR | os.O_CREAT)
        Path("/dev/shm/file").write_text("text")
        for path, mask in (
            ("/tmp", ALL | Event.EXCL_UNLINK),
            ("/tmp/gone", ALL | Event.ONESHOT),
            ("/dev/shm/file", Event.OPEN),
        ):
            kernel.add_watch(fd, path, mask)
        os.unlink("/tmp/gone")
        with contextlib.suppress(BlockingIOError):
            os.read(fd, 4096)
        kernel.add_watch(fd, f"/proc/self/fd/{gone}", ALL | Event.ONESHOT)
        return {"fd": fd, "gone": gone}

    pid = world.hold(hold)
    held: list[str] = []
    ctx = world.context([pid], on_hold=lambda: held.append("hold"), on_let_go=lambda: held.append("let go"))
    table = FileTable(ctx, Contents(ctx.image_dir))
    table.add_process(ctx.processes[0])
    with borrowed(pid, world.read_names()["fd"]) as fd:
        before = masks(fd)
        table.hush()
        assert set(masks(fd).values()) == {0} and held == ["hold"]
        for instance in table.watchers._instances.values():  # whoever had hushed them is no more
            for target in instance.targets.values():
                os.close(target)
        inotify.recover(ctx.image_dir)
        assert masks(fd) == before
        assert not (ctx.image_dir / inotify.JOURNAL).exists()
        inotify.recover(ctx.image_dir)
    table.watchers._hushed = []
    table.watchers._instances.clear()
    table.release()
    world.end(pid)


def test_a_refused_attempt_leaves_no_trace(world: World) -> None:
    """Unread events refuse an instance; they stay, and nothing is added to them by the attempt."""

    def hold() -> dict[str, Any]:
        fd = kernel.inotify_init(os.O_NONBLOCK)
        unlinked = os.open("/tmp/unlinked", os.O_RDWR | os.O_CREAT)
        os.unlink("/tmp/unlinked")
        kernel.add_watch(fd, "/tmp", ALL)
        Path("/tmp/new").mkdir()
        return {"fd": fd, "unlinked": unlinked}

    pid = world.hold(hold)
    names = world.read_names()
    with borrowed(pid, names["fd"]) as fd:
        saved = world.collect([pid])
        assert len(saved.problems) == 1 and "events are unread" in saved.problems[0]
        assert masks(fd) == {1: ALL}
        assert len(os.read(fd, 4096)) == 32
    world.end(pid)


def test_thousands_of_watches(world: World) -> None:
    def hold() -> dict[str, Any]:
        fd = kernel.inotify_init(os.O_NONBLOCK)
        for number in range(2000):
            os.mkdir(f"/tmp/{number}")
            wd = kernel.add_watch(fd, f"/tmp/{number}", Event.CREATE)
            if number % 3:
                kernel.remove_watch(fd, wd)
        with contextlib.suppress(BlockingIOError):
            while os.read(fd, 1 << 20):
                pass
        return {"fd": fd}

    pid = world.hold(hold)
    saved = world.collect([pid])
    assert saved.problems == []
    world.end(pid)

    def check(names: dict[str, Any]) -> None:
        assert masks(names["fd"]) == {number + 1: Event.CREATE for number in range(0, 2000, 3)}
        Path("/tmp/1998/new").touch()
        assert int.from_bytes(os.read(names["fd"], 4096)[:4], "little") == 1999

    world.finish(world.restore(saved, check, late=armed(saved)))


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (Inotify((Watch(1, 77, ALL),)), "not in it"),
        (Inotify((Watch(-1, 0, ALL),)), "impossible"),
        (Inotify((), 1 << 40), "impossible"),
        (Inotify((Watch(1, 0, ALL), Watch(2, 0, ALL))), "came back"),
    ],
)
def test_hostile_images(state: Inotify, text: str) -> None:
    made = inotify.restore(state)
    watched = os.open("/tmp", os.O_PATH)
    with pytest.raises(Damaged, match=text):
        inotify.watch_all([(1, state)], {0: watched, 1: made})
    os.close(watched)
    os.close(made)


def test_masks_of_this_kernel(tmp_path: Path) -> None:
    """What fdinfo shows is what inotify_add_watch(2) takes, flags included; a silent watch is silent."""
    fd = kernel.inotify_init(os.O_NONBLOCK)
    wanted = int(Event.CREATE | Event.EXCL_UNLINK | Event.ONESHOT)
    assert kernel.add_watch(fd, str(tmp_path), wanted) == 1
    assert masks(fd) == {1: wanted}
    kernel.add_watch(fd, str(tmp_path), inotify.SILENT)
    (tmp_path / "new").touch()
    with pytest.raises(BlockingIOError):
        os.read(fd, 4096)
    os.close(fd)
