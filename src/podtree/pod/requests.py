"""What a pod's supervisor is asked for, over its socket: each gives the reply, or None when it replies later."""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from podtree.errors import Conflict
from podtree.kernel.pidfd import pidfd_send_signal
from podtree.objects import external
from podtree.pod import engine, metrics, recording, rewinding
from podtree.pod.live import INIT

if TYPE_CHECKING:
    from podtree.pod.loop import Connection
    from podtree.pod.supervisor import Supervisor

Message = dict[str, Any]
Request = Callable[["Supervisor", "Connection", Message], Message | None]


def status(supervisor: Supervisor, client: Connection, message: Message) -> Message:
    """Who it is, and who is in the pod."""
    live = supervisor.running()
    return {
        "id": supervisor.pod_id,
        "pid": live.init_pid,
        "supervisor": os.getpid(),
        "stdio": supervisor.spec.stdio,
        "attached": len(supervisor.clients),
        "sessions": {name: session.pid for name, session in live.sessions.items()},
        "pids": live.pids(),
    }


def attach(supervisor: Supervisor, client: Connection, message: Message) -> Message:
    """Output and input of a process from now on."""
    name = str(message.get("name", INIT))
    if name not in supervisor.clients.stdio:
        supervisor.running()
        raise Conflict(f"the command that was run in pod {supervisor.name} has ended")
    if name == INIT and supervisor.spec.stdio not in ("tty", "pipes"):
        raise Conflict(f"pod {supervisor.name} writes to its log only", "podtree logs -f follows it")
    supervisor.clients.attach(client, name, message.get("size"))
    return {"stdio": supervisor.spec.stdio}


def send_signal(supervisor: Supervisor, client: Connection, message: Message) -> Message:
    """A signal for the pod's first process."""
    try:
        pidfd_send_signal(supervisor.running().init_pidfd, int(message["signal"]))
    except ProcessLookupError:
        raise Conflict(f"pod {supervisor.name} has ended") from None
    return {}


def wait(supervisor: Supervisor, client: Connection, message: Message) -> Message | None:
    """The reply comes when the pod has ended."""
    if supervisor.exit_code is not None:
        return {"code": supervisor.exit_code}
    supervisor.waiting.append(client)
    return None


def stop(supervisor: Supervisor, client: Connection, message: Message) -> None:
    """A signal, and SIGKILL after `timeout` seconds; the reply comes when the pod has ended."""
    live = supervisor.running()
    supervisor.waiting.append(client)
    number, timeout = int(message.get("signal", signal.SIGTERM)), message.get("timeout")

    def send(number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            pidfd_send_signal(live.init_pidfd, number)

    send(number)
    if number != signal.SIGKILL:
        send(signal.SIGCONT)

    def kill() -> None:
        if supervisor.live is live:
            send(signal.SIGKILL)

    if timeout is not None:
        supervisor.loop.later(float(timeout), kill)


def checkpoint(supervisor: Supervisor, client: Connection, message: Message) -> Message | None:
    """With `no_wait` the reply comes when it is captured; what becomes of it then is told by its state."""
    text = str(message.get("message", ""))
    notes = {"mark": text} if message.get("mark") else {}
    shared = external.policy(message.get("external"))
    if not message.get("no_wait"):
        return engine.checkpoint(
            supervisor, stop=bool(message.get("stop")), message=text, notes=notes, shared=shared
        )
    told = False

    def captured(what: dict[str, Any]) -> None:
        nonlocal told
        told = True
        client.send({"ok": {**what, "pod": supervisor.name}})

    try:
        engine.checkpoint(supervisor, message=text, captured=captured, notes=notes, shared=shared)
    except Exception:
        if not told:
            raise
        traceback.print_exc()
    return None


def record(supervisor: Supervisor, client: Connection, message: Message) -> Message:
    """With `settings` the pod is recorded from now on, with `off` no longer; without both: how it goes."""
    supervisor.running()
    if message.get("settings") is not None or message.get("off"):
        if supervisor.recorder is not None:
            supervisor.recorder.stop()
        done, supervisor.recorder = supervisor.recorder, None
        if message.get("off"):
            supervisor.tell_state()
            return recording.describe(done)
        supervisor.recorder = recording.begin(supervisor, message["settings"])
        supervisor.tell_state()
    return recording.describe(supervisor.recorder)


def tell_metrics(supervisor: Supervisor, client: Connection, message: Message) -> Message:
    """What was counted (podtree.pod.metrics)."""
    live = supervisor.running()
    return {
        "pod": supervisor.pool.pod(supervisor.pod_id).name,
        "id": supervisor.pod_id,
        "tally": msgspec.to_builtins(supervisor.tally),
        "interval": supervisor.recorder.settings.every_ns / 1e9 if supervisor.recorder is not None else 0.0,
        "processes": len(live.pids()),
        **metrics.of_process(os.getpid()),
    }


def check(supervisor: Supervisor, client: Connection, message: Message) -> Message:
    """What would keep a checkpoint from working now."""
    problems = engine.check(supervisor, external.policy(message.get("external")))
    return {"problems": [msgspec.to_builtins(problem) for problem in problems]}


def look(supervisor: Supervisor, client: Connection, message: Message) -> Message:
    """The pod as it is now, for whoever wants to compare it: it stays until the client hangs up."""
    draft = engine.look(supervisor)
    supervisor.looks.setdefault(client, []).append(draft)
    return {"directory": str(draft.dir)}


def rewind(supervisor: Supervisor, client: Connection, message: Message) -> Message:
    """Back to a checkpoint, in place."""
    return rewinding.rewind(supervisor, str(message["checkpoint"]))


BY_NAME: dict[str, Request] = {
    "status": status,
    "attach": attach,
    "signal": send_signal,
    "wait": wait,
    "stop": stop,
    "exec": lambda supervisor, client, message: supervisor.execute(client, message),
    "checkpoint": checkpoint,
    "record": record,
    "metrics": tell_metrics,
    "check": check,
    "look": look,
    "rewind": rewind,
}
