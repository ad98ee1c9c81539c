"""The verbs of the command line for Python programs: pools, pods, checkpoints.

    import podtree
    pod = podtree.Pod.run("python3", "train.py", name="train")
    checkpoint = pod.checkpoint("before the change")
    for branch in checkpoint.branch(n=3):
        print(branch.exec("cat", "result").stdout)
    pod.rewind(checkpoint)

Objects are handles: they hold an id, and look up what changes (state, name, tags) each time they are asked.
Everything raises podtree.errors.PodtreeError's family. Pods are started by an interpreter of their own, so
nothing of the calling program (memory, threads, descriptors) lives on in them.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from podtree.errors import Conflict, Problem, UsageError
from podtree.objects.external import policy
from podtree.pod import control, rootfs
from podtree.pod import spec as specs
from podtree.pod.spec import PodSpec, StdioMode
from podtree.pool.pending import State
from podtree.pool.pool import Pool as Store
from podtree.pool.records import CheckpointId, CheckpointRecord, PodId, PodRecord
from podtree.recorder import settings as recorder

_STDOUT, _STDERR = 1, 2


@dataclass(frozen=True, slots=True)
class Completed:
    """What a command run with Pod.exec gave; `returncode` is 128 + n for signal n."""

    returncode: int
    stdout: bytes
    stderr: bytes


class Pool:
    """Where pods and checkpoints are kept. `Pool()` is the one that PODTREE_HOME names."""

    def __init__(self, home: str | os.PathLike[str] | None = None) -> None:
        self.store = Store.open(None if home is None else Path(home))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the pool; pods go on."""
        self.store.close()

    def run(
        self,
        *argv: str,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        hostname: str | None = None,
        user: str = "",
        tty: bool = False,
        interactive: bool = False,
        volumes: Iterable[str] = (),
        root: str | None = None,
        memory: int | str | None = None,
        cpus: float | None = None,
        pids: int | None = None,
        auto_remove: bool = False,
        nested: bool = False,
        external: str | None = None,
        every: str | None = None,
    ) -> Pod:
        """A new pod in the background. `volumes` as -v's arguments, `memory` in bytes or like "512m".

        `nested`: its programs may make user namespaces.
        `external`: what becomes, in its checkpoints, of what it shares with the outside: "refuse", "keep" or "close".
        `every`: the pod is recorded from its beginning, see Pod.start_recording.
        """
        stdio: StdioMode = "tty" if tty else "pipes" if interactive else "log"
        spec = PodSpec(
            argv=argv,
            env={**specs.environment((), host_root=root is None, tty=tty), **(env or {})},
            cwd=specs.working_directory(cwd, host_root=root is None),
            hostname=hostname or "",
            user=user,
            stdio=stdio,
            interactive=interactive,
            volumes=tuple(specs.parse_volume(text) for text in volumes),
            rootfs=rootfs.prepare(self.store.root, root) if root else None,
            memory=specs.parse_size(memory) if isinstance(memory, str) else memory,
            cpus=cpus,
            pids=pids,
            auto_remove=auto_remove,
            nested=nested,
            external=policy(external) or "refuse",
        )
        recorded = None if every is None else recorder.make(every)
        result = control.run(self.store, name, spec, spawn=True, recorded=recorded)
        return Pod(self, PodId(result["id"]))

    def pod(self, ref: str) -> Pod:
        """The pod of that name or id. Raises NotFound."""
        return Pod(self, self.store.pod(ref).id)

    def pods(self) -> list[Pod]:
        """All pods, oldest first."""
        return [Pod(self, record.id) for record in self.store.pods()]

    def checkpoint(self, ref: str) -> Checkpoint:
        """The checkpoint that `ref` names: id, pod@N, pod@latest, pod@10s, pod@"time", tag."""
        return Checkpoint(self, self.store.resolve(ref).id)

    def checkpoints(self) -> list[Checkpoint]:
        """All checkpoints, oldest first."""
        return [Checkpoint(self, record.id) for record in self.store.checkpoints()]

    def import_checkpoint(
        self,
        source: str | os.PathLike[str] | BinaryIO,
        *,
        volumes: Iterable[str] = (),
        root: str | None = None,
        tag: str | None = None,
    ) -> Checkpoint:
        """Take in what Checkpoint.export has written: a file, an OCI layout in a directory, or a stream.

        `volumes` and `root`: what -v's directories and --rootfs of its pod are here. Raises Damaged, Conflict,
        NotFound, Unsupported; then the pool is as it was.
        """
        from podtree.transfer.load import load

        shown = tuple(specs.parse_volume(text) for text in volumes)
        with contextlib.ExitStack() as scope:
            stream: Path | BinaryIO
            if not isinstance(source, str | os.PathLike):
                stream = source
            elif Path(source).is_dir():
                stream = Path(source)
            else:
                stream = scope.enter_context(open(source, "rb"))
            return Checkpoint(self, load(self.store, stream, volumes=shown, rootfs=root, tag=tag).id)


