"""Terminals: pseudo terminal pairs inside the pod, and the pod's console (pty(7), ioctl_tty(2)).

A pty is one kernel object with a master and a slave side; its settings are saved with the first of its open file
descriptions. The console's master is the supervisor's. Session and foreground process group are data for the engine:
only the session's leader can take a controlling terminal.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import stat
import struct
import termios
from collections.abc import Iterable
from pathlib import Path

import msgspec

from podtree.errors import Damaged, RestoreFailed
from podtree.kernel import tty as pty
from podtree.objects import ttyqueue
from podtree.objects.context import CollectContext, RestoreContext
from podtree.objects.held import Held, PodView, path_bytes, path_text, pod_id
from podtree.objects.ttyqueue import Queues

# include/uapi/asm-generic/ioctls.h
TIOCEXCL, TIOCGEXCL = 0x540C, 0x80045440
TIOCPKT, TIOCGPKT = 0x5420, 0x80045438
TIOCSPTLCK, TIOCGPTLCK = 0x40045431, 0x80045439
TIOCGDEV = 0x80045432
TIOCGETD = 0x5424
TIOCGPGRP, TIOCGSID = 0x540F, 0x5429
PTY_SLAVE_MAJOR = 136  # to 143: Documentation/admin-guide/devices.txt
TTY_AUX_MAJOR = 5
MAX_INDEX = 4096

#: st_rdev (major, minor) of what this module is for, besides the slaves
DEV_TTY, DEV_PTMX = (TTY_AUX_MAJOR, 0), (TTY_AUX_MAJOR, 2)


class Settings(msgspec.Struct, frozen=True):
    """What belongs to the pty. `termios2` and `winsize` are the kernel's structures; pids are the pod's, 0: none."""

    termios2: bytes
    winsize: bytes
    session: int = 0
    foreground: int = 0
    exclusive: bool = False
    locked: bool = False
    packet: bool = False
    mode: int = 0o620
    uid: int = 0
    gid: int = 0
    queues: Queues = Queues()


class PtyMaster(msgspec.Struct, frozen=True, tag="pty_master"):
    """The master of pty `index`. `hangup`: its slave had been opened, and all have closed it."""

    index: int
    path: str
    hangup: bool = False
    settings: Settings | None = None


class PtySlave(msgspec.Struct, frozen=True, tag="pty_slave"):
    """A slave of pty `index`, or of the console (`console`). `path` may be /dev/tty: the controlling terminal."""

    index: int
    path: str
    console: bool = False
    settings: Settings | None = None


class HungUpTty(msgspec.Struct, frozen=True, tag="hungup_tty"):
    """A terminal whose other side is gone: it only gives end-of-file and EIO."""

    path: str


TtyStates = PtyMaster | PtySlave | HungUpTty


class ControllingTerminal(msgspec.Struct, frozen=True):
    """For the engine: the leader of `session` does TIOCSCTTY on descriptor `slot`; later TIOCSPGRP `foreground`."""

    slot: int
    session: int
    foreground: int


def is_tty(held: Held) -> bool:
    """Whether it is a terminal of a kind known here."""
    number = os.major(held.stat.st_rdev), os.minor(held.stat.st_rdev)
    slave = PTY_SLAVE_MAJOR <= number[0] < PTY_SLAVE_MAJOR + 8
    return held.kind == stat.S_IFCHR and (slave or number in (DEV_TTY, DEV_PTMX))


def get_int(fd: int, request: int) -> int:
    """An ioctl that gives an int."""
    (value,) = struct.unpack("i", fcntl.ioctl(fd, request, bytes(4)))
    return int(value)


# ----------------------------------------------------------------------------------------------- collect


def collect_ttys(group: list[Held], ctx: CollectContext, view: PodView) -> dict[int, TtyStates]:
    """States of all open terminals of the pod, by Held.id."""
    states: dict[int, TtyStates] = {}
    ptys: dict[int, list[Held]] = {}
    for held in group:
        index = _index(held)
        if index is None:
            states[held.id] = HungUpTty(path_text(held.link.removesuffix(b" (deleted)")))
        else:
            ptys.setdefault(index, []).append(held)
    for index, ends in ptys.items():
        states |= _collect_pty(index, ends, index in ctx.consoles, ctx, view)
    return states


def _is_master(held: Held) -> bool:
    return held.stat.st_rdev == os.makedev(*DEV_PTMX)


def _index(held: Held) -> int | None:
    """Number of the pty; None when it is hung up (every ioctl gives EIO then)."""
    try:
        if _is_master(held):
            return pty.pty_number(held.fd)
        device = get_int(held.fd, TIOCGDEV) & 0xFFFFFFFF
    except OSError:
        return None
    return os.minor(device) | (os.major(device) - PTY_SLAVE_MAJOR) << 8


def _collect_pty(
    index: int, ends: list[Held], console: bool, ctx: CollectContext, view: PodView
) -> dict[int, TtyStates]:
    first = ends[0]
    master = ctx.consoles[index] if console else next((e.fd for e in ends if _is_master(e)), None)
    if master is None:
        reason = "its master side is held by a process outside of the pod"
        if first.external(ctx, reason, close="a branch finds the terminal hung up") == "refuse":
            return {}
        return {end.id: HungUpTty(path_text(end.link)) for end in ends}
    if get_int(first.fd, TIOCGETD) != 0:
        first.refuse(ctx, "the terminal has a line discipline other than N_TTY")
        return {}
    has_slave = any(not _is_master(e) for e in ends)
    try:
        queues = Queues() if ctx.dry_run else _queues(index, master, has_slave, console, ctx)
    except ttyqueue.Unreadable as reason:
        first.refuse(ctx, f"bytes are under way in the terminal: {reason}", "try again when they have been read")
        return {}
    states: dict[int, TtyStates] = {}
    for end in ends:
        if _is_master(end):
            states[end.id] = PtyMaster(index, path_text(end.link), not has_slave and _hangs_up(end.fd))
        else:
            states[end.id] = PtySlave(index, _slave_path(end, index, view), console)
    settings = _settings(index, master, first, ctx, view, queues)
    states[first.id] = msgspec.structs.replace(states[first.id], settings=settings)
    return states


def _slave_path(held: Held, index: int, view: PodView) -> str:
    if held.stat.st_rdev == os.makedev(*DEV_TTY):
        return "/dev/tty"
    return path_text(view.current_name(held) or b"/dev/pts/%d" % index)


def _hangs_up(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


def _queues(index: int, master: int, has_slave: bool, console: bool, ctx: CollectContext) -> Queues:
    """What is queued. The slave side is looked at through a descriptor of our own, since it must not block."""
    packet = bool(get_int(master, TIOCGPKT))
    journal = ctx.image_dir / ttyqueue.JOURNAL
    if not has_slave:
        return ttyqueue.save(index, master, None, packet, not console, journal)
    try:
        slave = fcntl.ioctl(master, pty.TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:  # EIO: locked
        raise ttyqueue.Unreadable(f"it can't be opened ({error.strerror})") from error
    try:
        return ttyqueue.save(index, master, slave, packet, not console, journal)
    finally:
        os.close(slave)


def is_interrupted(image_dir: Path) -> bool:
    """Whether a checkpoint was killed while it had bytes of a terminal."""
    return ttyqueue.interrupted(image_dir / ttyqueue.JOURNAL) is not None


def recover(image_dir: Path, masters: Iterable[int]) -> None:
    """Put right what a killed checkpoint left: `masters` are those that the supervisor and the pod's processes have.

    If the terminal is gone, so are its readers, and the bytes are let go.
    """
    journal = image_dir / ttyqueue.JOURNAL
    index = ttyqueue.interrupted(journal)
    for master in masters:
        if index is None or pty.pty_number(master) != index:
            continue
        slave = fcntl.ioctl(master, pty.TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            ttyqueue.recover(journal, master, slave)
        finally:
            os.close(slave)
        return
    journal.unlink(missing_ok=True)


def _settings(
    index: int, master: int, held: Held, ctx: CollectContext, view: PodView, queues: Queues
) -> Settings:
    node = view.lookup(b"/dev/pts/%d" % index) or held.stat
    return Settings(
        termios2=fcntl.ioctl(master, ttyqueue.TCGETS2, bytes(ttyqueue.TERMIOS2_SIZE)),
        winsize=fcntl.ioctl(master, termios.TIOCGWINSZ, bytes(8)),
        session=_pod_pid(master, TIOCGSID, ctx),
        foreground=_pod_pid(master, TIOCGPGRP, ctx),
        exclusive=bool(get_int(master, TIOCGEXCL)),
        locked=bool(get_int(master, TIOCGPTLCK)),
        packet=bool(get_int(master, TIOCGPKT)),
        mode=stat.S_IMODE(node.st_mode),
        uid=node.st_uid,
        gid=node.st_gid,
        queues=queues,
    )


def _pod_pid(master: int, request: int, ctx: CollectContext) -> int:
    """Session or foreground group as the pod's number; 0 when there is none. Asked of the master: anybody may."""
    try:
        return pod_id(ctx, get_int(master, request))
    except OSError:  # ENOTTY: no session
        return 0


