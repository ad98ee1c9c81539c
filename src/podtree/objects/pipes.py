"""Pipes and FIFOs (pipe(7), fifo(7)): capacity, bytes and packets in them, which ends are open.

The contents are duplicated with tee(2), which consumes nothing. A pipe is one kernel object with many open file
descriptions; what belongs to the pipe (its bytes) is saved with the first of them.

The far ends of the pod's standard input and output are held by the supervisor. Any other pipe that somebody outside
of the pod holds is external: poll(2) tells it, because an end that nobody has would show as POLLHUP or POLLERR. So is a
FIFO on a directory shown by -v, which anybody may have open. Cut off, either is a pipe with only the pod's ends.
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
from collections.abc import Iterable

import msgspec

from podtree.errors import RestoreFailed
from podtree.kernel import fdops
from podtree.kernel.sys import NR, syscall
from podtree.objects import external
from podtree.objects.context import CollectContext, RestoreContext
from podtree.objects.held import Held, PodView, former_name, path_bytes, path_text
from podtree.objects.scratch import temporary_name

READ_ONCE = 0x7FFFF000  # MAX_RW_COUNT: more than any pipe holds


class Chunk(msgspec.Struct, frozen=True):
    """Bytes in a pipe. A packet (pipe2(2), O_DIRECT) is read by one read of its own."""

    data: bytes
    packet: bool = False


class Pipe(msgspec.Struct, frozen=True, tag="pipe"):
    """One end (or both: O_RDWR) of a pipe or FIFO. `key` is the same for all ends of a pipe.

    `path` is empty for an anonymous pipe; `unlinked` says that a FIFO's name was gone. `hangup`: a FIFO's reader
    that has seen its last writer go (POLLHUP), as against one still waiting for its first. `external`: a FIFO that is
    shared with others, to be opened as it is.
    """

    key: str
    capacity: int
    mode: int
    uid: int
    gid: int
    chunks: tuple[Chunk, ...] = ()
    path: str = ""
    unlinked: bool = False
    hangup: bool = True
    external: bool = False


class StdioPipe(msgspec.Struct, frozen=True, tag="stdio"):
    """The pod's end of its standard input (0), output (1) or error (2) pipe; the supervisor has the other."""

    index: int
    mode: int
    uid: int
    gid: int
    chunks: tuple[Chunk, ...] = ()


def collect_pipes(group: Iterable[Held], ctx: CollectContext, view: PodView) -> dict[int, Pipe | StdioPipe]:
    """States of all open pipe ends of the pod, by Held.id."""
    pipes: dict[tuple[int, int], list[Held]] = {}
    for held in group:
        pipes.setdefault(held.inode, []).append(held)
    stdio = {_inode(fd): index for index, fd in enumerate(ctx.stdio_fds) if fd >= 0}
    states: dict[int, Pipe | StdioPipe] = {}
    for inode, ends in pipes.items():
        if inode in stdio:
            states |= _collect_stdio(stdio[inode], ends, ctx)
        else:
            states |= _collect_pipe(ends, ctx, view)
    return states


def _inode(fd: int) -> tuple[int, int]:
    st = os.fstat(fd)
    return st.st_dev, st.st_ino


def _collect_stdio(index: int, ends: list[Held], ctx: CollectContext) -> dict[int, Pipe | StdioPipe]:
    own = ctx.stdio_fds[index]
    readable = next((e.fd for e in ends if e.readable), own)
    st = ends[0].stat
    state = StdioPipe(index, stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid)
    rest: dict[int, Pipe | StdioPipe] = {e.id: state for e in ends}
    rest[ends[0].id] = msgspec.structs.replace(state, chunks=read_chunks(readable))
    return rest


