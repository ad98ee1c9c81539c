"""The index: which pods, checkpoints and tags there are, in SQLite.

A row is inserted only after what it speaks of is durable on disk, and deleted before that is
removed; so whatever is on disk without a row is garbage, and a row without its directory is damage.

A rollback journal with synchronous=FULL: a transaction that returned survives a power cut. WAL would
save 1.5 ms a transaction, but it maps its -shm file, and on a copy-on-write file system that is full
a write to such a page ends the process with SIGBUS.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from podtree.errors import Conflict, Damaged, PodtreeError, UsageError

SCHEMA_VERSION = 1
BUSY_SECONDS = 30.0
REMEDY = "podtree fsck tells what is left; podtree pool rebuild makes the index again from that"

_SCHEMA = """
CREATE TABLE pods (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    created_ns INTEGER NOT NULL,
    parent TEXT REFERENCES checkpoints(id),
    head TEXT REFERENCES checkpoints(id),
    base TEXT NOT NULL DEFAULT '',
    next_number INTEGER NOT NULL DEFAULT 1,
    state TEXT NOT NULL,
    init_pid INTEGER,
    init_start INTEGER,
    monitor_pid INTEGER,
    monitor_start INTEGER,
    boot_id TEXT,
    exit_code INTEGER,
    ended_ns INTEGER,
    removed INTEGER NOT NULL DEFAULT 0,
    spec TEXT NOT NULL
) STRICT;
CREATE UNIQUE INDEX pods_by_name ON pods(name) WHERE NOT removed;
CREATE INDEX pods_by_parent ON pods(parent);
CREATE INDEX pods_by_head ON pods(head);
CREATE TABLE checkpoints (
    id TEXT PRIMARY KEY,
    pod TEXT NOT NULL REFERENCES pods(id),
    number INTEGER NOT NULL,
    parent TEXT REFERENCES checkpoints(id),
    time_ns INTEGER NOT NULL,
    message TEXT NOT NULL,
    summary TEXT NOT NULL,
    UNIQUE (pod, number)
) STRICT;
CREATE INDEX checkpoints_by_parent ON checkpoints(parent);
CREATE INDEX checkpoints_by_time ON checkpoints(pod, time_ns);
CREATE TABLE tags (
    name TEXT PRIMARY KEY,
    checkpoint TEXT NOT NULL REFERENCES checkpoints(id),
    created_ns INTEGER NOT NULL
) STRICT;
CREATE INDEX tags_by_checkpoint ON tags(checkpoint);
"""

_STATEMENTS = tuple(statement.strip() for statement in _SCHEMA.split(";") if statement.strip())

Row = sqlite3.Row


class Index:
    """One connection to the index, made anew in a forked child. Threads take turns."""

    def __init__(self, path: str, before_write: Callable[[], None] = lambda: None) -> None:
        """`before_write` is called ahead of every transaction, to see that there is room for it.

        The index has to be there (see `create`): an empty one in the place of a lost one would make garbage of
        all checkpoints.
        """
        self.path = path
        self._before_write = before_write
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._pid = 0
        self._file: tuple[int, int] | None = None
        self._inherited: list[sqlite3.Connection] = []

    def _connect(self) -> sqlite3.Connection:
        if self._connection is not None and self._pid == os.getpid():
            if self._connection.in_transaction or self._is_current():
                return self._connection
            self.close()
        if self._connection is not None:
            self._inherited.append(self._connection)  # the parent's: closing it here would confuse SQLite
        connection = _open(self.path, "rw")
        try:
            self._set_up(connection)
        except BaseException:
            connection.close()
            raise
        self._connection, self._pid, self._file = connection, os.getpid(), _file_id(self.path)
        return connection

    def _is_current(self) -> bool:
        """Whether the connection is to the file of that name: `podtree pool rebuild` replaces it at any time."""
        return _file_id(self.path) == self._file

    def _set_up(self, connection: sqlite3.Connection) -> None:
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode = TRUNCATE")
        connection.execute("PRAGMA synchronous = FULL")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            raise Damaged(f"the index {self.path} is empty", REMEDY)
        if version != SCHEMA_VERSION:
            raise Damaged(
                f"the index {self.path} has version {version}, this podtree knows {SCHEMA_VERSION}",
                "use the podtree that made it, or a newer one",
            )
        schema = connection.execute("SELECT sql FROM sqlite_schema WHERE sql NOT NULL")
        if {row[0] for row in schema} != set(_STATEMENTS):
            raise Damaged(f"the index {self.path} has other tables than it was made with", REMEDY)
        connection.execute("PRAGMA foreign_keys = ON")

    def close(self) -> None:
        """Close the connection; it is opened again at the next use."""
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
                self._connection = None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError:
            raise  # a constraint: the caller knows what it means
        except UnicodeEncodeError as error:
            raise UsageError(f"not valid UTF-8: {error.object!r}") from None
        except sqlite3.DatabaseError as error:
            raise self._explained(error) from None
        except UnicodeDecodeError:  # of a name that SQLite wanted to complain about
            raise Damaged(f"the index {self.path} is damaged", REMEDY) from None

    def _explained(self, error: sqlite3.DatabaseError) -> PodtreeError:
        """What SQLite's error means here; numbers without a code (text that isn't UTF-8) are damage, too."""
        match getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF:
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                return Conflict(f"the index {self.path} is busy", "another podtree command hangs?")
            case sqlite3.SQLITE_FULL:
                return PodtreeError(f"no room for the index {self.path}", "free space on the disk")
            case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM | sqlite3.SQLITE_INTERRUPT | sqlite3.SQLITE_NOMEM:
                return PodtreeError(f"the index {self.path}: {error}")
            case sqlite3.SQLITE_CANTOPEN if not os.path.exists(self.path):
                return Damaged(f"the index {self.path} is missing", REMEDY)
        return Damaged(f"the index {self.path} is damaged: {error}", REMEDY)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, durable on return. No other writer is in between (BEGIN IMMEDIATE)."""
        with self._lock, self._errors():
            self._before_write()
            connection = self._connect()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """Several reads that see the same state."""
        with self._lock, self._errors():
            connection = self._connect()
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                connection.execute("COMMIT")

    def rows(self, sql: str, *args: Any) -> list[Row]:
        """One query."""
        with self._lock, self._errors():
            try:
                return self._connect().execute(sql, args).fetchall()
            except UnicodeEncodeError:  # what is stored is text: nothing equals a word that isn't
                return []

    def row(self, sql: str, *args: Any) -> Row | None:
        """One query that has at most one answer."""
        rows = self.rows(sql, *args)
        return rows[0] if rows else None

    def check(self) -> list[str]:
        """What SQLite itself finds wrong with the file."""
        found: list[str] = []
        try:
            with self._errors():
                connection = self._connect()
                for (text,) in connection.execute("PRAGMA integrity_check(20)"):
                    if text != "ok":
                        found.append(str(text))
                for table, _rowid, other, _key in connection.execute("PRAGMA foreign_key_check"):
                    found.append(f"a row of {table} refers to a missing row of {other}")
        except PodtreeError as error:
            found.append(error.message)
        return found


def _file_id(path: str) -> tuple[int, int] | None:
    try:
        info = os.stat(path)
    except FileNotFoundError:
        return None
    return info.st_dev, info.st_ino


def _open(path: str, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"{Path(path).as_uri()}?mode={mode}",
        uri=True,
        timeout=BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )


def create(path: str) -> None:
    """Make a new index, unless there is one. Raises sqlite3.Error."""
    connection = _open(path, "rwc")
    try:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
            for statement in _STATEMENTS:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    finally:
        connection.close()
