"""Images that somebody has changed: brought back right, or refused with a word about why. Never anything else.

No traceback, no hang, nothing left of the attempt, nothing of the host reached, and no more privileges than a pod has.
"""

from __future__ import annotations

import copy
import hashlib
import mmap
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from driver import PROGRAMS, SYSTEM_PYTHON, Podtree, until
from pod_fixtures import status
from podtree.errors import Damaged, PodtreeError, RestoreFailed
from podtree.image import manifest as manifest_file
from podtree.pod import control
from podtree.pool import Pool
from podtree.pool.records import CheckpointId, PodRecord

Image = dict[str, Any]
Edit = Callable[[Image], object]
RANDOM_S = float(os.environ.get("PODTREE_FUZZ_SECONDS", "40"))
FAR = 100_000  # no open file has that number


class Victim:
    """One checkpoint with nearly everything in it; branches of it get their image edited before they are started."""

    def __init__(self, podtree: Podtree, shown: Path, *words: str, options: tuple[str, ...] = ()) -> None:
        """`words`: the program and its arguments, one of tests/programs."""
        self.podtree = podtree
        self.shown = shown
        program, *arguments = words or ("everything.py",)
        pod = podtree.run(
            SYSTEM_PYTHON, PROGRAMS / program, *arguments, name="victim", options=["-v", f"{shown}:/shown", *options]
        )
        pod.wait_log("READY")
        self.checkpoint = CheckpointId(pod.checkpoint())
        podtree("checkpoint", pod.name, "--stop")
        self.pool = Pool.open(podtree.home)
        (shown / "canary").write_text("alive")
        self.before = self.traces()

    def traces(self) -> tuple[object, ...]:
        """What an attempt must not leave: mounts, pods, processes, groups, run directories."""
        mounts = Path("/proc/self/mountinfo").read_text().count(str(self.podtree.home))
        running = [pod.name for pod in self.pool.pods() if pod.is_running]
        return mounts, running, os.listdir(self.podtree.home / "run")

    def payload(self) -> Image:
        """The manifest as plain data."""
        raw = (self.pool.checkpoint_dir(self.checkpoint) / "img" / "manifest").read_bytes()
        image: Image = msgspec.msgpack.decode(raw[len(manifest_file.MAGIC) + manifest_file.SUM_SIZE :])
        return image

    def attempt(self, payload: bytes, look: Callable[[PodRecord], None] | None = None) -> PodtreeError | None:
        """Restore a branch with this manifest in its image; the error, or None: it runs, and `look` has looked."""
        digest = hashlib.blake2b(payload, digest_size=manifest_file.SUM_SIZE).digest()
        return self.attempt_raw(manifest_file.MAGIC + digest + payload, look)

    def attempt_raw(self, raw: bytes, look: Callable[[PodRecord], None] | None = None) -> PodtreeError | None:
        """The same with all bytes of the manifest's file."""
        pod = self.pool.clone_pod(self.checkpoint, None)
        self.podtree.note_pods()
        (self.pool.img_dir(pod.id) / "manifest").write_bytes(raw)
        begun = time.monotonic()
        found: PodtreeError | None = None
        try:
            client, _ = control.start(self.pool, pod, restore=True, spawn=True)
            client.close()
            if look:
                look(self.pool.pod(pod.id))
            control.end_pod(self.pool, self.pool.pod(pod.id))
        except PodtreeError as error:
            found = error
        until(lambda: not self.pool.pod(pod.id).is_running, "the pod has ended")
        until(lambda: self.traces() == self.before, "nothing is left", dump=lambda: f"{self.traces()} {self.before}")
        assert time.monotonic() - begun < 100
        self.pool.remove_pod(pod.id)
        assert (self.shown / "canary").read_text() == "alive"
        return found