def _collect_pipe(ends: list[Held], ctx: CollectContext, view: PodView) -> dict[int, Pipe | StdioPipe]:
    first = ends[0]
    named = not first.link.startswith(b"pipe:")
    shared = _sharing(ends, named, ctx, view)
    if shared == "refuse":
        return {}
    if shared == "close":
        named = False
    if shared == "keep":
        path = path_text(first.link)
        state = Pipe(first.link.hex(), 0, 0, 0, 0, path=path, external=True)
        return {end.id: state for end in ends}
    name = view.current_name(first) if named else None
    path = "" if not named else path_text(name or former_name(first.link))
    state = Pipe(
        key=f"{first.stat.st_dev:x}:{first.stat.st_ino}" if named else f"pipe:{first.stat.st_ino}",
        capacity=fcntl.fcntl(first.fd, fdops.F_GETPIPE_SZ),
        mode=stat.S_IMODE(first.stat.st_mode),
        uid=first.stat.st_uid,
        gid=first.stat.st_gid,
        path=path,
        unlinked=named and name is None,
    )
    states: dict[int, Pipe | StdioPipe] = {}
    for end in ends:
        hangup = not (named and end.access == os.O_RDONLY) or bool(_poll(end.fd) & select.POLLHUP)
        states[end.id] = msgspec.structs.replace(state, hangup=hangup)
    states[first.id] = msgspec.structs.replace(states[first.id], chunks=_contents(ends))
    return states


def _contents(ends: list[Held]) -> tuple[Chunk, ...]:
    for end in ends:
        if end.readable:
            return read_chunks(end.fd)
    fd = fdops.reopen(ends[0].fd, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return read_chunks(fd)
    finally:
        os.close(fd)


def _poll(fd: int) -> int:
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLOUT)
    return next((events for _, events in poll.poll(0)), 0)


def _sharing(ends: list[Held], named: bool, ctx: CollectContext, view: PodView) -> external.Policy | None:
    """What is done with a pipe that is shared with the outside; None: it isn't."""
    if not named:
        return _held_outside(ends, ctx)
    return None if _fifo_is_ours(ends[0], view) else _shared_fifo(ends[0], ctx, view)


def _held_outside(ends: list[Held], ctx: CollectContext) -> external.Policy | None:
    missing = None
    if not any(e.writable for e in ends) and not _poll(ends[0].fd) & select.POLLHUP:
        missing = "writing"
    if not any(e.readable for e in ends) and not _poll(ends[0].fd) & select.POLLERR:
        missing = "reading"
    if missing:
        reason = f"its {missing} end is held by a process outside of the pod"
        return ends[0].external(ctx, reason, close="a branch finds the other end closed")
    return None


def _fifo_is_ours(held: Held, view: PodView) -> bool:
    where = view.mount_of(held)
    return view.on_volume(where) or view.on_own_tmpfs(where)


def _shared_fifo(held: Held, ctx: CollectContext, view: PodView) -> external.Policy:
    return held.external(
        ctx,
        "a FIFO on a file system that the pod shares with others: who holds the other end is unknown",
        close="a branch has a pipe of its own, with what is in it now and the pod's ends",
        keep="a branch opens it again, as it is then" if view.current_name(held) == held.link else "",
    )


# ---------------------------------------------------------------------------------------------- contents


def read_chunks(fd: int) -> tuple[Chunk, ...]:
    """Everything in the pipe that `fd` can read from, without consuming it.

    A private duplicate is moved buffer by buffer into a pipe with room for one, and from there, followed by a marker
    byte, read with room for both: a packet ends the read before the marker.
    """
    size = fdops.queued_bytes(fd)
    if not size:
        return ()
    copy_r, copy_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    one_r, one_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    test_r, test_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.fcntl(copy_w, fdops.F_SETPIPE_SZ, fcntl.fcntl(fd, fdops.F_GETPIPE_SZ))
        fcntl.fcntl(one_w, fdops.F_SETPIPE_SZ, 4096)
        fdops.tee(fd, copy_w, READ_ONCE)
        chunks: list[Chunk] = []
        while fdops.queued_bytes(copy_r):
            length = os.splice(copy_r, one_w, READ_ONCE, flags=fdops.SPLICE_F_NONBLOCK)
            os.splice(one_r, test_w, length, flags=fdops.SPLICE_F_NONBLOCK)
            os.write(test_w, b"\n")
            data = os.read(test_r, length + 1)
            packet = len(data) == length
            if packet:
                os.read(test_r, 1)
            chunks.append(Chunk(data[:length], packet))
        if sum(len(c.data) for c in chunks) != size:
            raise RuntimeError(f"a pipe's contents changed while the pod was frozen ({size} bytes were announced)")
        return _joined(chunks)
    finally:
        for each in (copy_r, copy_w, one_r, one_w, test_r, test_w):
            os.close(each)


