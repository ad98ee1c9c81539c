"""POSIX message queues (mq_overview(7)): attributes, messages with their priorities, who wants to be notified.

Messages can't be read without taking them, and who is notified with what is told by nobody, so both are read where
they lie (podtree.kernel.kmem). Whoever was blocked in a queue starts that call again by itself. Queues with a name
belong to the pod's IPC namespace; those without belong to the descriptors that are left of them.

Source: ipc/mqueue.c, ipc/msgutil.c (Linux 6.18).
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
from collections.abc import Iterator

import msgspec

from podtree.errors import Damaged, RestoreFailed
from podtree.kernel import fdops
from podtree.kernel import mqueue as kernel
from podtree.kernel.kmem import KernelMemory, Unreadable, View
from podtree.kernel.sys import PAGE_SIZE
from podtree.objects import insight
from podtree.objects.context import CollectContext
from podtree.objects.files import OPEN_FLAGS
from podtree.objects.held import OWN_MQUEUE, Held, PodView, path_bytes, path_text

MOUNT = OWN_MQUEUE.encode()
MAX_NAME = 255


class QueuedMessage(msgspec.Struct, frozen=True, array_like=True):
    """One message."""

    priority: int
    data: bytes


class PosixQueue(msgspec.Struct, frozen=True, kw_only=True):
    """A queue; messages by ascending priority, those of equal priority in their order. Times in ns."""

    name: str
    mode: int
    uid: int
    gid: int
    max_messages: int
    message_size: int
    messages: tuple[QueuedMessage, ...] = ()
    atime: int = 0
    mtime: int = 0


class Notification(msgspec.Struct, frozen=True):
    """What process `pid` has asked for by mq_notify(2): struct sigevent's fields. With SIGEV_THREAD the kernel sends
    `cookie` to a netlink socket, OpenFile `socket`."""

    pid: int
    method: int
    signal: int
    value: bytes
    cookie: bytes = b""
    socket: int = -1


class QueueFile(msgspec.Struct, frozen=True, tag="mqueue"):
    """An open queue called `name`. `by_path`: opened in /dev/mqueue, not by mq_open(3). `key`: of a queue that has lost
    its name, `queue` is what that holds, with the first of its files. `notification`: with one file of its owner."""

    name: str
    by_path: bool = False
    key: str = ""
    queue: PosixQueue | None = None
    notification: Notification | None = None


# ----------------------------------------------------------------------------------------------- collect


def is_one(held: Held, view: PodView) -> bool:
    """Whether it is an open queue of the pod."""
    return held.stat.st_dev == _device(view) and held.kind == stat.S_IFREG and not held.flags & os.O_PATH


def _device(view: PodView) -> int:
    return next((m.device for m in view.mounts.values() if m.point == MOUNT and m.fstype == "mqueue"), -1)


class Queues:
    """All queues of a frozen pod. `everything`: its open file descriptions."""

    def __init__(self, ctx: CollectContext, view: PodView, everything: list[Held]) -> None:
        self.ctx = ctx
        self.view = view
        self.everything = everything

    def named(self) -> tuple[PosixQueue, ...]:
        """Those with a name; what can't be saved is refused."""
        found = []
        with contextlib.ExitStack() as stack:
            try:
                place = self.view.open(MOUNT)
            except OSError:
                return ()
            stack.callback(os.close, place)
            if os.fstat(place).st_dev != _device(self.view):
                return ()
            for name in sorted(os.listdir(b"/proc/self/fd/%d/" % place)):
                fd = os.open(b"/proc/self/fd/%d/%s" % (place, name), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                try:
                    found.append(self._queue(fd, name))
                except OSError as error:
                    what = f"POSIX message queue /{os.fsdecode(name)}"
                    self.ctx.refuse(None, what, f"its state can't be read: {error}")
        return tuple(one for one in found if one)

    def files(self, group: list[Held]) -> dict[int, QueueFile]:
        """States of all open queues, by Held.id."""
        states = {}
        told: set[tuple[int, int]] = set()
        notified: set[tuple[int, int]] = set()
        for held in group:
            name = os.path.basename(held.link.removesuffix(b" (deleted)"))
            gone = held.stat.st_nlink == 0
            queue = self._queue(held.fd, name) if gone and held.inode not in told else None
            told.add(held.inode)
            notification = None if held.inode in notified else self._notification(held)
            if notification:
                notified.add(held.inode)
            key = str(held.stat.st_ino) if gone else ""
            by_path = self.view.mount_of(held) is not None
            states[held.id] = QueueFile(path_text(name), by_path, key, queue, notification)
        return states

    def _memory(self, name: bytes) -> KernelMemory | None:
        memory = insight.memory()
        if memory is None:
            what = f"POSIX message queue /{os.fsdecode(name)}"
            self.ctx.refuse(None, what, "what it holds is told by no call", insight.why_not())
        return memory

    def _queue(self, fd: int, name: bytes) -> PosixQueue | None:
        memory = self._memory(name)
        if memory is None:
            return None
        attributes, st = kernel.mq_attributes(fd), os.fstat(fd)
        messages = tuple(_messages(memory, _info(memory, fd)))
        if len(messages) != attributes.waiting:
            raise Unreadable(f"{len(messages)} of the {attributes.waiting} messages of queue {name!r}")
        return PosixQueue(
            name=path_text(name),
            mode=stat.S_IMODE(st.st_mode),
            uid=st.st_uid,
            gid=st.st_gid,
            max_messages=attributes.max_messages,
            message_size=attributes.message_size,
            messages=messages,
            atime=st.st_atime_ns,
            mtime=st.st_mtime_ns,
        )

    def _notification(self, held: Held) -> Notification | None:
        """Who is to be notified, if that is one who has this file: whoever closes it isn't notified any more."""
        memory = self._memory(held.link)
        if memory is None:
            return None
        info = _info(memory, held.fd)
        owner = info.pointer("notify_owner")
        for process, _ in held.holders if owner else ():
            leader = memory.view("task_struct", memory.task(process.pidfd).pointer("group_leader"))
            if leader.pointer("thread_pid") != owner:
                continue
            method = info.signed("notify.sigev_notify")
            cookie, sock = b"", -1
            if method == kernel.SIGEV_THREAD:
                data = memory.view("sk_buff", info.pointer("notify_cookie")).pointer("data")
                cookie = memory.read(data, kernel.COOKIE_SIZE)
                sock = self._socket(memory, info.pointer("notify_sock"))
                if sock < 0:
                    held.refuse(self.ctx, "it notifies by a netlink socket that nobody has open")
            signal, value = info.signed("notify.sigev_signo"), info.raw("notify.sigev_value")
            return Notification(process.pid, method, signal, value, cookie, sock)
        return None

    def _socket(self, memory: KernelMemory, address: int) -> int:
        for held in self.everything:
            if held.kind == stat.S_IFSOCK and memory.sock(held.fd) == address:
                return held.id
        return -1


def _info(memory: KernelMemory, fd: int) -> View:
    return memory.container("mqueue_inode_info", "vfs_inode", memory.file(fd).pointer("f_inode"))


def _messages(memory: KernelMemory, info: View) -> Iterator[QueuedMessage]:
    """By ascending priority: a red-black tree of lists."""
    yield from _below(memory, info.pointer("msg_tree.rb_node"))


def _below(memory: KernelMemory, address: int) -> Iterator[QueuedMessage]:
    if not address:
        return
    node = memory.container("posix_msg_tree_node", "rb_node", address)
    yield from _below(memory, node.pointer("rb_node.rb_left"))
    for message in memory.each(node.at("msg_list"), "msg_msg", "m_list"):
        yield QueuedMessage(node.number("priority"), _payload(memory, message))
    yield from _below(memory, node.pointer("rb_node.rb_right"))


def _payload(memory: KernelMemory, message: View) -> bytes:
    """In pieces of a page each, behind struct msg_msg, then struct msg_msgseg."""
    left, address, head = message.number("m_ts"), message.address, memory.btf.size("msg_msg")
    following = message.pointer("next")
    pieces = []
    while left:
        size = min(left, PAGE_SIZE - head)
        pieces.append(memory.read(address + head, size))
        left -= size
        if left:
            address, head = following, memory.btf.size("msg_msgseg")
            following = memory.view("msg_msgseg", address).pointer("next")
    return b"".join(pieces)


# ----------------------------------------------------------------------------------------------- restore


def _make(queue: PosixQueue, name: bytes) -> int:
    """A descriptor of the new queue."""
    _check(queue, name)
    _raise_limit()
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NONBLOCK
    try:
        fd = kernel.mq_open(name, flags, 0o600, queue.max_messages, queue.message_size)
        for message in queue.messages:
            kernel.mq_send(fd, message.data, message.priority)
        os.fchown(fd, queue.uid, queue.gid)
        os.fchmod(fd, queue.mode)
        os.utime(fd, ns=(queue.atime, queue.mtime))
    except OSError as error:
        hint = "the user's share of bytes in queues is used up: ulimit -q" if error.errno == errno.EMFILE else ""
        raise RestoreFailed(f"POSIX message queue /{os.fsdecode(name)}: {error}", hint) from error
    return fd


def _raise_limit() -> None:
    """The share of bytes in queues is the user's, over all pods, but what counts is the limit of who makes one."""
    _, hard = resource.getrlimit(resource.RLIMIT_MSGQUEUE)
    try:
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (OSError, ValueError):  # without CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (hard, hard))


def _check(queue: PosixQueue, name: bytes) -> None:
    if b"/" in name or name in (b".", b"..") or len(name) > MAX_NAME:
        raise Damaged(f"the image has a POSIX message queue with an impossible name: {queue.name!r}")
    if len(queue.messages) > queue.max_messages or queue.max_messages < 1 or queue.message_size < 1:
        raise Damaged(f"the image has an impossible POSIX message queue: {queue.name!r}")
    if not all(len(m.data) <= queue.message_size and 0 <= m.priority < kernel.PRIORITIES for m in queue.messages):
        raise Damaged(f"the image has an impossible message in POSIX message queue {queue.name!r}")


def restore_queues(
    queues: tuple[PosixQueue, ...], entries: list[tuple[int, int, QueueFile]]
) -> dict[int, int]:
    """Make all queues and open them again. First those that have lost their names, which may be others' now: they are
    made, opened as often as they were, and lose it again.

    `entries`: (OpenFile id, flags, state). For the builder, as root. Raises RestoreFailed or Damaged.
    """
    result = {}
    unnamed: dict[str, list[tuple[int, int, QueueFile]]] = {}
    for number, flags, state in entries:
        if state.key:
            unnamed.setdefault(state.key, []).append((number, flags, state))
    for group in unnamed.values():
        result.update(_restore_unnamed(group))
    for queue in queues:
        os.close(_make(queue, path_bytes(queue.name)))
    for number, flags, state in entries:
        if not state.key:
            result[number] = _open(path_bytes(state.name), flags, state)
    return result


def _restore_unnamed(group: list[tuple[int, int, QueueFile]]) -> dict[int, int]:
    queue = next((state.queue for _, _, state in group if state.queue), None)
    if queue is None:
        raise Damaged(f"the image lacks what the POSIX message queue {group[0][2].name!r} holds")
    name = path_bytes(queue.name)
    os.close(_make(queue, name))
    try:
        return {number: _open(name, flags, state) for number, flags, state in group}
    finally:
        kernel.mq_unlink(name)


def _open(name: bytes, flags: int, state: QueueFile) -> int:
    if b"/" in name:
        raise Damaged(f"the image has a POSIX message queue with an impossible name: {state.name!r}")
    flags &= OPEN_FLAGS & ~(os.O_PATH | os.O_DIRECTORY)
    if not state.by_path:
        return kernel.mq_open(name, flags)
    probe = os.open(os.path.join(MOUNT, name), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return fdops.reopen(probe, flags)
    finally:
        os.close(probe)
