"""What the pool knows of pods and checkpoints: frozen records, and the ids they are known by."""

from __future__ import annotations

import enum
import hashlib
import os
from datetime import datetime
from typing import Any, NamedTuple, NewType

import msgspec

PodId = NewType("PodId", str)
CheckpointId = NewType("CheckpointId", str)

ID_DIGITS = 12


def new_id() -> str:
    """12 random lower-case hex digits; pods and checkpoints share the space."""
    return os.urandom(ID_DIGITS // 2).hex()


class PodState(enum.StrEnum):
    """Where a pod is in its life.

    LOST is never stored: it is how a pod shows that was running when its machine (or its
    supervisor) went down, so that nobody could note its end.
    """

    CREATED = "created"
    RUNNING = "running"
    STOPPED = "stopped"  # ended by a checkpoint that was asked to stop it
    EXITED = "exited"
    LOST = "lost"


class PodRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One pod. `parent` is the checkpoint it was branched from, `head` the one its live state descends from.

    `init_pid` is the host's number of the pod's first process, None unless running.
    """

    id: PodId
    name: str
    state: PodState
    created_ns: int  # CLOCK_REALTIME
    parent: CheckpointId | None
    head: CheckpointId | None
    spec: dict[str, Any]
    init_pid: int | None = None
    monitor_pid: int | None = None
    exit_code: int | None = None
    ended_ns: int | None = None
    removed: bool = False

    @property
    def created(self) -> datetime:
        """When it was made, in local time with its zone."""
        return to_datetime(self.created_ns)

    @property
    def ended(self) -> datetime | None:
        """When it ended, in local time with its zone; None if it hasn't, or nobody knows."""
        return None if self.ended_ns is None else to_datetime(self.ended_ns)

    @property
    def is_running(self) -> bool:
        """Whether its processes are there now."""
        return self.state is PodState.RUNNING


class CheckpointRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint. `number` counts within its pod from 1 and is never used again: pod@number."""

    id: CheckpointId
    pod: PodId
    pod_name: str
    number: int
    parent: CheckpointId | None
    time_ns: int  # CLOCK_REALTIME of the frozen instant
    message: str = ""
    summary: dict[str, Any] = {}
    tags: tuple[str, ...] = ()

    @property
    def time(self) -> datetime:
        """The frozen instant, in local time with its zone."""
        return to_datetime(self.time_ns)

    @property
    def ref(self) -> str:
        """The name a person knows it by: pod@number."""
        return f"{self.pod_name}@{self.number}"


class Moment(NamedTuple):
    """A recorded checkpoint: CLOCK_REALTIME in ns, id, bytes written. `marked`: it is worth keeping, and so is the one
    `before`.
    """

    time_ns: int
    id: CheckpointId
    size: int = 0
    before: CheckpointId | None = None
    marked: bool = False


class CheckpointMeta(msgspec.Struct, frozen=True, kw_only=True):
    """`meta.json` in a checkpoint's directory: what the index says of it, so that it can be read without one."""

    version: int
    id: CheckpointId
    pod: PodId
    pod_name: str
    number: int
    parent: CheckpointId | None
    time_ns: int
    message: str
    summary: dict[str, Any]
    spec: dict[str, Any]
    digest: str = ""

    def sealed(self) -> CheckpointMeta:
        """The same with its digest: blake2b-256, in hex digits, of the JSON of the rest, keys sorted, no spaces."""
        plain = msgspec.json.encode(msgspec.structs.replace(self, digest=""), order="sorted")
        return msgspec.structs.replace(self, digest=hashlib.blake2b(plain, digest_size=32).hexdigest())

    def is_whole(self) -> bool:
        """Whether it is as it was written; version 1 had no digest."""
        return self.version == 1 or self.digest == self.sealed().digest


def to_datetime(ns: int) -> datetime:
    """CLOCK_REALTIME nanoseconds as local time with its zone."""
    return datetime.fromtimestamp(ns / 1e9).astimezone()