def _joined(chunks: list[Chunk]) -> tuple[Chunk, ...]:
    """Neighbours that are no packets are one stream."""
    result: list[Chunk] = []
    stream: list[bytes] = []
    for chunk in [*chunks, Chunk(b"", True)]:
        if not chunk.packet:
            stream.append(chunk.data)
            continue
        if stream:
            result.append(Chunk(b"".join(stream)))
            stream = []
        if chunk.data:
            result.append(chunk)
    return tuple(result)


def write_chunks(fd: int, chunks: Iterable[Chunk]) -> None:
    """Put contents into a pipe through a writing end, making it larger where it must be."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    todo = list(chunks)
    for index, chunk in enumerate(todo):
        direct = os.O_DIRECT if chunk.packet else 0
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT | os.O_NONBLOCK | direct)
        sealed = not chunk.packet and index + 1 < len(todo)
        rest = memoryview(chunk.data)
        while rest:
            try:
                if sealed and len(rest) <= 4096:
                    rest = rest[_write_sealed(fd, rest) :]
                else:
                    rest = rest[os.write(fd, rest[: len(rest) - 1 if sealed else None]) :]
            except BlockingIOError:
                fcntl.fcntl(fd, fdops.F_SETPIPE_SZ, 2 * fcntl.fcntl(fd, fdops.F_GETPIPE_SZ))
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def _write_sealed(fd: int, data: memoryview) -> int:
    """Write bytes that no later write is appended to: a packet that still fits their page would melt into them.

    Buffers that tee(2) made are never appended to (fs/splice.c, link_pipe()).
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        os.write(writer, data)
        return syscall(NR.tee, reader, fd, len(data), fdops.SPLICE_F_NONBLOCK)
    finally:
        os.close(reader)
        os.close(writer)


# ----------------------------------------------------------------------------------------------- restore


def restore_pipes(entries: list[tuple[int, int, Pipe | StdioPipe]], ctx: RestoreContext) -> dict[int, int]:
    """Make all pipes again. `entries`: (OpenFile id, flags, state); returns descriptors by id.

    O_NONBLOCK and O_DIRECT of the results are not yet right: the caller sets them with F_SETFL.
    """
    groups: dict[str, list[tuple[int, int, Pipe]]] = {}
    stdio: dict[int, list[tuple[int, int, StdioPipe]]] = {}
    for number, flags, state in entries:
        if isinstance(state, StdioPipe):
            stdio.setdefault(state.index, []).append((number, flags, state))
        else:
            groups.setdefault(state.key, []).append((number, flags, state))
    result: dict[int, int] = {}
    for index, std_ends in stdio.items():
        result |= _restore_stdio(index, std_ends, ctx)
    for ends in groups.values():
        result |= _restore_fifo(ends) if ends[0][2].path else _restore_anonymous(ends)
    return result


def _restore_stdio(index: int, ends: list[tuple[int, int, StdioPipe]], ctx: RestoreContext) -> dict[int, int]:
    if not 0 <= index < len(ctx.stdio_fds) or ctx.stdio_fds[index] < 0:
        raise RestoreFailed(f"the checkpoint has a standard stream {index} on a pipe, the new pod has no such pipe")
    own = ctx.stdio_fds[index]
    _set_inode(own, ends[0][2])
    chunks = [c for _, _, state in ends for c in state.chunks]
    if chunks:
        writer = fdops.reopen(own, os.O_WRONLY | os.O_NONBLOCK)
        write_chunks(writer, chunks)
        os.close(writer)
    return _open_ends([(number, flags) for number, flags, _ in ends], [os.dup(own)])


