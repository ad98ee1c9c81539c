"""Namespaces that programs of the pod have made: user namespaces, and the pid, net, ipc and uts ones that those own.

A pod's programs have no CAP_SYS_ADMIN over the pod's own namespaces, so each of these belongs, near or far, to a user
namespace that was made inside. Sources: namespaces(7), user_namespaces(7), pid_namespaces(7), ioctl_nsfs(2).

Ids of users and groups are those of the supervisor's user namespace, which is the pod's, also in id maps.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from podtree.kernel import mount, netstate, nsfs, procfs
from podtree.kernel.mount import MountAttr
from podtree.kernel.namespaces import Clone, loopback_up, setns, unshare
from podtree.objects.context import CollectContext, FrozenProcess

T = TypeVar("T")
Ranges = tuple[tuple[int, int, int], ...]  # of an id map: first inside, first outside, how many

POD_DEPTH = 2  # numbers that NSpid of a process has: the reader's, the pod's; and those of namespaces made inside
POD = 0  # the id of the pod's own namespace of each kind
_FLAGS = {"uts": Clone.NEWUTS, "ipc": Clone.NEWIPC, "net": Clone.NEWNET}


class UserNamespace(msgspec.Struct, frozen=True, kw_only=True):
    """`parent`: id of another, 0: the pod's. `owner`: the user that made it, who has all capabilities in it."""

    id: int
    parent: int
    owner: int
    uids: Ranges
    gids: Ranges
    setgroups: bool  # setgroups(2) is allowed


class PidNamespace(msgspec.Struct, frozen=True, kw_only=True):
    """`parent`: id of another, 0: the pod's. `user`: id of the user namespace that it belongs to."""

    id: int
    parent: int
    user: int
    first: int  # its process 1, as the pod numbers it
    last_pid: int  # given out in it; 0 if unknown


class Space(msgspec.Struct, frozen=True, kw_only=True):
    """A namespace of another kind, "uts", "ipc" (with nothing in it) or "net" (with only the loopback)."""

    id: int
    kind: str
    user: int
    hostname: str = ""
    domainname: str = ""
    loopback: bool = False  # it is up


class Nesting(msgspec.Struct, frozen=True, kw_only=True):
    """All of a pod. An id stands for one namespace of whatever kind."""

    users: tuple[UserNamespace, ...] = ()  # parents first
    pids: tuple[PidNamespace, ...] = ()  # parents first
    spaces: tuple[Space, ...] = ()

    def chain(self, number: int) -> tuple[int, ...]:
        """Ids of a pid namespace and those above it that were made inside, the outermost first."""
        found: tuple[int, ...] = ()
        above = {one.id: one.parent for one in self.pids}
        while number in above and number not in found:
            found = (number, *found)
            number = above[number]
        return found


class Membership(msgspec.Struct, frozen=True, kw_only=True):
    """Ids of the namespaces that a process is in; `children` is the pid namespace that its children will be in."""

    user: int = POD
    uts: int = POD
    ipc: int = POD
    net: int = POD
    pid: int = POD
    children: int = POD


class Inner(msgspec.Struct, frozen=True):
    """The numbers of a process in a pid namespace that was made inside; 0 for a group or session from outside of it."""

    pid: int
    pgid: int
    sid: int


# ----------------------------------------------------------------------------------------------- ids of users


def inside(ranges: Ranges, outer: int) -> int | None:
    """An id as the namespace numbers it; None if it has no number there."""
    for first, below, count in ranges:
        if below <= outer < below + count:
            return first + outer - below
    return None


def relative_to(ranges: Ranges, parent: Ranges | None) -> Ranges:
    """An id map in the parent namespace's numbers; `parent` None: that is the pod's. ValueError if that has none."""
    if parent is None:
        return ranges
    found: list[tuple[int, int, int]] = []
    for first, outer, count in ranges:
        while count:
            within = next(((f, o, n) for f, o, n in parent if o <= outer < o + n), None)
            if within is None:
                raise ValueError(f"id {outer} is not in the parent's map")
            size = min(count, within[1] + within[2] - outer)
            found.append((first, within[0] + outer - within[1], size))
            first, outer, count = first + size, outer + size, count - size
    return tuple(found)


# ----------------------------------------------------------------------------------------------- collect


@dataclass(slots=True)
class Collected:
    """What was found; `members` by the pod's number of the process."""

    nesting: Nesting = field(default_factory=Nesting)
    members: dict[int, Membership] = field(default_factory=dict)

    def of(self, pid: int) -> Membership:
        return self.members.get(pid, Membership())