class Pod:
    """One pod."""

    def __init__(self, pool: Pool, pod_id: PodId) -> None:
        self.pool = pool
        self.id = pod_id

    def __repr__(self) -> str:
        return f"<podtree.Pod {self.id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pod) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    @classmethod
    def run(cls, *argv: str, **options: Any) -> Pod:
        """Pool.run in the pool of PODTREE_HOME."""
        return Pool().run(*argv, **options)

    @property
    def record(self) -> PodRecord:
        """What the pool knows of it now."""
        return self.pool.store.pod(self.id)

    @property
    def name(self) -> str:
        """Its name."""
        return self.record.name

    @property
    def state(self) -> str:
        """created, running, stopped, exited or lost."""
        return self.record.state.value

    @property
    def pid(self) -> int | None:
        """Host pid of its first process, None unless it runs."""
        record = self.record
        return record.init_pid if record.is_running else None

    @property
    def log(self) -> bytes:
        """What it has written."""
        return control.dirs_of(self.pool.store, self.id).log.read_bytes()

    def exec(
        self,
        *argv: str,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
    ) -> Completed:
        """Run a command inside and wait for it. TimeoutError after `timeout` seconds: it is killed then."""
        extra = tuple(f"{key}={value}" for key, value in (env or {}).items())
        client, result = control.execute(
            self.pool.store, self.record, argv, stdio="pipes", env=extra, cwd=cwd, user=user
        )
        with client:
            return _communicate(client, result["pid"], stdin, timeout)

    def spawn(self, *argv: str, env: Mapping[str, str] | None = None, cwd: str | None = None) -> int:
        """Start a command inside whose output goes nowhere; its host pid."""
        extra = tuple(f"{key}={value}" for key, value in (env or {}).items())
        client, result = control.execute(
            self.pool.store, self.record, argv, stdio="null", env=extra, cwd=cwd, attach=False
        )
        client.close()
        return int(result["pid"])

    def checkpoint(
        self,
        message: str = "",
        *,
        stop: bool = False,
        tag: str | None = None,
        wait: bool = True,
        external: str | None = None,
    ) -> Checkpoint:
        """Save it. Raises Refused, with the problems, when something in it can't be saved.

        Without `wait` it is only captured on return; see Checkpoint.state and Checkpoint.wait.
        `external`: what becomes of what it shares with the outside: "refuse", "keep" or "close"; None: as it was run.
        """
        result = control.checkpoint(
            self.pool.store, self.record, message=message, stop=stop, tag=tag, no_wait=not wait, external=external
        )
        return Checkpoint(self.pool, CheckpointId(result["id"]))

    def mark(self, text: str) -> Checkpoint:
        """A checkpoint for a moment that is worth keeping; `text` says why."""
        result = control.mark(self.pool.store, self.record, text)
        return Checkpoint(self.pool, CheckpointId(result["id"]))

    def checkpoints(self) -> list[Checkpoint]:
        """Its checkpoints, oldest first."""
        return [Checkpoint(self.pool, record.id) for record in self.pool.store.checkpoints(self.id)]

    def start_recording(
        self,
        every: str = "1s",
        *,
        budget: str | None = None,
        last: int | None = None,
        within: str | None = None,
        minutely: int | None = None,
        hourly: int | None = None,
        daily: int | None = None,
        marks: int | None = None,
        max_size: str | None = None,
        external: str | None = None,
    ) -> None:
        """Take a checkpoint every so often, from now on. The words are those of `podtree record`."""
        settings = recorder.make(
            every, budget, last=last, within=within, minutely=minutely, hourly=hourly, daily=daily, marks=marks,
            max_size=max_size, external=external,
        )
        control.record(self.pool.store, self.record, settings)

    @property
    def recording(self) -> dict[str, Any] | None:
        """How its recorder does: every_ms, taken, skipped, failed, error...; None if it isn't recorded."""
        try:
            return control.record(self.pool.store, self.record)
        except Conflict:
            return None

    def stop_recording(self) -> None:
        """The reverse of `start_recording`; what was recorded stays."""
        control.record(self.pool.store, self.record, off=True)

    def check(self, *, external: str | None = None) -> list[Problem]:
        """What would keep a checkpoint from working now. `external` as in `checkpoint`."""
        return control.check(self.pool.store, self.record, external=external)

    def rewind(self, to: Checkpoint | str) -> None:
        """Put it back, in place."""
        target = to.record if isinstance(to, Checkpoint) else self.pool.store.resolve(to)
        control.rewind(self.pool.store, self.record, target, spawn=True)

    def stop(self, timeout: float = 10) -> int:
        """SIGTERM, SIGKILL after `timeout` seconds; the exit code."""
        return control.stop(self.pool.store, self.record, timeout)

    def kill(self, signal: int | str = "KILL") -> None:
        """A signal to its first process."""
        number = int(signal) if isinstance(signal, int) else control.parse_signal(signal)
        control.send_signal(self.pool.store, self.record, number)

    def wait(self) -> int:
        """The exit code, once it has ended: 128 + n for signal n."""
        return control.wait(self.pool.store, self.record)

    def commit(self, origin: Pod) -> None:
        """Take the place of the pod that it was branched from, which is ended."""
        control.commit(self.pool.store, self.record, origin.record)

    def remove(self, *, force: bool = False) -> None:
        """Remove it; a running one only with `force`."""
        control.remove(self.pool.store, self.record, force=force)


