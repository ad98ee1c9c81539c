"""Memory that comes in while the branch runs: what is still to come, and who may die meanwhile."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver import SYSTEM_PYTHON, Pod, Podtree, until
from pod_fixtures import parent, status, supervisor_of, writable
from podtree.kernel.sys import PAGE_SIZE
from podtree.objects.memory import Vma, VmaKind
from podtree.restore import pager
from podtree.restore.pager import CHUNK, Missing, Piece

PROGRAM = """
import hashlib, os, sys, time
def part(i): return hashlib.sha256(b"%d" % i).digest() * 2048
parts = [bytearray(part(i)) for i in range(512)]  # 32 MiB, each mapped by itself or in the heap
print("READY", flush=True)
while not os.path.exists("/srv/go"): time.sleep(0.01)
pid = os.fork()
if pid == 0: os._exit(any(p != part(i) for i, p in enumerate(parts)))
parts[7] = bytearray(b"changed")
wrong = [i for i, p in enumerate(parts) if i != 7 and p != part(i)]
print("OK" if not wrong and os.waitpid(pid, 0)[1] == 0 else f"BAD {wrong}", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def slowly(podtree: Podtree, monkeypatch: pytest.MonkeyPatch) -> Iterator[Podtree]:
    """All memory comes in while the branch runs, over ten seconds."""
    monkeypatch.setitem(podtree.env, "PODTREE_LAZY_BYTES", "1")
    monkeypatch.setitem(podtree.env, "PODTREE_LAZY_PACE_MS", "40")
    yield podtree


@pytest.fixture
def hardly(slowly: Podtree, monkeypatch: pytest.MonkeyPatch) -> Iterator[Podtree]:
    """Memory that nobody touches takes minutes to come."""
    monkeypatch.setitem(slowly.env, "PODTREE_LAZY_PACE_MS", "1000")
    yield slowly


def start(podtree: Podtree) -> Pod:
    pod = podtree.run(SYSTEM_PYTHON, "-c", PROGRAM, name="big")
    pod.wait_log("READY", 60)
    return pod


def pager_of(pod: Pod) -> int:
    """Host pid of its pager: a child of its supervisor, or of the keeper when that was killed."""
    family = {supervisor_of(pod), parent(supervisor_of(pod))}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                found = status(int(name))
            except OSError:
                continue
            if found["Name"] == "podtree-pager" and int(found["PPid"]) in family:
                return int(name)
    raise AssertionError(f"{pod.name} has no pager: its memory is there already")


def verify(pod: Pod) -> None:
    pod.sh("touch /srv/go")
    pod.wait_log("OK", 60)


def test_runs_checks_and_is_saved_while_it_fills(slowly: Podtree) -> None:
    """The branch runs before its memory is there; a checkpoint waits for all of it."""
    ref = start(slowly).checkpoint()
    branch = slowly.branch(ref)
    pager_of(branch)
    again = slowly.branch(branch.checkpoint())
    with pytest.raises(AssertionError, match="has no pager"):
        pager_of(branch)
    assert not any("userfaultfd" in line for line in branch.sh("ls -l /proc/1/fd").splitlines())
    verify(branch)
    verify(again)


def test_supervisor_dies_while_it_fills(slowly: Podtree) -> None:
    branch = slowly.branch(start(slowly).checkpoint())
    pager_of(branch)
    os.kill(supervisor_of(branch), signal.SIGKILL)
    verify(branch)
    assert not any("userfaultfd" in line for line in branch.sh("ls -l /proc/1/fd").splitlines())
    branch.checkpoint()


def test_rewound_while_it_fills(slowly: Podtree) -> None:
    """The pager of before is forgotten: a supervisor that comes later doesn't wait for it, or end the pod."""
    pod = start(slowly)
    ref = pod.checkpoint()
    for _ in range(2):
        slowly("rewind", pod.name, ref)
        pager_of(pod)
    os.kill(supervisor_of(pod), signal.SIGKILL)
    verify(pod)
    pod.checkpoint()
    run = slowly.home / "run" / pod.info()["id"]
    assert not [entry for entry in run.iterdir() if entry.name.startswith(pager.FILE)]


@pytest.mark.parametrize("orphaned", [False, True])
def test_pager_dies_while_it_fills(hardly: Podtree, orphaned: bool) -> None:
    """The pod can't go on, and doesn't: nobody reads zeros where there was something."""
    branch = hardly.branch(start(hardly).checkpoint())
    victim = pager_of(branch)
    if orphaned:
        os.kill(supervisor_of(branch), signal.SIGKILL)
    os.kill(victim, signal.SIGKILL)
    assert branch.wait() == 137
    assert "OK" not in branch.logs()


DAMAGED = """
import ctypes, mmap, os, time
area = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area[:] = bytes([7]) * len(area)
print("AT", ctypes.addressof(ctypes.c_char.from_buffer(area)) + (3 << 20), flush=True)
while not os.path.exists("/srv/go"): time.sleep(0.01)
print("READ", area[3 << 20], flush=True)
time.sleep(1000)
"""


RESTARTABLE = """
import ctypes, time
libc = ctypes.CDLL(None)
libc.pthread_self.restype = ctypes.c_ulong
print("AT", libc.pthread_self() + ctypes.c_ssize_t.in_dll(libc, "__rseq_offset").value, flush=True)
time.sleep(1000)
"""


def damaged(podtree: Podtree, program: str = DAMAGED) -> str:
    """A checkpoint with a bit flipped where the program says."""
    pod = podtree.run(SYSTEM_PYTHON, "-c", program)
    at = int(pod.wait_log("AT").partition("AT ")[2].split()[0])
    ref = pod.checkpoint()
    image = podtree.home / "pool" / "ckpts" / ref / "img"
    with writable(image), open(image / "mem" / "1", "r+b") as file:
        (byte,) = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte ^ 1]), at)
    return ref