_KINDS = ("user", "uts", "ipc", "net", "pid", "mnt", "cgroup", "time", "pid_for_children", "time_for_children")
_NAMES = {"mnt": "mount", "pid_for_children": "pid", "time_for_children": "time"}


def collect(living: list[FrozenProcess], ctx: CollectContext, last_pids: dict[int, int]) -> Collected:
    """All namespaces but the pod's own; what can't be saved is named in `ctx`.

    `last_pids`: by the pod's number of a process, what it was told to be the last pid of its pid namespace.
    """
    if not living:
        return Collected()
    seen = {process.pid: _links(process.living, _KINDS) for process in living}
    own = seen[living[0].pid]
    if living[0].pid == 1 and all(links == own for links in seen.values()) and own["user"] == _own_user():
        _refuse_threads(living, seen, ctx)
        return Collected()
    return _Collector(living, ctx, seen, last_pids).collect()


def _own_user() -> str:
    return os.readlink("/proc/self/ns/user")


def _links(tid: int, kinds: Iterable[str]) -> dict[str, str]:
    """What /proc/TID/ns says; "" for what isn't there: of an older kernel, or a namespace without a process yet."""
    found = {}
    for kind in kinds:
        found[kind] = ""
        with contextlib.suppress(FileNotFoundError):
            found[kind] = os.readlink(f"/proc/{tid}/ns/{kind}")
    return found


def _refuse_threads(living: list[FrozenProcess], seen: dict[int, dict[str, str]], ctx: CollectContext) -> None:
    """Threads that are elsewhere than their process, which setns(2) allows for some kinds."""
    for process in living:
        for task in process.tasks[1:]:
            links = _links(task.tid, _KINDS)
            for kind, link in links.items():
                if link != seen[process.pid][kind]:
                    name = _NAMES.get(kind, kind)
                    ctx.refuse(process, f"{name} namespace", f"thread {task.inner_tid} is in another than its process")