@pytest.fixture(scope="module")
def victim(session_podtree: Podtree, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    made = Victim(session_podtree, tmp_path_factory.mktemp("shown"))
    yield made
    made.pool.close()
    session_podtree.remove_all()


def first(image: Image, kind: str) -> Image:
    """The first open file of that kind."""
    return next(file["what"] for file in image["files"] if file["what"]["type"] == kind)


def leader(image: Image) -> Image:
    """Process 1."""
    process: Image = image["processes"][0]
    return process


def thread(image: Image) -> Image:
    """The first thread of process 1."""
    found: Image = leader(image)["threads"][0]
    return found


def vmas(image: Image) -> list[Image]:
    """The mappings of process 1."""
    found: list[Image] = leader(image)["memory"]["vmas"]
    return found


def vma(image: Image) -> Image:
    """The first of them."""
    return vmas(image)[0]


def ring(place: Callable[[Image], int]) -> Edit:
    """Gives process 1 an AIO context there."""

    def edit(image: Image) -> None:
        one = {"start": place(image), "requests": 1, "tail": 0, "prot": 3, "data": bytes(2 * mmap.PAGESIZE)}
        leader(image)["memory"]["rings"] = [one]

    return edit


def queued(image: Image) -> list[Image]:
    """All messages in the queues of unix sockets."""
    return [m for f in image["files"] if f["what"]["type"] == "unix" for m in f["what"].get("queue", ())]


def put(value: object, *path: str | int) -> Edit:
    """Sets what is at a path below process 1."""

    def edit(image: Image) -> None:
        place: Any = leader(image)
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return edit


def file(kind: str, **changes: object) -> Edit:
    """Changes the first open file of that kind."""
    return lambda image: first(image, kind).update(changes)


def scheduled(policy: int, priority: int) -> Edit:
    """Another scheduling policy for process 1."""

    def edit(image: Image) -> None:
        attr = bytearray(thread(image)["scheduling"]["attr"])
        attr[4:8], attr[20:24] = policy.to_bytes(4, "little"), priority.to_bytes(4, "little")
        thread(image)["scheduling"]["attr"] = bytes(attr)

    return edit


def test_unchanged(victim: Victim) -> None:
    """The harness itself: decoded and encoded again, the image is as good as before."""
    assert victim.attempt(msgspec.msgpack.encode(victim.payload())) is None


def user_namespace(image: Image) -> None:
    """Puts process 1 into one, with all capabilities."""
    ids = [[0, 0, 1 << 16]]
    one = {"id": 1, "parent": 0, "owner": 0, "uids": ids, "gids": ids, "setgroups": True}
    image["nesting"] = {"users": [one]}
    leader(image)["member"] = {"user": 1}
    thread(image)["credentials"]["permitted"] = (1 << 41) - 1


MORE_PRIVILEGES: dict[str, Edit] = {
    "a user namespace": user_namespace,
    **{f"capabilities {name}": put((1 << 41) - 1, "threads", 0, "credentials", name)
       for name in ("permitted", "effective", "inheritable", "bounding", "ambient")},
    "CAP_SYS_ADMIN alone": put(1 << 21, "threads", 0, "credentials", "permitted"),
    "real-time": scheduled(1, 50),
    "deadline": scheduled(6, 0),
    "real-time I/O": put(1 << 13, "threads", 0, "scheduling", "io_priority"),
    "may be real-time": put([-1, -1], "limits", "limits", 14),
    "never killed": put(-1000, "limits", "oom_score_adj"),
    # What lies in the slots behind the open files is the engine's: page files, and the host's /proc.
    "a descriptor of the engine's": lambda image: leader(image)["fds"][0].update(file=len(image["files"]) + 2),
    "working directory in the host's /proc": lambda image: leader(image).update(cwd=len(image["files"]) + 2),
    "root in the host's /proc": lambda image: leader(image).update(root=len(image["files"]) + 2),
    "a device": file("device", path="/dev/sda", major=8, minor=0),
    "a device of memory": file("device", path="/dev/mem", major=1, minor=1),
    "a socket to the hypervisor": file("tcp", family=40),
    "a netlink socket of a firewall": file("netlink", protocol=12),
    "files of another directory put back": lambda image: image["tmpfs"][0].update(point="/shown"),
    "files of the root put back": lambda image: image["tmpfs"][0].update(point="/"),
    "a page file elsewhere": put("../../../../etc/shadow", "memory", "pages"),
    "contents elsewhere": file("memory", key="../../../../etc/shadow"),
    "a ghost elsewhere": file("ghost", name="../../log"),
    "the kernel's log": file("proc", path="/proc/kmsg"),
    "a way out of /proc": file("proc", path="/proc/1/root/etc/shadow"),
    "not of /proc": file("proc", path="/etc/shadow"),
    "a setting of the kernel": lambda image: next(f for f in image["files"] if f["what"]["type"] == "proc").update(
        flags=1, what={"type": "proc", "path": "/proc/sys/kernel/core_pattern", "kind": 0o100000}),
    "a namespace elsewhere": file("namespace", name="../../1/root"),
    "a descriptor of the builder's under way": lambda image: [
        m.update(files=[-995 + i for i in range(20)]) for m in queued(image) if m.get("files")],
    "a descriptor of the engine's under way": lambda image: [
        m.update(files=[len(image["files"]) + 2]) for m in queued(image) if m.get("files")],
    "a listener for filters": lambda image: thread(image)["seccomp"]["filters"][0].update(flags=8),
    "strict mode instead": put({"mode": 1, "filters": []}, "threads", 0, "seccomp"),
}  # fmt: skip


@pytest.mark.parametrize("what", MORE_PRIVILEGES)
def test_no_more_privileges(victim: Victim, what: str) -> None:
    image = victim.payload()
    MORE_PRIVILEGES[what](image)
    error = victim.attempt(msgspec.msgpack.encode(image))
    assert isinstance(error, (Damaged, RestoreFailed)), error
    print(error)


@pytest.mark.parametrize("filters", [[], [{"program": b"\x06\0\0\0\0\0\xff\x7f", "flags": 0}]], ids=["none", "another"])
def test_the_pods_filter_comes_first(victim: Victim, filters: list[Image]) -> None:
    """An image without the seccomp filter, or with one that allows all, gets the pods' own below it."""
    image = victim.payload()
    for process in image["processes"]:
        for one in process["threads"]:
            one["seccomp"] = {"mode": 2 if filters else 0, "filters": filters}

    def look(pod: PodRecord) -> None:
        assert pod.init_pid
        of_init = status(pod.init_pid)
        assert (of_init["Seccomp"], of_init["Seccomp_filters"]) == ("2", str(1 + len(filters)))

    assert victim.attempt(msgspec.msgpack.encode(image), look) is None


IMPOSSIBLE: dict[str, Edit] = {
    "no processes": lambda image: image.update(processes=[], zombies=[]),
    "two of one number": lambda image: image["processes"].append(leader(image)),
    "a zombie of a living number": lambda image: image["zombies"][0]["place"].update(pid=1),
    "a cycle": lambda image: image["processes"][1]["place"].update(ppid=image["processes"][1]["place"]["pid"]),
    "no parent": lambda image: image["processes"][1]["place"].update(ppid=77777),
    "process 0": lambda image: image["processes"][1]["place"].update(pid=0),
    "a huge number": lambda image: image["processes"][1]["place"].update(pid=1 << 40),
    "no threads": put([], "threads"),
    "another leader": put(5, "threads", 0, "tid"),
    "a leader that ended and one that lives": put(
        {"comm": b"x", "status": 0, "credentials": {}, "scheduling": {}}, "ended_leader"),
    "memory shared with nobody": put({"memory": 7777}, "shared"),
    "memory shared with itself": put({"memory": 1}, "shared"),
    "descriptors twice, shared": lambda image: image["processes"][1].update(shared={"files": 1}),
    "memory twice, shared": lambda image: image["processes"][1].update(shared={"memory": 1}),
    "handlers without memory": lambda image: image["processes"][1].update(shared={"actions": 1}),
    "a thread's descriptors that aren't there": put([[5, FAR, False]], "threads", 0, "fds"),
    "a thread's directories that aren't there": put({"cwd": FAR, "root": -1, "umask": 0}, "threads", 0, "directories"),
    "an odd descriptor table": put(b"x", "ldt"),
    "a segment of the kernel": put(b"\xff\xff\0\0\0\x9b\xaf\0", "ldt"),
    "impossible rules for memory": put(64, "mdwe"),
    "few registers": put(b"", "threads", 0, "regs"),
    "registers of the kernel": put(b"\xff" * 216, "threads", 0, "regs"),
    "no FPU": put(b"", "threads", 0, "xstate"),
    "a bad FPU": put(b"\xff" * 2696, "threads", 0, "xstate"),
    "a short signal": put([b"x"], "pending"),
    "signal 1000": put([(1000).to_bytes(4, "little") + bytes(124)], "pending"),
    "an action of SIGKILL": put({9: bytes(32)}, "actions", "by_signal"),
    "an action of signal -1": put({-1: bytes(32)}, "actions", "by_signal"),
    "a mapping of the kernel": put((1 << 64) - 4096, "memory", "vmas", 0, "end"),
    "a mapping of everything": lambda image: vma(image).update(start=4096, end=0x7FFFFFFFE000),
    "an empty mapping": lambda image: vma(image).update(end=vma(image)["start"]),
    "a pidfd of nobody": file("pidfd", pid=7777),
    "a watch of nothing": lambda image: first(image, "inotify")["watches"][0].update(file=FAR),
    "a watch of no number": lambda image: first(image, "inotify")["watches"][0].update(wd=0),
    "a watch of a huge number": lambda image: first(image, "inotify")["watches"][0].update(wd=1 << 40),
    "adjustments without end": lambda image: image["ipc"].update(
        semaphores=[{"id": 0, "key": 5, "mode": 0o600, "uid": 0, "gid": 0, "creator": [0, 0, 0, []], "values": [1],
                     "pids": [0], "used": True}], undo=[{"pid": 1, "id": 0, "adjustments": [1 << 62]}]),
    "a ring at no mapping": ring(lambda _: 0x200000),
    "a ring over a mapping": ring(lambda image: vmas(image)[1]["start"]),
    "a ring without contents": lambda image: vma(image).update(kind="aio"),
    "an odd mapping": lambda image: vma(image).update(start=vma(image)["start"] + 1),
    "a mapping twice": lambda image: vmas(image).insert(0, vma(image)),
    "no mappings": put([], "memory", "vmas"),
    "unknown advice": put(["xx"], "memory", "vmas", 0, "advice"),
    "guards all over": put([[0, 1 << 46]], "memory", "guards"),
    "a mapped file that isn't there": lambda image: [each.update(file=FAR) for each in vmas(image)],
    "an executable that isn't there": put(FAR, "exe"),
    "pages of nobody": put("424242", "memory", "pages"),
    "a long auxv": put(bytes(1 << 20), "memory", "layout", "auxv"),
    "a layout of nonsense": put((1 << 64) - 1, "memory", "layout", "start_brk"),
    "few limits": put([], "limits", "limits"),
    "a descriptor twice": lambda image: leader(image)["fds"].append(leader(image)["fds"][0]),
    "a negative descriptor": put(-1, "fds", 0, "fd"),
    "a huge descriptor": put(1 << 31, "fds", 0, "fd"),
    "a large descriptor": put((1 << 30) - 1, "fds", 0, "fd"),
    "one open file twice": lambda image: image["files"].append(image["files"][0]),
    "a negative open file": lambda image: image["files"][0].update(id=-1),
    "a huge open file": lambda image: image["files"][0].update(id=1 << 40),
    "a file that isn't there": file("file", path="/etc/not/there"),
    "a path with a NUL": file("file", path="/etc/\0x"),
    "an empty path": file("file", path=""),
    "a directory as file": file("file", path="/etc"),
    "a FIFO as file": file("file", path="/tmp/fifo"),
    "a ghost that isn't there": file("ghost", name="g77"),
    "a ghost of another size": file("ghost", size=1 << 50),
    "a memory file of another size": file("memory", size=1 << 62),
    "unknown seals": file("memory", seals=1 << 30),
    "an endless epoll": file("epoll", watches=[{"fd": 5, "file": FAR, "events": 1, "data": 0}]),
    "an epoll of itself": lambda image: first(image, "epoll")["watches"][0].update(
        file=next(f["id"] for f in image["files"] if f["what"]["type"] == "epoll")),
    "a timer of no clock": file("timerfd", clock=77),
    "a timer without end": file("timerfd", remaining=1 << 63),
    "a huge event": file("eventfd", count=(1 << 64) - 1),
    "a huge pipe": file("pipe", capacity=1 << 31),
    "a terminal of a huge number": file("pty_master", index=1 << 31),
    "a terminal without a master": file("pty_slave", index=9),
    "odd terminal settings": lambda image: next(
        f["what"]["settings"] for f in image["files"] if f["what"].get("settings")).update(termios2=b""),
    "a port beyond": lambda image: first(image, "tcp")["local"].__setitem__(1, 70000),
    "an address of nowhere": lambda image: first(image, "udp")["local"].__setitem__(0, "no address"),
    "an address of somebody": lambda image: first(image, "udp")["local"].__setitem__(0, "192.0.2.1"),
    "a role of nobody": file("tcp", role="king"),
    "an unknown option": lambda image: first(image, "tcp").update(options={"SO_KING": 1}),
    "an option of another type": lambda image: first(image, "tcp").update(options={"SO_SNDBUF": b"x"}),
    "a connection with itself": lambda image: [
        f["what"].update(peer=f["id"]) for f in image["files"] if f["what"]["type"] == "unix"],
    "segments of huge size": lambda image: image["ipc"]["segments"][0].update(size=1 << 46),
    "segments of no size": lambda image: image["ipc"]["segments"][0].update(size=0),
    "a negative segment": lambda image: image["ipc"]["segments"][0].update(id=-5),
    "a message of no type": lambda image: image["ipc"]["queues"][0]["messages"][0].update(type=-1),
    "a tmpfs entry outside": lambda image: image["tmpfs"][0]["entries"][1].update(path="../outside"),
    "a tmpfs file of huge size": lambda image: [
        e.update(size=1 << 62) for m in image["tmpfs"] for e in m["entries"] if e["kind"] == 0o100000],
    "times beyond": lambda image: image["tmpfs"][0]["entries"][0].update(mtime=1 << 63),
    "a clock beyond": lambda image: image["clock"].update(monotonic_ns=1 << 62),
    "a clock before": lambda image: image["clock"].update(monotonic_ns=-(1 << 62)),
    "a long host name": lambda image: image.update(hostname="x" * 65),
    "a last pid below": lambda image: image.update(last_pid=-1),
    "standard input of nobody": lambda image: image.update(stdio=[]),
    "standard input elsewhere": lambda image: image["stdio"][0].update(name="../../x"),
    "another standard input": lambda image: image["stdio"][0].update(mode="tty"),
    "another machine": lambda image: image.update(machine="aarch64"),
    "another vdso": lambda image: image.update(vdso="0" * 32),
    "another version": lambda image: image.update(version=2),
    "a lock for ever": lambda image: [
        f.update(locks=[{"kind": "flock", "write": True, "start": -1}]) for f in image["files"]],
    "a lock of no kind": lambda image: image["files"][0].update(locks=[{"kind": "king", "write": True}]),
    "an owner of nobody": lambda image: image["files"][0].update(
        owner={"type": 9, "id": 1, "signal": 0, "asynchronous": False, "pid": 1, "fd": 0}),
    "a group of nobody": lambda image: image["processes"][1]["place"].update(pgid=12345, sid=54321),
}  # fmt: skip
#: What may as well be granted: odd, but a kernel can have it.
ODD = (
    "a huge pipe", "a memory file of another size", "a timer without end", "times beyond", "a clock beyond",
    "a group of nobody",
)  # fmt: skip


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_impossible(victim: Victim, what: str) -> None:
    image = victim.payload()
    IMPOSSIBLE[what](image)
    error = victim.attempt(msgspec.msgpack.encode(image))
    assert isinstance(error, (Damaged, RestoreFailed)) or (error is None and what in ODD), error
    print(error)


def test_a_chain_of_many(victim: Victim) -> None:
    """A tree deeper than the interpreter recurses by default, whose processes can't all exist."""
    image = victim.payload()
    pattern = image["processes"][1]
    for number in range(2, 3000):
        one = copy.copy(pattern)
        one["place"] = {**pattern["place"], "pid": 10_000 + number, "ppid": 9_999 + number, "sid": 1, "pgid": 1}
        image["processes"].append(one)
    assert isinstance(victim.attempt(msgspec.msgpack.encode(image)), (Damaged, RestoreFailed))


@pytest.mark.parametrize(
    "raw",
    [b"", b"PODTREE\x01", b"PODTREE\x02" + bytes(100), b"\x93" * 1000],
    ids=["empty", "cut", "newer", "no manifest"],
)
def test_no_manifest(victim: Victim, raw: bytes) -> None:
    assert isinstance(victim.attempt_raw(raw), Damaged)


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc1", b"\xdd\xff\xff\xff\xff", b"\x91" * 100_000, b"\xdf\xff\xff\xff\xff\xa7version"],
    ids=["nothing", "no such byte", "four billion", "deep", "four billion names"],
)
def test_no_message(victim: Victim, payload: bytes) -> None:
    assert isinstance(victim.attempt(payload), Damaged)


