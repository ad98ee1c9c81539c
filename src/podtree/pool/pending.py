"""Checkpoints on their way: the pod runs on (captured), they lie in the pool (written), they are durable.

Only durable ones are in the index. The others are noted in a small file of their pod's directory, so that everybody can
see them, and that one which was captured and then could not be written isn't just gone: it is lost, and said to be.
"""

from __future__ import annotations

import enum
import os
from pathlib import Path

import msgspec

from podtree.pool import liveness
from podtree.pool.records import CheckpointId

NAME = "pending.json"
_LOST_KEPT = 20


class State(enum.StrEnum):
    """How far a checkpoint has got."""

    CAPTURED = "captured"  # copied: in memory, and in the pod's live directories
    WRITTEN = "written"  # its snapshots are made, and on the disk
    DURABLE = "durable"  # and the index knows it: it is there after a power cut, too
    LOST = "lost"  # it was captured, and could not be written


class Pending(msgspec.Struct, frozen=True, kw_only=True):
    """One that isn't durable. `pid`, `start`, `boot`: the process that writes it; `error`: why it is lost. `told`:
    somebody knows its id and doesn't wait for it; of the others only their number is shown (`podtree top`).
    """

    id: CheckpointId
    state: State
    time_ns: int  # CLOCK_REALTIME of the frozen instant
    message: str = ""
    told: bool = True
    pid: int = 0
    start: int = 0
    boot: str = ""
    error: str = ""


def begun(checkpoint: CheckpointId, message: str, time_ns: int, *, told: bool = True) -> Pending:
    """A note of this process's: captured."""
    pid = os.getpid()
    return Pending(
        id=checkpoint, state=State.CAPTURED, time_ns=time_ns, message=message, told=told,
        pid=pid, start=liveness.start_time(pid) or 0, boot=liveness.boot_id(),
    )  # fmt: skip


def read(directory: Path) -> list[Pending]:
    """What a pod's directory tells, oldest first. Those whose writer is gone are lost."""
    try:
        notes = msgspec.json.decode((directory / NAME).read_bytes(), type=list[Pending])
    except (OSError, ValueError):  # also one cut off by a power failure: the memory that it told of is gone, too
        return []
    return [_as_it_is(note) for note in notes]


def _as_it_is(note: Pending) -> Pending:
    if note.state is State.LOST or liveness.is_alive(note.pid, note.start, note.boot):
        return note
    return msgspec.structs.replace(note, state=State.LOST, error="the process that was writing it ended")


def note(directory: Path, new: Pending) -> None:
    """Tell how far it is. The pod's lock must be held."""
    _write(directory, [*(old for old in read(directory) if old.id != new.id), new])


def forget(directory: Path, checkpoint: CheckpointId) -> None:
    """It is durable now, or nobody has been told of it. The pod's lock must be held."""
    _write(directory, [old for old in read(directory) if old.id != checkpoint])


def forget_lost(directory: Path) -> None:
    """Whoever wanted to know has seen it. The pod's lock must be held."""
    notes = read(directory)
    if any(note.state is State.LOST for note in notes):
        _write(directory, [note for note in notes if note.state is not State.LOST])


def _write(directory: Path, notes: list[Pending]) -> None:
    """Not synced: whoever believes what was only captured has been told that it may be lost."""
    draft = directory / f"{NAME}.new"
    draft.write_bytes(msgspec.json.encode(notes[-_LOST_KEPT:]))
    os.rename(draft, directory / NAME)