# ----------------------------------------------------------------------------------------------- restore


def restore_ttys(entries: list[tuple[int, int, TtyStates]], ctx: RestoreContext) -> tuple[dict[int, int], list[_Lead]]:
    """Make all terminals. Returns descriptors by OpenFile id, and what sessions need: (slave descriptor, settings)."""
    result: dict[int, int] = {}
    leads: list[_Lead] = []
    consoles: dict[int, list[tuple[int, int, PtySlave]]] = {}
    groups: dict[int, list[tuple[int, int, PtyMaster | PtySlave]]] = {}
    for number, flags, state in entries:
        if isinstance(state, HungUpTty):
            result[number] = _hung_up(flags)
        elif not 0 <= state.index < MAX_INDEX:
            raise Damaged(f"the image has an impossible pty number: {state.index}")
        elif isinstance(state, PtySlave) and state.console:
            consoles.setdefault(state.index, []).append((number, flags, state))
        else:
            groups.setdefault(state.index, []).append((number, flags, state))
    for index, slaves in consoles.items():
        path = f"/dev/pts/{index}".encode()
        slave = _open_slave(path)
        settings = next((s.settings for _, _, s in slaves if s.settings), None)
        _restore_slaves(result, slave, path, slaves)
        leads += _finish(slave, slave, settings)
    for index in sorted(groups):
        leads += _restore_pty(result, index, groups[index])
    return result, leads