# ---- at random


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in plain data."""
    yield path
    if isinstance(value, dict):
        for key, below in value.items():
            yield from places(below, (*path, key))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from places(below, (*path, index))


def replacements(value: Any, chance: random.Random) -> list[Any]:
    """What else might be there: of the same type, mostly."""
    numbers = [-1, 0, 1, 2, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1, -(1 << 63)]
    match value:
        case bool():
            return [not value]
        case int():
            return [*numbers, value + 1, value - 1, value ^ 1 << chance.randrange(48), value << 12 & (1 << 64) - 1]
        case str():
            return [
                "",
                "x",
                "../" * 9 + "etc/passwd",
                "/",
                "/proc/self/root",
                value * 2,
                value + "\0",
                "\0zz",
                "9" * 40,
            ]
        case bytes():
            flipped = bytearray(value or b"x")
            flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
            return [b"", bytes(flipped), value[:-1], value * 3, b"\xff" * len(value), bytes(len(value))]
        case list():
            return [[], value[1:], value + value[:1], value * 3, value[::-1], [None], [[]]]
        case dict():
            return [{}, None, {key: value[key] for key in list(value)[1:]}]
    return [0, "", [], {}, b"", None]


def test_at_random(victim: Victim) -> None:
    """One or a few values replaced, anywhere. PODTREE_SEED repeats a run, PODTREE_FUZZ_SECONDS makes it longer."""
    seed = int(os.environ.get("PODTREE_SEED", time.time_ns() & 0xFFFFFF))
    chance = random.Random(seed)
    whole = victim.payload()
    everywhere = [path for path in places(whole) if path]
    by_name: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for path in everywhere:  # each kind of field equally likely, however many of it there are
        by_name.setdefault(tuple("*" if isinstance(step, int) else step for step in path), []).append(path)
    kinds = sorted(by_name, key=str)
    deadline, count, fine = time.monotonic() + RANDOM_S, 0, 0
    while time.monotonic() < deadline:
        image = copy.deepcopy(whole)
        done = []
        for _ in range(chance.choice([1, 1, 1, 2, 5])):
            path = chance.choice(by_name[chance.choice(kinds)])
            try:
                place: Any = image
                for step in path[:-1]:
                    place = place[step]
                place[path[-1]] = chance.choice(replacements(place[path[-1]], chance))
                done.append((path, place[path[-1]]))
            except (LookupError, TypeError):  # gone with an earlier change
                continue
        count += 1
        error = victim.attempt(msgspec.msgpack.encode(image))
        text = f"PODTREE_SEED={seed}, attempt {count}: {str(done)[:2000]}: {error!r}"
        assert error is None or isinstance(error, (Damaged, RestoreFailed)), text
        fine += error is None
    print(f"PODTREE_SEED={seed}: {count} attempts, {fine} of them ran")
