"""inotify: what is watched, under which numbers, for what; and that being looked at raises no events."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import struct
import threading
from pathlib import Path

from inpod import case, child, equal, frozen, main, reap, true

libc = ctypes.CDLL(None, use_errno=True)
ACCESS, MODIFY, ATTRIB, CLOSE_WRITE, CLOSE_NOWRITE, OPEN = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20
MOVED_FROM, MOVED_TO, CREATE, DELETE, DELETE_SELF, MOVE_SELF = 0x40, 0x80, 0x100, 0x200, 0x400, 0x800
ALL = 0xFFF
IGNORED, ONLYDIR, DONT_FOLLOW, EXCL_UNLINK = 0x8000, 0x01000000, 0x02000000, 0x04000000
MASK_ADD, ISDIR, ONESHOT = 0x20000000, 0x40000000, 0x80000000


def inotify(flags: int = os.O_NONBLOCK) -> int:
    """A new instance."""
    fd = libc.inotify_init1(flags)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return int(fd)


def watch(fd: int, path: str, mask: int) -> int:
    """The number of a watch."""
    wd = libc.inotify_add_watch(fd, path.encode(), ctypes.c_uint32(mask))
    assert wd >= 0, (path, os.strerror(ctypes.get_errno()))
    return int(wd)


def parsed(data: bytes) -> list[tuple[int, int, str]]:
    """(wd, mask, name) of each event."""
    found = []
    at = 0
    while at < len(data):
        wd, mask, _, length = struct.unpack_from("iIII", data, at)
        found.append((wd, mask, data[at + 16 : at + 16 + length].rstrip(b"\0").decode()))
        at += 16 + length
    return found


def events(fd: int) -> list[tuple[int, int, str]]:
    """All that is there to read."""
    try:
        return parsed(os.read(fd, 65536))
    except BlockingIOError:
        return []


def lines(fd: int) -> list[list[str]]:
    """Numbers and masks as fdinfo tells them."""
    text = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return sorted(
        [word for word in line.split() if word.startswith(("wd:", "mask:"))] for line in text if "wd:" in line
    )


@case
def watches() -> None:
    """Directories, files, links, nodes, of all file systems of the pod: numbers with gaps, masks, flags, events."""
    os.makedirs("tree/below")
    Path("tree/file").write_text("text")
    os.symlink("file", "tree/link")
    os.mkfifo("tree/fifo")
    Path("changed").write_text("old name")
    fd = inotify()
    numbers = [watch(fd, f"/proc/self/fd/{os.open('.', os.O_RDONLY)}", CREATE)]
    doomed = [watch(fd, name, ALL) for name in ("tree/below", "tree/fifo")]
    wanted = [
        ("tree", ALL), ("tree/file", MODIFY | ATTRIB), ("tree/link", ALL | DONT_FOLLOW), ("/etc", CREATE | ONLYDIR),
        ("/etc/passwd", CLOSE_WRITE | ATTRIB), ("/dev/shm", CREATE | EXCL_UNLINK), ("/dev/null", OPEN),
        ("/dev/pts", CREATE), ("/", CREATE | ONESHOT), ("changed", MOVE_SELF | MODIFY),
    ]  # fmt: skip
    numbers += [watch(fd, *one) for one in wanted]
    for wd in doomed:
        libc.inotify_rm_watch(fd, wd)
    os.rename("changed", "moved")
    libc.inotify_add_watch(fd, b"tree/file", ctypes.c_uint32(CLOSE_WRITE | MASK_ADD))
    events(fd)
    before = lines(fd), numbers
    frozen()
    equal("watches", (lines(fd), numbers), before)
    equal("events meanwhile", events(fd), [(numbers[0], CREATE, "go")])
    of = dict(zip([name for name, _ in wanted], numbers[1:], strict=True))
    with open("tree/file", "a") as file:
        file.write("more")
    got = events(fd)
    true(
        f"events of the file: {got}", (of["tree/file"], MODIFY, "") in got and (of["tree/file"], CLOSE_WRITE, "") in got
    )
    true("events of its directory", (of["tree"], MODIFY, "file") in got)
    with open("moved", "a") as file:
        file.write("more")
    equal("a renamed file", events(fd), [(of["changed"], MODIFY, "")])
    Path("/dev/shm/watching-new").touch()
    Path("/etc/watching-new").touch()
    os.chmod("/etc/passwd", 0o644)
    Path("/dev/null").read_bytes()
    Path("/watching-new").touch()
    Path("/watching-new-2").touch()
    got = events(fd)
    for name, mask, text in (
        ("/dev/shm", CREATE, "watching-new"),
        ("/etc", CREATE, "watching-new"),
        ("/etc/passwd", ATTRIB, ""),
        ("/dev/null", OPEN, ""),
        ("/", CREATE, "watching-new"),
        ("/", IGNORED, ""),
    ):
        true(f"event {mask:#x} of {name}: {got}", (of[name], mask, text) in got)
    true("one shot", (of["/"], CREATE, "watching-new-2") not in got)
    os.unlink("tree/link")
    true("a link itself", (of["tree/link"], DELETE_SELF, "") in events(fd))
    true("the next number is a new one", watch(fd, "tree/fifo", ALL) > max(numbers))


@case
def readers() -> None:
    """Somebody is blocked in reading, somebody waits by epoll, edge-triggered; an instance is shared by a child."""
    os.mkdir("one")
    os.mkdir("two")
    blocking, polled = inotify(0), inotify()
    first, second = watch(blocking, "one", CREATE), watch(polled, "two", CREATE | MOVED_FROM | MOVED_TO)
    poll = select.epoll()
    poll.register(polled, select.EPOLLIN | select.EPOLLET)
    got: list[tuple[int, int, str]] = []
    reader = threading.Thread(target=lambda: got.extend(parsed(os.read(blocking, 4096))))
    reader.start()
    ready, tell = os.pipe()

    def body() -> None:
        equal("the child's event", poll.poll(), [(polled, select.EPOLLIN)])
        equal("what it reads", events(polled), [(second, CREATE, "new")])
        os.write(tell, b"x")

    pid = child(body)
    frozen()
    true("somebody is still waiting", reader.is_alive())
    Path("two/new").touch()
    equal("told by the child", os.read(ready, 1), b"x")
    reap(pid)
    Path("one/new").touch()
    reader.join(60)
    equal("read by the waiting thread", got, [(first, CREATE, "new")])
    os.rename("two/new", "two/newer")
    equal("rename", events(polled), [(second, MOVED_FROM, "new"), (second, MOVED_TO, "newer")])


@case
def without_a_name() -> None:
    """What is watched has no name any more: an unlinked file, a removed directory, one of two hard links."""
    Path("gone").write_text("text")
    Path("first").write_text("text")
    os.mkdir("removed")
    gone, directory = os.open("gone", os.O_RDWR), os.open("removed", os.O_RDONLY)
    os.link("first", "second")
    fd = inotify()
    numbers = [watch(fd, name, ALL) for name in ("gone", "removed", "first")]
    for name in ("gone", "first"):
        os.unlink(name)
    os.rmdir("removed")
    events(fd)
    before = lines(fd)
    frozen()
    equal("watches", lines(fd), before)
    equal("events meanwhile", events(fd), [])
    os.pwrite(gone, b"TEXT", 0)
    equal("the unlinked file", events(fd), [(numbers[0], MODIFY, "")])
    os.fchmod(directory, 0o700)
    equal("the removed directory", events(fd), [(numbers[1], ATTRIB | ISDIR, "")])
    os.utime("second")
    equal("the other name", events(fd), [(numbers[2], ATTRIB, "")])
    os.close(gone)
    true("its end", (numbers[0], IGNORED, "") in events(fd))


@case
def undisturbed() -> None:
    """Everything that a checkpoint looks at is watched for everything: nobody is told of it, one-shots don't fire."""
    fd = inotify()
    numbers = {}
    os.mkdir("here")
    for name in ("unlinked", "linked", "mapped", "program"):
        Path("here", name).write_bytes(b"x" * 5000)
    unlinked, linked = (os.open(f"here/{name}", os.O_RDWR) for name in ("unlinked", "linked"))
    area = mmap.mmap(os.open("here/mapped", os.O_RDWR), 5000)
    private = mmap.mmap(os.open("here/program", os.O_RDONLY), 5000, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    os.link("here/linked", "here/stays")
    os.unlink("here/unlinked")
    os.unlink("here/linked")
    Path("/dev/shm/undisturbed").write_bytes(b"x" * 5000)
    os.mkdir("/dev/shm/undisturbed.d")
    once = inotify()
    memory = ("/dev", "/dev/shm", "/dev/shm/undisturbed", "/dev/shm/undisturbed.d")
    for name in ("/", "here", "here/stays", os.path.realpath("/proc/self/exe"), *memory):
        numbers[name] = watch(fd, name, ALL)
        watch(once, name, ALL | ONESHOT)
    watch(fd, f"/proc/self/fd/{unlinked}", ALL)
    before = lines(fd), lines(once)
    frozen()
    equal("events", (events(fd), events(once)), ([], []))
    equal("watches", (lines(fd), lines(once)), before)
    os.read(linked, 10)
    told = [(numbers["here"], ACCESS, "linked"), (numbers["here/stays"], ACCESS, "")]
    equal("what is to be told", sorted(events(fd)), sorted(told))
    true("first of two", events(once))
    del area, private


@case
def unread() -> None:
    """Refused: events that nobody has read yet."""
    fd = inotify()
    wd = watch(fd, ".", CREATE)
    Path("new").touch()
    Path("newer").touch()
    frozen()
    got = events(fd)
    equal("events", got, [(wd, CREATE, "new"), (wd, CREATE, "newer"), (wd, CREATE, "go")])


@case
def directory_notify() -> None:
    """Refused: dnotify, by which a directory's changes send signals."""
    import signal

    told: list[int] = []
    signal.signal(signal.SIGIO, lambda *_: told.append(1))
    os.mkdir("dir")
    fd = os.open("dir", os.O_RDONLY)
    fcntl.fcntl(fd, fcntl.F_NOTIFY, fcntl.DN_CREATE | fcntl.DN_MULTISHOT)
    frozen()
    Path("dir/new").touch()
    true("signal", told)


if __name__ == "__main__":
    main()
