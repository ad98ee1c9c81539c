"""Doing something as another process would have done it: with its pid, user and groups.

The kernel stamps some objects with who made them: SO_PEERCRED of a unix connection, the credentials of a
queued message, the creator of a System V segment. To restore the stamp, a short-lived child is made with
clone3(set_tid) in the pod's pid namespace; it shares the descriptor table (CLONE_FILES), so what it opens
stays open here. The number of a process that has ended stays in the stamp, and is free for the real one.

This needs the pod's pid 1 to exist already (clone3(2): a pid namespace begins with it). Where it doesn't,
users and groups are right and the pid reads 0 in the pod.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import socket
import struct
from collections.abc import Callable

import msgspec

from podtree.errors import RestoreFailed
from podtree.kernel.fdops import proc_fd
from podtree.kernel.namespaces import Clone, clone_python, setns

PR_SET_SECUREBITS = 28
SECBIT_NO_SETUID_FIXUP = 1 << 2


class Credentials(msgspec.Struct, frozen=True, array_like=True):
    """Who made something. `pid` is a number inside the pod, 0 when it is not known."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def pids_available() -> bool:
    """Whether children of this process go into a pid namespace that is not its own and has its pid 1."""
    proc = proc_fd()
    try:
        return os.readlink("self/ns/pid_for_children", dir_fd=proc) != os.readlink("self/ns/pid", dir_fd=proc)
    except OSError:  # ENOENT: no pid 1 yet
        return False


def ask_inside(init_host_pid: int, ask: Callable[[], bytes]) -> bytes:
    """What `ask` returns in a process of the pod's pid namespace: calls that give pids give the pod's there.

    Only such a process is told the pids of processes that have ended. A short-lived one is put there: some
    milliseconds, hence for what nothing else tells. OSError if that can't be.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    helper = os.fork()
    if helper == 0:
        try:
            with open(f"/proc/{init_host_pid}/ns/pid") as namespace:
                setns(namespace.fileno(), Clone.NEWPID)
            inside = os.fork()
            if inside == 0:
                os.write(writing, b"+")
                answer = ask()
                while answer:
                    answer = answer[os.write(writing, answer) :]
            else:
                os.waitpid(inside, 0)
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        raw = file.read()
    os.waitpid(helper, 0)
    if not raw:
        raise OSError(errno.ESRCH, "no process could be put into the pod's pid namespace")
    return raw[1:]


def peer_pids(init_host_pid: int, fds: list[int]) -> list[int]:
    """The pids of SO_PEERCRED of unix sockets, as the pod sees them, also those of processes that have ended."""

    def ask() -> bytes:
        pids = b""
        for fd in fds:
            with socket.socket(fileno=os.dup(fd)) as sock:
                pids += sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4]
        return pids

    return list(struct.unpack(f"{len(fds)}i", ask_inside(init_host_pid, ask)))


def run_as(who: Credentials | None, work: Callable[[], list[int]]) -> list[int]:
    """Run `work` as `who` and return what it returns; descriptors that it leaves open stay open here.

    `work` must return soon, and must not drop Python objects that own descriptors of the caller. Raises
    RestoreFailed with the text of what went wrong in there.
    """
    if who is None or (not who.pid and (who.uid, who.gid, who.groups) == _own()):
        return work()
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    enabled = gc.isenabled()
    gc.disable()  # a collection in the child would close the caller's descriptors in the shared table
    try:
        with_pid = who.pid > 0 and pids_available()
        try:
            child = clone_python(Clone.FILES, (who.pid,) if with_pid else ())
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
            child = clone_python(Clone.FILES)  # the number belongs to a living process
        if child == 0:
            _child(who, work, writing)
        _, status = os.waitpid(child, 0)
        answer = os.read(reading, 1 << 16) if status == 0 else b""
        if not answer:
            raise RestoreFailed(f"the process acting as user {who.uid} ended with status {status:#x}")
        result, problem = msgspec.json.decode(answer, type=tuple[list[int], str])
        if problem:
            raise RestoreFailed(f"as user {who.uid}, group {who.gid}: {problem}")
        return result
    finally:
        if enabled:
            gc.enable()
        os.close(reading)
        os.close(writing)


def _own() -> tuple[int, int, tuple[int, ...]]:
    return os.geteuid(), os.getegid(), tuple(os.getgroups())


def _child(who: Credentials, work: Callable[[], list[int]], writing: int) -> None:
    result: list[int] = []
    problem = ""
    try:
        # Capabilities stay through the change of user: only the stamp is wanted.
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0)
        os.setgroups(list(who.groups))
        os.setresgid(who.gid, who.gid, who.gid)
        os.setresuid(who.uid, who.uid, who.uid)
        result = work()
    except BaseException as error:  # whatever it is, the parent must hear of it
        problem = f"{type(error).__name__}: {error}"
    try:
        os.write(writing, msgspec.json.encode((result, problem)))
    finally:
        os._exit(0)
