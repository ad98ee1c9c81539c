"""Processes of ours that a restore needs as long as it lasts: in namespaces that are made again, or in the pod's.

*Holders* leave for a new user, uts, ipc or net namespace, and stay in it until the processes of the pod have entered.
*Setters* are in a pid namespace of the pod, and say which number the next process there gets.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import struct
from collections.abc import Callable
from typing import NoReturn

from podtree.errors import RestoreFailed
from podtree.kernel.namespaces import Clone, clone_python, loopback_up, setns, unshare
from podtree.kernel.prctl import Prctl, prctl
from podtree.kernel.sys import NR, syscall
from podtree.objects import nesting
from podtree.objects.credentials import PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP
from podtree.objects.nesting import POD, Nesting, Space, UserNamespace
from podtree.pod import wire

SPACE_FLAGS = {"uts": Clone.NEWUTS, "ipc": Clone.NEWIPC, "net": Clone.NEWNET}
LAST_PID = "/proc/sys/kernel/ns_last_pid"


class Holders:
    """Of all namespaces of one image; a context manager in whose scope they are there. `pids`: by id, host's."""

    def __init__(self, image: Nesting) -> None:
        self.image = image
        self.pids: dict[int, int] = {}
        self._stay: list[int] = []

    def __enter__(self) -> Holders:
        try:
            for user in self.image.users:
                self._make_user(user)
            for space in self.image.spaces:
                self.pids[space.id] = self._hold(functools.partial(self._leave_for_space, space))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._stay:
            os.close(fd)
        self._stay.clear()
        while self.pids:
            pid = self.pids.popitem()[1]
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _hold(self, make: Callable[[], None]) -> int:
        """A process that has made something and stays; its pid. Raises RestoreFailed."""
        pid, stay = hold(make)
        self._stay.append(stay)
        return pid

    def _join_user(self, number: int) -> None:
        if number != POD:
            with open(f"/proc/{self.pids[number]}/ns/user") as file:
                setns(file.fileno(), Clone.NEWUSER)

    def _make_user(self, user: UserNamespace) -> None:
        """It belongs to who makes it: that has all capabilities in it (user_namespaces(7))."""
        above = next((u for u in self.image.users if u.id == user.parent), None)

        def leave() -> None:
            syscall(NR.prctl, PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0)
            group = above.gids[0][1] if above and above.gids else 0  # nobody can tell which; one that the parent maps
            os.setresgid(group, group, group)
            os.setresuid(user.owner, user.owner, user.owner)
            self._join_user(user.parent)
            unshare(Clone.NEWUSER)

        self.pids[user.id] = self._hold(leave)
        self._write_maps(user, above)

    def _leave_for_space(self, space: Space) -> None:
        self._join_user(space.user)
        unshare(SPACE_FLAGS[space.kind])
        if space.kind == "uts":
            for number, name in ((NR.sethostname, space.hostname), (NR.setdomainname, space.domainname)):
                data = os.fsencode(name)
                syscall(number, data, len(data))
        if space.loopback:
            loopback_up()

    def _write_maps(self, user: UserNamespace, above: UserNamespace | None) -> None:
        """By a process of the parent namespace, in whose numbers they are told."""
        try:
            uids = nesting.relative_to(user.uids, above.uids if above else None)
            gids = nesting.relative_to(user.gids, above.gids if above else None)
        except ValueError as error:
            raise RestoreFailed(f"a user namespace can't be made: {error}") from error
        pid = self.pids[user.id]

        def write() -> None:
            self._join_user(user.parent)
            if not user.setgroups:
                _write(f"/proc/{pid}/setgroups", "deny")
            for name, ranges in (("gid_map", gids), ("uid_map", uids)):
                if ranges:
                    _write(f"/proc/{pid}/{name}", "".join(f"{a} {b} {c}\n" for a, b, c in ranges))

        writer, stay = hold(write)
        os.close(stay)
        os.waitpid(writer, 0)


class Setter:
    """In the pid namespace of a task (host's number), with the numbers `pids` there and above, innermost first."""

    def __init__(self, tid: int, pids: tuple[int, ...]) -> None:
        command_r, self._command = os.pipe2(os.O_CLOEXEC)
        self._answer, answer_w = os.pipe2(os.O_CLOEXEC)
        helper = os.fork()
        if helper == 0:
            _become_setter(tid, pids, command_r, answer_w)
        os.close(command_r)
        os.close(answer_w)
        os.waitpid(helper, 0)
        self._pid = self._expect()

    def set_last(self, last_pid: int) -> None:
        """The next process of the namespace gets the first free number above. Raises RestoreFailed."""
        os.write(self._command, struct.pack("i", last_pid))
        self._expect()

    def _expect(self) -> int:
        answer = os.read(self._answer, 4)
        if len(answer) != 4:
            raise RestoreFailed("numbers of processes can't be chosen in a pid namespace that was made inside")
        return int(struct.unpack("i", answer)[0])

    def close(self) -> None:
        """End it."""
        os.close(self._command)
        os.close(self._answer)
        os.waitpid(self._pid, 0)


def _become_setter(tid: int, pids: tuple[int, ...], command_r: int, answer_w: int) -> NoReturn:
    try:
        wire.isolate_child([command_r, answer_w])
        with open(f"/proc/{tid}/ns/pid") as file:
            setns(file.fileno(), Clone.NEWPID)
        child = clone_python(Clone.PARENT, pids)
        if child:
            os.write(answer_w, struct.pack("i", child))
            os._exit(0)
        while command := os.read(command_r, 4):
            (last_pid,) = struct.unpack("i", command)
            _write(LAST_PID, str(last_pid))
            os.write(answer_w, command)
    finally:
        os._exit(0)


def hold(make: Callable[[], None]) -> tuple[int, int]:
    """A process that has made something: its pid, and a descriptor; it stays until that is closed. RestoreFailed."""
    ready_r, ready_w = os.pipe2(os.O_CLOEXEC)
    stay_r, stay_w = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _holder(make, ready_w, stay_r)
    os.close(ready_w)
    os.close(stay_r)
    with open(ready_r, "rb") as file:
        answer = file.read(1 << 16)
    if answer != b"+":
        os.close(stay_w)
        os.waitpid(pid, 0)
        raise RestoreFailed(f"a namespace can't be made: {answer[2:].decode(errors='replace')}")
    return pid, stay_w


def _holder(make: Callable[[], None], ready_w: int, stay_r: int) -> NoReturn:
    try:
        prctl(Prctl.SET_PDEATHSIG, signal.SIGKILL)
        wire.isolate_child([ready_w, stay_r])
        make()
        prctl(Prctl.SET_PDEATHSIG, signal.SIGKILL)  # a change of ids has taken it back
        os.write(ready_w, b"+")
        os.close(ready_w)
        os.read(stay_r, 1)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(ready_w, f"- {error}".encode())
    finally:
        os._exit(0)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