def _set_inode(fd: int, state: Pipe | StdioPipe) -> None:
    """Owner and mode count: /dev/stdout opens the pipe anew, with the task's own rights."""
    os.fchown(fd, state.uid, state.gid)
    os.fchmod(fd, state.mode & 0o7777)


def _restore_anonymous(ends: list[tuple[int, int, Pipe]]) -> dict[int, int]:
    state = ends[0][2]
    reader, writer = os.pipe2(os.O_CLOEXEC)
    fcntl.fcntl(writer, fdops.F_SETPIPE_SZ, state.capacity)
    _set_inode(reader, state)
    write_chunks(writer, [c for _, _, s in ends for c in s.chunks])
    return _open_ends([(number, flags) for number, flags, _ in ends], [reader, writer])


def _open_ends(wanted: list[tuple[int, int]], originals: list[int]) -> dict[int, int]:
    """Descriptors for (id, flags), the first of each access mode from `originals`; the unused of those are closed."""
    spare = {fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE: fd for fd in originals}
    source = fdops.reopen(originals[0], os.O_RDWR | os.O_NONBLOCK)  # keeps the pipe while its ends are sorted out
    result = {}
    for number, flags in wanted:
        access = flags & os.O_ACCMODE
        if access in spare:
            result[number] = spare.pop(access)
        else:
            result[number] = fdops.reopen(source, access | os.O_NONBLOCK)
    for fd in (source, *spare.values()):
        os.close(fd)
    return result


def _restore_fifo(ends: list[tuple[int, int, Pipe]]) -> dict[int, int]:
    state = ends[0][2]
    path = path_bytes(state.path)
    if state.external:
        return _open_shared(path, [(number, flags) for number, flags, _ in ends])
    if not state.unlinked:
        keeper = _open_fifo(path)
    else:
        with temporary_name(path, lambda p: os.mkfifo(p, 0o600), os.unlink) as name:
            keeper = _open_fifo(name)
        _set_inode(keeper, state)
    reader = fdops.reopen(keeper, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(keeper, fdops.F_SETPIPE_SZ, state.capacity)
    write_chunks(keeper, [c for _, _, s in ends for c in s.chunks])
    result = {}
    for number, flags, each in ends:
        if each.hangup:
            result[number] = fdops.reopen(keeper, flags & os.O_ACCMODE | os.O_NONBLOCK)
    os.close(keeper)
    for number, flags, each in ends:
        if not each.hangup:  # opened when there is no writer: it waits for the first
            result[number] = fdops.reopen(reader, flags & os.O_ACCMODE | os.O_NONBLOCK)
    os.close(reader)
    return result


def _open_shared(path: bytes, wanted: list[tuple[int, int]]) -> dict[int, int]:
    """Descriptors of a FIFO that others have open, too: nothing in it is touched."""
    try:
        keeper = _open_fifo(path)
    except OSError as error:
        raise RestoreFailed(f"the FIFO {os.fsdecode(path)}, shared by -v: {error.strerror}", "put it back") from error
    try:
        return {number: fdops.reopen(keeper, flags & os.O_ACCMODE | os.O_NONBLOCK) for number, flags in wanted}
    finally:
        os.close(keeper)


def _open_fifo(path: bytes) -> int:
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISFIFO(os.fstat(fd).st_mode):
            raise RestoreFailed(f"{os.fsdecode(path)} is no FIFO", "the pod's files do not fit the checkpoint")
        return fdops.reopen(fd, os.O_RDWR | os.O_NONBLOCK)
    finally:
        os.close(fd)