class Checkpoint:
    """One checkpoint: a frozen instant of a pod's processes and files."""

    def __init__(self, pool: Pool, checkpoint_id: CheckpointId) -> None:
        self.pool = pool
        self.id = checkpoint_id

    def __repr__(self) -> str:
        return f"<podtree.Checkpoint {self.id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Checkpoint) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def record(self) -> CheckpointRecord:
        """What the pool knows of it now."""
        return self.pool.store.checkpoint(self.id)

    @property
    def state(self) -> str:
        """captured, written, durable or lost. Raises NotFound."""
        coming = self.pool.store.pending(self.id)
        if coming is not None:
            return coming.state.value
        _record = self.record
        return State.DURABLE.value

    def wait(self) -> None:
        """Until it is durable. Raises Damaged if it is lost."""
        control.durable(self.pool.store, self.id)

    @property
    def ref(self) -> str:
        """pod@N."""
        return self.record.ref

    @property
    def time(self) -> datetime:
        """The frozen instant."""
        return self.record.time

    @property
    def message(self) -> str:
        """What it was taken for."""
        return self.record.message

    @property
    def summary(self) -> dict[str, Any]:
        """pause_ms, total_ms, bytes_written, processes."""
        return self.record.summary

    @property
    def parent(self) -> Checkpoint | None:
        """The one before it."""
        parent = self.record.parent
        return None if parent is None else Checkpoint(self.pool, parent)

    def branch(self, n: int = 1, name: str | None = None) -> list[Pod]:
        """`n` new running pods from here; with a name and several: name-1, name-2..."""
        if n < 1:
            raise UsageError("branch: n must be at least 1")
        names = control.branch_names(self.pool.store, name, n)
        results = list(control.start_branches(self.pool.store, self.record, names, spawn=True))
        return [Pod(self.pool, PodId(result["id"])) for result in results]

    def tag(self, name: str) -> None:
        """Name it; a tagged checkpoint isn't removed."""
        self.pool.store.tag(name, self.id)

    def export(
        self,
        output: str | os.PathLike[str] | BinaryIO,
        *,
        since: Checkpoint | str | None = None,
        with_base: bool = False,
    ) -> dict[str, Any]:
        """Write it to a file or stream, for Pool.import_checkpoint; with `since` only what differs from that one.

        `with_base`: with all files below the pod. Returns id, digest, bytes, ...
        """
        from podtree.transfer.export import export, to_file

        store = self.pool.store
        other = since.record if isinstance(since, Checkpoint) else since and store.resolve(since)

        def write(out: BinaryIO) -> Any:
            return export(store, self.record, out, since=other or None, with_base=with_base)

        done = to_file(os.fspath(output), write) if isinstance(output, str | os.PathLike) else write(output)
        result: dict[str, Any] = msgspec.to_builtins(done)
        return result

    def discard(self) -> None:
        """Remove it; what descends from it stays."""
        self.pool.store.discard(self.record)


def _communicate(client: control.Client, pid: int, stdin: bytes, timeout: float | None) -> Completed:
    """Feed stdin while output comes in, until the exit code does."""
    out: dict[int, bytearray] = {_STDOUT: bytearray(), _STDERR: bytearray()}
    deadline = None if timeout is None else time.monotonic() + timeout
    frames: list[dict[str, Any]] = [{"in": stdin[at : at + (1 << 16)]} for at in range(0, len(stdin), 1 << 16)]
    pending = bytearray(b"".join(control.frame(message) for message in [*frames, {"eof": True}]))
    while True:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            with contextlib.suppress(OSError):
                client.send({"signal": 9})
            raise TimeoutError(f"process {pid}: not done after {timeout} s")
        readable, writable, _ = select.select([client.sock], [client.sock] if pending else [], [], left)
        if writable:
            with contextlib.suppress(OSError):  # never waiting here: the command may want to write first
                del pending[: client.sock.send(pending[: 1 << 18], socket.MSG_DONTWAIT)]
        if readable:
            message = client.receive()
            if message is None:
                raise ConnectionError("the pod's supervisor ended; whether the command did isn't known")
            if "out" in message:
                out[message["fd"]] += message["out"]
            elif "exit" in message:
                return Completed(int(message["exit"]), bytes(out[_STDOUT]), bytes(out[_STDERR]))