def test_a_damaged_page_is_never_read(hardly: Podtree) -> None:
    """The branch runs already; it is ended when it is about to read the page, and its log says why."""
    branch = hardly.branch(damaged(hardly))
    pager_of(branch)
    branch.sh("touch /srv/go")
    assert branch.wait() == 137
    assert "READ" not in branch.logs() and "of page file mem/1 is damaged: the pod can't go on" in branch.logs()


def test_a_damaged_page_is_found_without_a_supervisor(hardly: Podtree) -> None:
    branch = hardly.branch(damaged(hardly))
    victim = pager_of(branch)
    os.kill(victim, signal.SIGSTOP)
    branch.sh("touch /srv/go")
    os.kill(supervisor_of(branch), signal.SIGKILL)
    os.kill(victim, signal.SIGCONT)
    assert branch.wait() == 137
    assert "READ" not in branch.logs() and "of page file mem/1 is damaged: the pod can't go on" in branch.logs()


def test_a_damaged_page_is_found_though_nobody_reads_it(slowly: Podtree) -> None:
    """In the background: when the branch runs already, or before, which is a matter of how fast it is restored."""
    done = slowly("branch", damaged(slowly), "--name", "branch", code=None)
    if done.code == 0:
        assert slowly("wait", "branch", code=None).out.strip() == "137"
        done = slowly("logs", "branch")
    else:
        assert done.code == 8
    assert "of page file mem/1 is damaged: the pod can't go on" in done.out + done.err


def test_a_damaged_page_that_the_restore_itself_needs(hardly: Podtree) -> None:
    """The kernel looks at a thread's restartable sequence when that is registered, which waits for the pager."""
    done = hardly("branch", damaged(hardly, RESTARTABLE), code=8)
    assert "of page file mem/1 is damaged: the pod can't go on" in done.err
    assert len(hardly.pods()) == 1


def test_removed_while_it_fills(hardly: Podtree) -> None:
    branch = hardly.branch(start(hardly).checkpoint())
    victim = pager_of(branch)
    branch.kill()
    assert branch.wait() == 137
    until(lambda: not Path(f"/proc/{victim}").exists(), "the pager is gone")