_Lead = tuple[int, Settings]


def allocate(index: int, access: int = os.O_RDWR) -> int:
    """The master of pty number `index`: lower numbers that are free are taken and given back."""
    spare = []
    try:
        while True:
            master, number = pty.open_master("/dev/ptmx", access)
            if number == index:
                return master
            spare.append(master)
            if number > index:
                raise RestoreFailed(f"the pseudo terminal /dev/pts/{index} is taken already")
    finally:
        for fd in spare:
            os.close(fd)


def _open_slave(path: bytes) -> int:
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not os.isatty(fd):
        raise RestoreFailed(f"{path.decode()} is no terminal")
    return fd


def _hung_up(flags: int) -> int:
    master, index = pty.open_master("/dev/ptmx")
    slave = os.open(f"/dev/pts/{index}", flags & (os.O_ACCMODE | os.O_NONBLOCK) | os.O_NOCTTY | os.O_CLOEXEC)
    os.close(master)  # pty_close() hangs up the slave
    return slave


def _restore_pty(
    result: dict[int, int], index: int, ends: list[tuple[int, int, PtyMaster | PtySlave]]
) -> list[_Lead]:
    masters = [(n, f, s) for n, f, s in ends if isinstance(s, PtyMaster)]
    slaves = [(n, f, s) for n, f, s in ends if isinstance(s, PtySlave)]
    if len(masters) != 1:
        raise Damaged(f"the image has {len(masters)} masters of pty {index}")
    number, flags, state = masters[0]
    master = result[number] = allocate(index, flags & os.O_ACCMODE)
    path = b"/dev/pts/%d" % index
    settings = next((s.settings for _, _, s in ends if s.settings), None)
    wants_slave = bool(slaves or state.hangup or (settings and (settings.session or settings.queues)))
    slave = _open_slave(path) if wants_slave else None
    if slave is not None:
        _restore_slaves(result, slave, path, slaves)
    leads = _finish(master, slave, settings)
    if settings:
        os.chown(path, settings.uid, settings.gid)
        os.chmod(path, settings.mode & 0o7777)
        fcntl.ioctl(master, TIOCPKT, struct.pack("i", settings.packet))
        fcntl.ioctl(master, TIOCSPTLCK, struct.pack("i", settings.locked))
    return leads


