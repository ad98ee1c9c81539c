"""Talking to supervisors: starting one, and asking one. What the commands and the Python API are made of."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from podtree.errors import Conflict, Damaged, NotFound, PodtreeError, Problem, UsageError, as_text
from podtree.objects.external import policy
from podtree.pod import keeper, nursery, wire
from podtree.pod import metrics as counted
from podtree.pod import spec as specs
from podtree.pod.dirs import PodDirs
from podtree.pod.keeper import CONTROL
from podtree.pod.nursery import Start
from podtree.pod.spec import PodSpec, StdioMode
from podtree.pool import refs
from podtree.pool.pending import State
from podtree.pool.pool import Pool
from podtree.pool.records import CheckpointRecord, PodRecord, PodState, new_id
from podtree.pool.retention import Removed
from podtree.recorder.settings import Settings

Done = TypeVar("Done")
_LOOK_S = 0.02  # between two looks at whether a checkpoint is durable
_CHANGES = 3  # how often another command may end or start a pod between two attempts
_ATTEMPTS = 100  # others may be quicker with the same invented name
_HELPERS = 3  # running pods whose keepers are asked to fork another


def frame(message: dict[str, Any]) -> bytes:
    """A message as it goes over the socket."""
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(4, "little") + data


class Client:
    """A connection to a supervisor. Calls block; attached, frames are received one by one."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self.sock.close()

    def send(self, message: dict[str, Any]) -> None:
        """One frame; raises OSError when the supervisor is gone."""
        self.sock.sendall(frame(message))

    def receive(self) -> dict[str, Any] | None:
        """The next frame, None at the end."""
        head = self._exactly(4)
        data = None if head is None else self._exactly(int.from_bytes(head, "little"))
        if data is None:
            return None
        message: dict[str, Any] = msgspec.msgpack.decode(data)
        return message

    def call(self, do: str, **args: Any) -> dict[str, Any]:
        """Ask for something; raises what the supervisor raised."""
        try:
            self.send({"do": do, **args})
        except OSError as error:
            raise Conflict("the pod's supervisor is gone", "podtree ps tells whether the pod has ended") from error
        return self.reply()

    def reply(self) -> dict[str, Any]:
        """The answer to what was asked."""
        message = self.receive()
        if message is None:
            raise PodtreeError("the pod's supervisor ended in the middle of this", "is the pod still there? podtree ps")
        if "error" in message:
            raise wire.decode_error(message)
        result: dict[str, Any] = message["ok"]
        return result

    def _exactly(self, size: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < size:
            try:
                part = self.sock.recv(min(size - len(parts), 1 << 20))
            except ConnectionError:
                return None
            if not part:
                return None
            parts += part
        return bytes(parts)


def dirs_of(pool: Pool, pod_id: str) -> PodDirs:
    """Where the pod's things are."""
    home = Path(os.path.realpath(pool.home))
    return PodDirs(home, home / "pool" / "pods" / pod_id, home / "run" / pod_id)


def connect(pool: Pool, pod: PodRecord, patience_s: float = 2.0) -> Client:
    """Connect to a running pod's supervisor. Raises Conflict when the pod has ended.

    A supervisor that is being replaced is waited for: the socket is its keeper's.
    """
    run = dirs_of(pool, pod.id).run
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return Client(nursery.connect(run, CONTROL))
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            if time.monotonic() > deadline or not pool.pod(pod.id).is_running:
                raise Conflict(f"pod {pod.name} is not running", "podtree ps lists the states") from None
            time.sleep(0.01)


def call(pool: Pool, pod: PodRecord, do: str, **args: Any) -> dict[str, Any]:
    """One request to a pod's supervisor."""
    with connect(pool, pod) as client:
        return client.call(do, **args)


def start(
    pool: Pool,
    pod: PodRecord,
    *,
    restore: bool = False,
    rewind: str | None = None,
    attach: bool = False,
    size: tuple[int, int] | None = None,
    spawn: bool = False,
) -> tuple[Client, dict[str, Any]]:
    """Start a pod's keeper and supervisor, and by them the pod; returns once the pod runs.

    The result has pod, id, pid, ready_ms. The client is attached to the pod's stdio if that was asked for.
    `spawn`: by a new interpreter, for callers that are more than this command: their memory, their threads
    and their descriptors then don't live on in a copy. Raises what keeps the pod from starting.
    """
    dirs = dirs_of(pool, pod.id)
    params = Start(home=str(dirs.home), pod_id=pod.id, restore=restore, rewind=rewind, attach=attach, size=size)
    client, _ = _ask_for(pool, params, None, spawn)
    try:
        return client, client.reply()
    except BaseException:
        client.close()
        raise


def _ask_for(pool: Pool, params: Start, origin: str | None, spawn: bool) -> tuple[Client, bool]:
    """Have what `params` say started, with the help of a running pod's keeper, `origin`'s first, or without; the
    reply is still to come. Second: whether there was help.
    """
    helped = nursery.ask(params, _helpers(pool, origin)) if params.needs_engine else None
    return Client(helped or _start_afresh(pool, params, spawn)), helped is not None


def _helpers(pool: Pool, origin: str | None) -> Iterator[Path]:
    """The run directories of running pods, `origin`'s first."""
    if origin is not None:
        yield dirs_of(pool, origin).run
    others = (record.id for record in pool.pods() if record.is_running and record.id != origin)
    for pod_id in itertools.islice(others, _HELPERS):
        yield dirs_of(pool, pod_id).run


def _start_afresh(pool: Pool, params: Start, spawn: bool) -> socket.socket:
    """A keeper that isn't forked from another; returns the connection to it."""
    ours, theirs = socket.socketpair()
    if spawn:
        _spawn(params, theirs)
    else:
        pool.index.close()
        _fork(params, theirs)
    theirs.close()
    return ours


def _fork(params: Start, starter: socket.socket) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        nursery.leave_all_but(starter.fileno())
        keeper.keep(params, params.dirs(), starter)
    finally:
        os._exit(1)


def _spawn(params: Start, starter: socket.socket) -> None:
    import subprocess

    number = starter.fileno()
    command = [sys.executable, "-m", "podtree.pod.spawned", str(number), msgspec.json.encode(params).decode()]
    done = subprocess.run(command, pass_fds=[number], stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise PodtreeError(f"{sys.executable} could not start the pod's keeper")


def start_or_remove(
    pool: Pool,
    pod: PodRecord,
    *,
    attach: bool = False,
    size: tuple[int, int] | None = None,
    spawn: bool = False,
) -> tuple[Client, dict[str, Any]]:
    """start(), but a pod that doesn't start isn't kept."""
    try:
        return start(pool, pod, attach=attach, size=size, spawn=spawn)
    except BaseException:
        with contextlib.suppress(PodtreeError, OSError):
            pool.remove_pod(pod.id)
        raise


def create(pool: Pool, name: str | None, spec: PodSpec) -> PodRecord:
    """A pod that doesn't run yet. Without a host name in the spec, that is its name.

    Raises UsageError for a spec that makes no sense, Conflict when the name is taken.
    """
    for _ in range(_ATTEMPTS):
        chosen = pool.free_name() if name is None else name
        whole = spec if spec.hostname else msgspec.structs.replace(spec, hostname=specs.as_hostname(chosen))
        try:
            return pool.create_pod(chosen, specs.check(whole).to_dict())
        except Conflict:
            if name is not None:
                raise
    raise Conflict("no free name for the pod was found", "podtree run --name")


def run(
    pool: Pool,
    name: str | None,
    spec: PodSpec,
    *,
    size: tuple[int, int] | None = None,
    spawn: bool = False,
    recorded: Settings | None = None,
) -> dict[str, Any]:
    """A new pod in the background: {pod, id, pid, ready_ms}."""
    pod = create(pool, name, spec)
    client, result = start_or_remove(pool, pod, size=size, spawn=spawn)
    client.close()
    record_from_start(pool, pod, recorded)
    return result


def record_from_start(pool: Pool, pod: PodRecord, settings: Settings | None) -> None:
    """Have a pod recorded that has just been started, if that is wanted; it may be over already."""
    if settings is not None:
        with contextlib.suppress(Conflict):
            record(pool, pool.pod(pod.id), settings)


def execute(
    pool: Pool,
    pod: PodRecord,
    argv: tuple[str, ...],
    *,
    stdio: StdioMode,
    env: tuple[str, ...] = (),
    cwd: str | None = None,
    user: str | None = None,
    size: tuple[int, int] | None = None,
    attach: bool = True,
    merged: bool = False,
) -> tuple[Client, dict[str, Any]]:
    """A process in a running pod, with the pod's own variables, directory and user where none are given.

    `merged` as in PodSpec. The result has its host pid; the client is attached to its stdio.
    """
    own = PodSpec.from_dict(pod.spec)
    variables = {**own.env, **specs.extra_environment(env)}
    if stdio == "tty":
        variables.setdefault("TERM", os.environ.get("TERM", "xterm"))
    spec = PodSpec(
        argv=argv, env=variables, cwd=own.cwd if cwd is None else cwd, hostname=own.hostname,
        user=own.user if user is None else user, stdio=stdio, merged=merged,
    )  # fmt: skip
    specs.check(spec)
    client = connect(pool, pod)
    try:
        return client, client.call("exec", spec=spec.to_dict(), size=size, detach=not attach)
    except BaseException:
        client.close()
        raise


def checkpoint(
    pool: Pool,
    pod: PodRecord,
    *,
    message: str = "",
    stop: bool = False,
    tag: str | None = None,
    no_wait: bool = False,
    external: str | None = None,
) -> dict[str, Any]:
    """Save a running pod: {id, pod, number, state, pause_ms, total_ms, lag_ms, bytes_written, processes}.

    With `stop` it has ended on return. With `no_wait` it runs on, and the checkpoint is only captured: {id, pod, state,
    pause_ms}; `durable` waits for the rest. `external`: what becomes of what it shares with the outside (refuse, keep
    or close), if that isn't to be as its spec says.
    """
    policy(external)
    if no_wait and (stop or tag is not None):
        raise UsageError("--no-wait goes with neither --stop nor --tag", "podtree wait ID, then podtree tag ID NAME")
    if as_text(message) != message:
        raise UsageError(f"the message is not valid UTF-8: {message}")
    if tag is not None:
        pool.check_free(refs.check_name(tag, "tag"))  # before there is a checkpoint that nobody asked for
    result = call(pool, pod, "checkpoint", message=message, stop=stop, no_wait=no_wait, external=external)
    if tag is not None:
        pool.tag(tag, result["id"])
        result["tag"] = tag
    if stop:
        with contextlib.suppress(PodtreeError):  # it has a checkpoint, whatever comes now
            wait(pool, pool.pod(pod.id))
    return result


def mark(pool: Pool, pod: PodRecord, text: str) -> dict[str, Any]:
    """A checkpoint of a running pod for a moment worth keeping: `text` says why. As `checkpoint`."""
    if as_text(text) != text or not text.strip():
        raise UsageError(f"a mark needs a text, in UTF-8: {text}", 'podtree mark POD "before the upgrade"')
    return call(pool, pod, "checkpoint", message=text, mark=True)


def record(pool: Pool, pod: PodRecord, settings: Settings | None = None, *, off: bool = False) -> dict[str, Any]:
    """Have a running pod recorded from now on, or no longer; without both: how its recorder does.

    Raises Conflict when it isn't recorded.
    """
    if settings is not None:
        policy(settings.external)
    return call(pool, pod, "record", settings=msgspec.to_builtins(settings), off=off)


def metrics(pool: Pool, refs: Iterable[str] = ()) -> list[dict[str, Any]]:
    """What the supervisors of running pods (all, or those named) have counted."""
    pods = [pool.pod(ref) for ref in refs] or pool.pods()
    calls = [partial(call, pool, pod, "metrics") for pod in pods if pod.is_running]
    return list(counted.gather(calls))


def metrics_text(pool: Pool, refs: Iterable[str] = ()) -> bytes:
    """The same for Prometheus, with the pool's room."""
    info = pool.info()
    room = {"size": info.size, "used": info.used, "free": info.free}
    return counted.exposition(metrics(pool, refs), room)


def check(pool: Pool, pod: PodRecord, *, external: str | None = None) -> list[Problem]:
    """What would keep a checkpoint from working now. `external` as in `checkpoint`."""
    policy(external)
    return msgspec.convert(call(pool, pod, "check", external=external)["problems"], list[Problem])


def commit(pool: Pool, winner: PodRecord, origin: PodRecord) -> PodRecord:
    """`winner` takes the place of `origin`, which is ended."""
    from podtree.pool import retention

    with pool.index.snapshot() as connection:
        related = retention.descends(connection, winner.id, origin.id)
    if not related:
        raise Conflict(f"pod {winner.name} was not branched from {origin.name}")
    if origin.is_running:
        end_pod(pool, origin)
    return pool.commit_pod(winner.id, origin.id)


def branch_names(pool: Pool, name: str | None, count: int) -> list[str | None]:
    """`name`, or for several name-1, name-2...; raises Conflict when one is taken, before any branch is made."""
    if name is None:
        return [None] * count
    names = [name] if count == 1 else [f"{name}-{number}" for number in range(1, count + 1)]
    for one in names:
        pool.check_free(refs.check_name(one, "pod"))
    return list(names)


def start_branches(
    pool: Pool, checkpoint: CheckpointRecord, names: Sequence[str | None], *, spawn: bool = False
) -> Iterator[dict[str, Any]]:
    """New pods from a checkpoint, each {pod, id, pid, ready_ms}, in order: as many at a time as there are processors.

    Raises what keeps one from starting, when those that had been begun are through.
    """
    width = len(os.sched_getaffinity(0))
    under_way: deque[tuple[float, Client]] = deque()
    left = deque(names)
    while left or under_way:
        while left and len(under_way) < width:
            begun, name = time.monotonic(), left.popleft()
            params = Start(home=os.path.realpath(pool.home), pod_id=new_id(), branch=checkpoint.id, name=name)
            client, helped = _ask_for(pool, params, checkpoint.pod, spawn)
            under_way.append((begun, client))
            if not helped:  # the next one can have this one's help
                break
        begun, client = under_way.popleft()
        try:
            with client:
                result = client.reply()
        except BaseException:
            for _, other in under_way:
                with contextlib.suppress(PodtreeError), other:
                    other.reply()
            raise
        yield {**result, "ready_ms": round((time.monotonic() - begun) * 1e3, 3)}


def rewind(pool: Pool, pod: PodRecord, checkpoint: CheckpointRecord, *, spawn: bool = False) -> dict[str, Any]:
    """Put a pod back to a checkpoint of its past; one that has ended comes back to life: {pod, id, pid, ready_ms}."""
    begun = time.monotonic()

    def attempt(now: PodRecord) -> dict[str, Any]:
        if now.is_running:
            return call(pool, now, "rewind", checkpoint=checkpoint.id)
        client, result = start(pool, now, restore=True, rewind=checkpoint.id, spawn=spawn)
        client.close()
        return {**result, "ready_ms": round((time.monotonic() - begun) * 1e3, 3)}

    return _whatever_it_becomes(pool, pod, attempt)


def remove(pool: Pool, pod: PodRecord, *, force: bool = False) -> Removed:
    """Remove a pod; with `force` its processes are ended first. Raises Conflict when it runs and may not end."""

    def attempt(now: PodRecord) -> Removed:
        if now.is_running and force:
            end_pod(pool, now)
        try:
            return pool.remove_pod(now.id)
        except NotFound:
            return Removed(pods=(now.id,))  # it was run with --rm, and its supervisor was quicker

    return _whatever_it_becomes(pool, pod, attempt)


def _whatever_it_becomes(pool: Pool, pod: PodRecord, attempt: Callable[[PodRecord], Done]) -> Done:
    """`attempt` what is done otherwise for a running pod than for an ended one; again if it changed meanwhile."""
    for _ in range(_CHANGES):
        try:
            return attempt(pod)
        except Conflict:
            before, pod = pod, pool.pod(pod.id)
            if before.is_running == pod.is_running:
                raise
    return attempt(pod)


def find_running(pool: Pool) -> list[str]:
    """Tell an index that was made again which pods run: their supervisors answer. Returns the names."""
    found = []
    for pod in pool.pods():
        run = dirs_of(pool, pod.id).run
        with contextlib.suppress(OSError, PodtreeError), Client(nursery.connect(run, CONTROL)) as client:
            status = client.call("status")
            pool.set_pod_state(pod.id, PodState.RUNNING, init_pid=status["pid"], monitor_pid=status["supervisor"])
            found.append(pod.name)
    return found


def stop(pool: Pool, pod: PodRecord, timeout_s: float | None = 10, number: int = signal.SIGTERM) -> int:
    """A signal to the pod's first process, SIGKILL after `timeout_s` (None: never); the exit code."""
    try:
        return int(call(pool, pod, "stop", timeout=timeout_s, signal=int(number))["code"])
    except PodtreeError:
        if pool.pod(pod.id).is_running:
            raise
        return exit_code(pool, pod)  # it has just ended by itself


def end_pod(pool: Pool, pod: PodRecord) -> int:
    """End a pod at once; the exit code, when it has ended."""
    return stop(pool, pod, None, signal.SIGKILL)


def send_signal(pool: Pool, pod: PodRecord, number: int) -> None:
    """A signal to the pod's first process."""
    call(pool, pod, "signal", signal=number)


def wait(pool: Pool, pod: PodRecord) -> int:
    """The exit code of a pod, once it has ended."""
    if pod.is_running:
        with contextlib.suppress(PodtreeError), connect(pool, pod) as client:
            return int(client.call("wait")["code"])
    return exit_code(pool, pod)


def durable(pool: Pool, ref: str) -> CheckpointRecord:
    """The checkpoint, once it is durable. Raises NotFound, or Damaged if it is lost."""
    while True:
        found = pool.pending(ref)  # first: it leaves there when it is in the index
        if found is None:
            return pool.resolve(ref)
        if found.state is State.LOST and not pool.has_checkpoint(found.id):
            raise Damaged(f"checkpoint {found.id} was captured, and is lost: {found.error}")
        if found.state is State.LOST:
            return pool.checkpoint(found.id)
        time.sleep(_LOOK_S)


def exit_code(pool: Pool, pod: PodRecord) -> int:
    """The exit code of a pod that has ended: 128 + n for signal n."""
    noted = keeper.read_exit(dirs_of(pool, pod.id).pod / "exit.json")
    if noted is None:
        noted = pool.pod(pod.id).exit_code
    if noted is None:
        raise Conflict(f"nobody knows how pod {pod.name} ended", "its machine or its supervisor went down before")
    return noted


def parse_signal(text: str) -> int:
    """"TERM", "SIGTERM" or "15"."""
    if text.isascii() and text.isdigit() and 0 < int(text) < signal.NSIG:
        return int(text)
    name = text.upper()
    try:
        return signal.Signals[name if name.startswith("SIG") else f"SIG{name}"].value
    except KeyError:
        raise UsageError(f"there is no signal {text!r}", "a name or a number, as kill -l lists them") from None