class _Collector:
    """Finds the namespaces of processes, and what those belong to."""

    def __init__(
        self,
        living: list[FrozenProcess],
        ctx: CollectContext,
        seen: dict[int, dict[str, str]],
        last_pids: dict[int, int],
    ) -> None:
        self.living = living
        self.ctx = ctx
        self.seen = seen
        self.last_pids = last_pids
        self.first = living[0]
        self.own = dict(seen[self.first.pid])
        self.ids: dict[tuple[int, int], int] = {}
        self.users: dict[int, UserNamespace] = {}
        self.pids: dict[int, PidNamespace] = {}
        self.spaces: dict[int, Space] = {}
        self.fresh: dict[bool, netstate.State] = {}  # by whether the loopback is up
        with open("/proc/self/ns/user") as file:
            self.top = nsfs.identity(file.fileno())
        self.ids[self.top] = POD

    def collect(self) -> Collected:
        members = {}
        _refuse_threads(self.living, self.seen, self.ctx)
        if not self._first_is_at_home():
            return Collected()
        for process in self.living:
            members[process.pid] = self._member(process)
        nesting = Nesting(
            users=tuple(self.users.values()), pids=tuple(self.pids.values()), spaces=tuple(self.spaces.values())
        )
        return Collected(nesting, members)

    def _first_is_at_home(self) -> bool:
        """The pod's own namespaces are known by its process 1: it may leave no more than the user namespace."""
        good = self.first.pid == 1
        for kind in ("uts", "ipc", "net", "mnt", "cgroup", "time"):
            with open(f"/proc/{self.first.living}/ns/{kind}") as file:
                owner = nsfs.owner_of(file.fileno())
            if nsfs.identity(owner) != self.top:
                self._refuse(self.first, kind, "process 1 has left the pod's own", "start the program from a shell")
                good = False
            os.close(owner)
        if len(self.first.tasks) > 1 and self.own["user"] != _own_user():
            self._refuse(self.first, "user", "process 1 has left the pod's own, with threads", "start it from a shell")
            good = False
        return good

    def _refuse(self, process: FrozenProcess, kind: str, reason: str, hint: str = "") -> None:
        self.ctx.refuse(process, f"{_NAMES.get(kind, kind)} namespace", reason, hint)

    def _member(self, process: FrozenProcess) -> Membership:
        links = self.seen[process.pid]
        for kind in ("mnt", "cgroup", "time"):
            if links[kind] != self.own[kind]:
                self._refuse(process, kind, "is not the pod's own")
        if links["time_for_children"] != self.own["time"]:
            self._refuse(process, "time", "that of its children is not the pod's own")
        found = {}
        for kind in ("user", *_FLAGS, "pid"):
            found[kind] = POD
            if links[kind] != (_own_user() if kind == "user" else self.own[kind]):
                with self._naming(process, kind):
                    found[kind] = self._id(process, kind)
        found["children"] = self._for_children(process, found["pid"])
        self._check(process, found["user"])
        return Membership(**found)

    @contextlib.contextmanager
    def _naming(self, process: FrozenProcess, kind: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            self._refuse(process, kind, f"its state can't be read: {error}")

    def _for_children(self, process: FrozenProcess, own: int) -> int:
        links = self.seen[process.pid]
        wanted = links["pid_for_children"]
        if wanted == links["pid"]:
            return own
        if not wanted:
            self._refuse(process, "pid", "that of its children has no process yet", "wait until it has")
            return own
        host = next((p for p in self.living if self.seen[p.pid]["pid"] == wanted), None)
        if host is None:
            self._refuse(process, "pid", "the first process of that of its children has ended")
            return own
        with self._naming(process, "pid"):
            return self._id(host, "pid")
        return own

    def _id(self, process: FrozenProcess, kind: str) -> int:
        """The id of the namespace that a process is in."""
        fd = os.open(f"/proc/{process.living}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            known = self.ids.get(nsfs.identity(fd))
            return known if known is not None else self._add(process, kind, fd)
        finally:
            os.close(fd)

    def _add(self, process: FrozenProcess, kind: str, fd: int) -> int:
        if kind == "user":
            return self._user(process, fd)
        parent = self._parent(fd) if kind == "pid" else POD
        owner = nsfs.owner_of(fd)
        try:
            user = self._user(process, owner)
        finally:
            os.close(owner)
        number = self.ids[nsfs.identity(fd)] = len(self.ids)
        if kind == "pid":
            self.pids[number] = self._pid_namespace(process, number, parent, user)
        else:
            self.spaces[number] = self._space(process, kind, number, user, fd)
        return number

    def _user(self, process: FrozenProcess, fd: int) -> int:
        """The id of a user namespace, its parents having theirs; `process` is for the blame."""
        key = nsfs.identity(fd)
        if key in self.ids:
            return self.ids[key]
        above = nsfs.parent_of(fd)
        if above < 0:
            raise ValueError("it is not one of the pod's")
        try:
            parent = self._user(process, above)
        finally:
            os.close(above)
        inhabitant = next((p.living for p in self.living if _is_in(p, "user", key)), None)
        with contextlib.nullcontext(inhabitant) if inhabitant else _visitor(fd) as host_pid:
            base = f"/proc/{host_pid}"
            number = self.ids[key] = len(self.ids)
            self.users[number] = UserNamespace(
                id=number,
                parent=parent,
                owner=nsfs.owner_uid(fd),
                uids=_ranges(f"{base}/uid_map"),
                gids=_ranges(f"{base}/gid_map"),
                setgroups=procfs.read_text(f"{base}/setgroups").strip() == "allow",
            )
        return number

    def _parent(self, fd: int) -> int:
        """The id of the pid namespace above one; its first process lives, or there would be none below."""
        above = nsfs.parent_of(fd)
        if above < 0:
            raise ValueError("it is not one of the pod's")
        try:
            key = nsfs.identity(above)
        finally:
            os.close(above)
        if _is_in(self.first, "pid", key):
            return POD
        inhabitant = next((p for p in self.living if _is_in(p, "pid", key)), None)
        if inhabitant is None:
            raise ValueError("it lies in one that no process is in")
        return self._id(inhabitant, "pid")

    def _pid_namespace(self, process: FrozenProcess, number: int, parent: int, user: int) -> PidNamespace:
        inhabitants = [p for p in self.living if self.seen[p.pid]["pid"] == self.seen[process.pid]["pid"]]
        first = next((p for p in inhabitants if procfs.ns_pids(p.first.status)[-1] == 1), None)
        if first is None:
            raise ValueError("its first process has ended")
        last_pid = self.last_pids.get(first.pid, 0)
        return PidNamespace(id=number, parent=parent, user=user, first=first.pid, last_pid=last_pid)

    def _space(self, process: FrozenProcess, kind: str, number: int, user: int, fd: int) -> Space:
        if kind == "uts":
            names = in_namespace(fd, "uts", os.uname)
            domain = in_namespace(fd, "uts", lambda: procfs.read_text("/proc/sys/kernel/domainname").rstrip("\n"))
            return Space(id=number, kind=kind, user=user, hostname=names.nodename, domainname=domain)
        if kind == "ipc":
            for what in in_namespace(fd, "ipc", _ipc_contents):
                self._refuse(process, "ipc", f"it has {what}")
            return Space(id=number, kind=kind, user=user)
        self.ctx.networks[number] = process.living
        up, state = in_namespace(fd, "net", netstate.look)
        if up not in self.fresh:
            self.fresh[up] = fresh_net(up)
        for what in netstate.differences(state, self.fresh[up]):
            self._refuse(process, "net", f"it has {what} of its own; only a new one's loopback is saved")
        return Space(id=number, kind=kind, user=user, loopback=up)

    def _check(self, process: FrozenProcess, number: int) -> None:
        """Ids that nobody could set again: those that a process brought along, and it has no number for."""
        user = self.users.get(number)
        if user is None:
            return
        from_status = [_ids(task.status) for task in process.tasks]
        for index, name, ranges in ((0, "user", user.uids), (1, "group", user.gids)):
            strange = any(inside(ranges, i) is None for ids in from_status for i in ids[index])
            if strange and any(ids[index] != from_status[0][index] for ids in from_status):
                self._refuse(process, "user", f"threads have different {name} ids, which it doesn't map")
        if any(ids[2] != from_status[0][2] for ids in from_status) and not user.setgroups:
            self._refuse(process, "user", "threads have different groups, which can't be set in it")


def _ids(status: dict[str, str]) -> tuple[list[int], list[int], list[int]]:
    uids, gids, groups = ([int(i) for i in status[key].split()] for key in ("Uid", "Gid", "Groups"))
    return uids, gids, groups


@contextlib.contextmanager
def _visitor(user_fd: int) -> Iterator[int]:
    """Scope in which a process of ours, whose pid this is, is in a user namespace that nobody of the pod is in."""
    come_r, come_w = os.pipe2(os.O_CLOEXEC)
    stay_r, stay_w = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.close(stay_w)
            setns(user_fd, Clone.NEWUSER)
            os.write(come_w, b"+")
            os.read(stay_r, 1)
        finally:
            os._exit(0)
    os.close(come_w)
    os.close(stay_r)
    try:
        if not os.read(come_r, 1):
            raise ValueError("it can't be entered")
        yield pid
    finally:
        os.close(come_r)
        os.close(stay_w)
        os.waitpid(pid, 0)


def _is_in(process: FrozenProcess, kind: str, key: tuple[int, int]) -> bool:
    found = os.stat(f"/proc/{process.living}/ns/{kind}")
    return (found.st_dev, found.st_ino) == key


def _ranges(path: str) -> Ranges:
    lines = [line.split() for line in procfs.read_text(path).splitlines()]
    return tuple((int(first), int(outer), int(count)) for first, outer, count in lines)


_IPC_SETTINGS = ("auto_msgmni", "msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced")


def _ipc_contents() -> list[str]:
    """What is in the calling thread's IPC namespace, for people; afterwards the thread is in a new one."""
    found = []
    for name, what in (("shm", "shared memory"), ("sem", "semaphores"), ("msg", "message queues")):
        if len(procfs.read_text(f"/proc/sysvipc/{name}").splitlines()) > 1:
            found.append(what)
    queues = mount.make_mount("mqueue", {}, MountAttr.NODEV)
    if os.listdir(f"/proc/self/fd/{queues}"):  # it is O_PATH itself
        found.append("POSIX message queues")
    os.close(queues)
    settings = _ipc_settings()
    unshare(Clone.NEWIPC)
    return found + (["settings of its own"] if settings != _ipc_settings() else [])


def _ipc_settings() -> dict[str, bytes]:
    return netstate.sysctls("/proc/sys/fs/mqueue") | netstate.sysctls("/proc/sys/kernel", _IPC_SETTINGS)


def fresh_net(up: bool) -> netstate.State:
    """What a new network namespace shows, its loopback up or not."""

    def look() -> netstate.State:
        unshare(Clone.NEWNET)
        if up:
            loopback_up()
        return netstate.look()[1]

    return _in_thread(look)


def in_namespace(fd: int, kind: str, ask: Callable[[], T]) -> T:
    """What `ask` returns in a namespace of one of the kinds that a single thread can join."""

    def inner() -> T:
        setns(fd, _FLAGS[kind])
        return ask()

    return _in_thread(inner)


def _in_thread(work: Callable[[], T]) -> T:
    """The result of `work` in a thread of its own, which may leave the supervisor's namespaces; raises what it does."""
    results: list[T] = []
    errors: list[BaseException] = []

    def main() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