def _restore_slaves(
    result: dict[int, int], slave: int, path: bytes, ends: list[tuple[int, int, PtySlave]]
) -> None:
    for number, flags, state in ends:
        if state.path == "/dev/tty":
            result[number] = _open_as_dev_tty(slave, flags)
            continue
        name = path if state.console and state.path.startswith("/dev/pts/") else path_bytes(state.path)
        fd = os.open(name, flags & (os.O_ACCMODE | os.O_NONBLOCK) | os.O_NOCTTY | os.O_CLOEXEC)
        if os.fstat(fd).st_rdev != os.fstat(slave).st_rdev:
            os.close(fd)
            raise RestoreFailed(f"{state.path} is not the terminal that it was")
        result[number] = fd


def _finish(control: int, slave: int | None, settings: Settings | None) -> list[_Lead]:
    """Settings and queues; `control` is the master, or of the console its slave. `slave` is used up."""
    leads = []
    if settings:
        apply_settings(control, settings)
        queues = settings.queues
        if slave is not None:
            ttyqueue.put_input(slave, settings.termios2, list(queues.lines), queues.partial)
            leads.append((os.dup(slave), settings))
        if queues.output and control != slave:
            ttyqueue.put_output(control, queues.output)
    if slave is not None:
        os.close(slave)
    return leads


def apply_settings(fd: int, settings: Settings) -> None:
    """termios, window size and exclusive mode, through either side."""
    if len(settings.termios2) != ttyqueue.TERMIOS2_SIZE or len(settings.winsize) != 8:
        raise Damaged("the image's terminal settings have the wrong size")
    fcntl.ioctl(fd, ttyqueue.TCSETS2, settings.termios2)
    fcntl.ioctl(fd, termios.TIOCSWINSZ, settings.winsize)
    if settings.exclusive:
        fcntl.ioctl(fd, TIOCEXCL)


def _open_as_dev_tty(slave: int, flags: int) -> int:
    """Open /dev/tty: this process becomes a session leader with that terminal for a moment, and gives it up again.

    TIOCNOTTY signals the foreground group, which is the caller's own.
    """
    if os.getsid(0) != os.getpid():
        os.setsid()
    before = [(s, signal.signal(s, signal.SIG_IGN)) for s in (signal.SIGHUP, signal.SIGCONT)]
    try:
        pty.make_controlling(slave)
        try:
            return os.open("/dev/tty", flags & (os.O_ACCMODE | os.O_NONBLOCK) | os.O_CLOEXEC)
        finally:
            fcntl.ioctl(slave, termios.TIOCNOTTY)
    finally:
        for number, handler in before:
            signal.signal(number, handler)