def test_what_nobody_touches_waits_while_memory_is_short(podtree: Podtree, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes when it is touched, or when a checkpoint needs all of it."""
    monkeypatch.setitem(podtree.env, "PODTREE_LAZY_BYTES", "1")
    monkeypatch.setitem(podtree.env, "PODTREE_LAZY_RESERVE", str(1 << 60))
    ref = start(podtree).checkpoint()
    branch, other = podtree.branch(ref), podtree.branch(ref)

    def resident(pod: Pod) -> int:
        return int(status(int(pod.info()["pid"]))["RssAnon"].split()[0]) << 10

    time.sleep(1)
    assert resident(branch) < 24 << 20
    pager_of(branch)
    verify(branch)
    assert resident(other) < 24 << 20
    again = podtree.branch(other.checkpoint())
    assert resident(other) > 32 << 20
    verify(other)
    verify(again)


def test_small_and_special_memory_is_filled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pager, "LEAST_BYTES", 64 * PAGE_SIZE)
    monkeypatch.setattr(pager, "LEAST_VMA_BYTES", 16 * PAGE_SIZE)

    def vma(first: int, last: int, **more: object) -> Vma:
        fields = {"kind": VmaKind.ANON, "prot": 3, **more}
        return Vma(start=first * PAGE_SIZE, end=last * PAGE_SIZE, **fields)  # type: ignore[arg-type]

    large, small, stack = vma(100, 200), vma(300, 310), vma(400, 500, grows_down=True)
    code, locked = vma(600, 700, prot=5), vma(700, 800, locked=True)
    vmas = (large, small, stack, code, locked)
    runs = [(110, 80), (300, 4), (400, 90), (650, 100)]
    now, later, mappings = pager.split(vmas, runs)
    assert now == [(300, 4), (400, 90), (650, 100)]
    assert later == [Piece(110 * PAGE_SIZE, 190 * PAGE_SIZE)]
    assert mappings == [large]
    assert pager.split(vmas, [(110, 40), (300, 4)]) == ([(110, 40), (300, 4)], [], [])


PAGES = 200


@st.composite
def operations(draw: st.DrawFn) -> list[tuple[str, int, int, int]]:
    page = st.integers(0, PAGES - 1)
    kinds = st.sampled_from(["cut", "move", "around", "next"])
    found = []
    for _ in range(draw(st.integers(1, 30))):
        kind, first, other, count = draw(kinds), draw(page), draw(page), draw(st.integers(1, 60))
        if abs(first - other) >= count:  # mremap(2): source and target don't overlap
            found.append((kind, first, other, count))
    return found


@given(st.lists(st.integers(0, PAGES - 1), unique=True), operations())
def test_what_is_missing_is_known(saved: list[int], steps: list[tuple[str, int, int, int]]) -> None:
    """Against a dictionary from page to where its content lies in the page file."""
    model = {page: page for page in saved}
    missing = Missing([Piece(p * PAGE_SIZE, (p + 1) * PAGE_SIZE) for p in saved])

    def taken(piece: Piece) -> None:
        for at in range(piece.start, piece.end, PAGE_SIZE):
            assert model.pop(at // PAGE_SIZE) == (at - piece.moved) // PAGE_SIZE

    for kind, first, other, count in steps:
        if kind == "cut":
            for piece in missing.cut(first * PAGE_SIZE, (first + count) * PAGE_SIZE):
                taken(piece)
            assert not any(first <= page < first + count for page in model)
        elif kind == "move":
            for page in range(other, other + count):
                model.pop(page, None)
            missing.cut(other * PAGE_SIZE, (other + count) * PAGE_SIZE)  # the kernel tells of the target first
            missing.move(first * PAGE_SIZE, other * PAGE_SIZE, count * PAGE_SIZE)
            moved = {page: model.pop(page) for page in list(model) if first <= page < first + count}
            model |= {page - first + other: content for page, content in moved.items()}
        elif kind == "around":
            chunk = missing.around(first * PAGE_SIZE)
            assert (chunk is not None) == (first in model)
            if chunk:
                assert chunk.start <= first * PAGE_SIZE < chunk.end <= chunk.start + CHUNK
                taken(chunk)
        elif missing:
            taken(missing.next_chunk())
    while missing:
        taken(missing.next_chunk())
    assert not model
