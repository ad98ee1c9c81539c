"""What is shared with the outside of a pod: refused by name, or cut off in a branch, or kept (`--external`)."""

from __future__ import annotations

import json
import os
import pty
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from driver import PROGRAMS, SYSTEM_PYTHON, Pod, Podtree, until

EVERYTHING = {
    "/shown/file": "is open for writing",
    "/outside)": "was opened outside of the pod's mounts",
    "fifo": "a FIFO on a file system that the pod shares",
    "(pipe:": "end is held by a process outside",
    "/dev/pts/": "its master side is held by a process outside",
    "(socket:": "its other end is not held by any process of the pod",
}


class Server:
    """What there is outside."""

    def __init__(self, top: Path) -> None:
        self.dir = top / "dir"
        self.dir.mkdir(mode=0o777)
        self.file, self.private = self.dir / "file", top / "outside"
        self.file.write_text("0123")
        self.private.write_text("private")
        os.mkfifo(self.dir / "fifo", 0o666)
        self.fifo = os.open(self.dir / "fifo", os.O_RDWR | os.O_NONBLOCK)
        self.listener, self.busy = self._listener("server"), self._listener("busy")
        self.log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.log.bind(str(self.dir / "log"))
        self.mine: list[socket.socket] = []
        self.fds: list[int] = [self.fifo]

    def _listener(self, name: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(str(self.dir / name))
        sock.listen()
        return sock

    def serve(self) -> None:
        """Give the pod's program what it asks for."""
        conn = self.listener.accept()[0]
        pipes, (master, slave) = [*os.pipe(), *os.pipe()], pty.openpty()
        os.write(pipes[1], b"unread")
        file = os.open(self.private, os.O_RDWR)
        socket.send_fds(conn, [b"!"], [pipes[0], pipes[3], slave, file])
        conn.send(b"unread")
        for fd in (pipes[0], pipes[3], slave, file):
            os.close(fd)
        self.mine.append(conn)
        self.fds += [pipes[1], pipes[2], master]

    def call(self, data: bytes) -> None:
        """Be a client of the pod's."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(self.dir / "served"))
        sock.send(data)
        self.mine.append(sock)

    def close(self) -> None:
        for sock in (*self.mine, self.listener, self.busy, self.log):
            sock.close()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.close()


def begin(podtree: Podtree, server: Server, case: str, *options: str) -> Pod:
    words = [SYSTEM_PYTHON, PROGRAMS / "outside.py", case]
    return podtree.run(*words, name=case, options=["-v", f"{server.dir}:/shown", *options])


def let_go(pod: Pod) -> str:
    """What the program says of what it finds."""
    pod.exec("touch", "/go")
    log = pod.wait_log("END")
    assert pod.wait() == 0, log
    return log[log.rindex("READY") + 6 :]


def problems(podtree: Podtree, *words: str) -> list[dict[str, str]]:
    return list(json.loads(podtree(*words, "--json", code=3).out)["problems"])


def test_all_kinds_cut_off(podtree: Podtree, server: Server) -> None:
    pod = begin(podtree, server, "cut")
    server.serve()
    pod.wait_log("SERVED")
    server.call(b"call")
    pod.wait_log("READY")
    server.call(b"late")
    for verb in ("check", "checkpoint"):
        found = problems(podtree, verb, pod.name)
        for what, why in EVERYTHING.items():
            mine = [p for p in found if what in p["object"] and why in p["reason"]]
            assert mine and all("--external close: a branch" in p["hint"] for p in mine), (what, found)
        assert any("bound to /shown/served" in p["reason"] for p in found), found
        assert any("waits to be accepted whose client" in p["reason"] for p in found), found
    kept = {p["object"] for p in problems(podtree, "check", pod.name, "--external", "keep")}
    assert any("pipe:" in name for name in kept) and not any("/shown/file" in name for name in kept), kept
    podtree("check", pod.name, "--external", "close")
    branch = podtree.branch(pod.checkpoint("--external", "close"))
    again = podtree.branch(branch.checkpoint())  # nothing of it is external any more
    for one in (branch, again):
        assert let_go(one).splitlines() == [
            "stream b'unread' b'' BrokenPipeError",
            "waiting b''",
            "log ConnectionRefusedError",
            "reading b'unread' b''",
            "writing BrokenPipeError",
            "terminal b'' Input/output error",
            "file b'private' 6",
            "fifo b'mine'",
            "shown b'23' 6 b'branch'",
            "client b'call' b''",
            "late b'late' b''",
            "END",
        ]
    assert (server.file.read_text(), server.private.read_text()) == ("0123", "private")
    assert os.read(server.fifo, 100) == b"mine"


def test_names_are_found_again(podtree: Podtree, server: Server) -> None:
    pod = begin(podtree, server, "again", "--external", "keep")
    server.mine.append(server.busy.accept()[0])
    pod.wait_log("READY")
    assert "--external close" in problems(podtree, "check", pod.name, "--external", "refuse")[0]["hint"]
    podtree("check", pod.name)
    branch = podtree.branch(pod.checkpoint())
    server.mine.append(server.busy.accept()[0])
    let_go(branch)
    assert server.mine[-1].recv(100) == b"here"
    assert server.log.recv(100) == b"here" and os.read(server.fifo, 100) == b"here"
    assert server.file.read_text() == "0123here"
    os.unlink(server.dir / "busy")
    failed = podtree("branch", f"{pod.name}@1", code=8)
    assert "/shown/busy" in failed.err and "--external close" in failed.err, failed
    server.mine[0].send(b"unread")  # it could not be had again
    until(lambda: "(socket:" in problems(podtree, "check", pod.name)[0]["object"], "it is refused")
    assert podtree("check", pod.name, "--external", "nonsense", code=2).err.count("keep") == 1


def test_recorder_has_its_own_answer(podtree: Podtree, server: Server) -> None:
    pod = podtree.run("sh", "-c", "exec 9<>/shown/file; while :; do :; done", options=["-v", f"{server.dir}:/shown"])
    podtree("record", pod.name, "--every", "100ms")
    until(lambda: "is open for writing" in (podtree.json("record", pod.name)["error"] or ""), "it is refused")
    podtree("record", pod.name, "--every", "100ms", "--external", "close")
    until(lambda: podtree.json("record", pod.name)["taken"], "a checkpoint is taken")
    podtree("record", pod.name, "--off")
