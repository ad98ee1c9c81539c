"""Who is attached to which stdio of a pod, and who is expected back after the supervisor was replaced.

A client connects again by itself. Until it does (or time is up) its stdio is held: nothing is read from the pod
that nobody would get, and the end of the process is told only afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from podtree.pod.live import INIT
from podtree.pod.loop import Callback, Connection, Loop, Timer
from podtree.pod.stdio import Stdio

_RETURN_S = 5.0  # how long a client may take to come back


class Attachments:
    """The stdio of all process trees, by name, and their clients."""

    def __init__(self, loop: Loop, *, interactive: bool, changed: Callback) -> None:
        """`interactive`: the first process's stdin stays open without clients. `changed`: somebody came or went."""
        self.stdio: dict[str, Stdio] = {}
        self._loop = loop
        self._interactive = interactive
        self._changed = changed
        self._names: dict[Connection, str] = {}
        self._expected: dict[str, tuple[Timer, list[Callback]]] = {}

    def __len__(self) -> int:
        return len(self._names)

    def attached(self) -> list[str]:
        """Names of the stdio that have clients, or expect them."""
        return sorted({*self._names.values(), *self._expected})

    def name_of(self, client: Connection) -> str | None:
        """What the client is attached to."""
        return self._names.get(client)

    def attach(self, client: Connection, name: str, size: tuple[int, int] | None) -> None:
        """Everything that comes out of `name` from now on goes to the client as well."""
        self._names[client] = name
        self.stdio[name].attach(client, size)
        self._changed()
        self._loop.later(0, partial(self._back, name))  # the reply to the client comes first

    def detach(self, client: Connection) -> None:
        """The client is gone, or wants to be."""
        name = self._names.pop(client, None)
        if name is not None and name in self.stdio:
            self.stdio[name].detach(client)
            self._nobody_types(name)
            self._changed()

    def leave(self, client: Connection) -> None:
        """The client goes by its own wish: stdin stays open."""
        name = self._names.pop(client)
        self.stdio[name].detach(client)
        client.send({"detached": True})
        self._changed()

    def _nobody_types(self, name: str) -> None:
        keeps_open = name == INIT and self._interactive
        if name not in self._names.values() and name not in self._expected and not keeps_open:
            self.stdio[name].end_input()

    # ---- after the supervisor was replaced

    def expect(self, names: Iterable[str]) -> None:
        """Clients of the predecessor were attached to these."""
        for name in names:
            if name in self.stdio:
                self.stdio[name].hold(True)
                self._expected[name] = (self._loop.later(_RETURN_S, partial(self._back, name)), [])

    def when_back(self, name: str, call: Callback) -> None:
        """Call once nobody is expected any more: now, in most cases."""
        if name in self._expected:
            self._expected[name][1].append(call)
        else:
            call()

    def _back(self, name: str) -> None:
        timer, calls = self._expected.pop(name, (None, []))
        if timer is None:
            return
        timer.cancel()
        if name in self.stdio:
            self.stdio[name].hold(False)
            self._nobody_types(name)
        self._changed()
        for call in calls:
            call()

    # ---- ends

    def end(self, name: str, code: int) -> None:
        """Pass on what is left of the output, and the exit code to who is attached."""
        for client in self.close(name):
            self._names.pop(client, None)
            client.send({"exit": code})

    def close(self, name: str) -> list[Connection]:
        """Close a stdio once its output is passed on; its clients."""
        stdio = self.stdio.pop(name, None)
        if stdio is None:  # of an exec that has just begun
            return []
        stdio.drain()
        stdio.close()
        for client in stdio.clients:
            client.on_drain = None
            client.pause(False)
        return [client for client in stdio.clients if not client.closed]

    # ---- what clients send

    def hear(self, client: Connection, message: dict[str, Any], send_signal: Callable[[str, int], None]) -> None:
        """Input, a window size, a signal (for the process that the stdio is of), an end, a farewell."""
        name = self._names.get(client)
        if name is None or name not in self.stdio:
            return
        stdio = self.stdio[name]
        if "in" in message:
            stdio.write(message["in"])
        elif "size" in message:
            stdio.resize(*message["size"])
        elif "signal" in message:
            send_signal(name, int(message["signal"]))
        elif "eof" in message:
            stdio.end_input()
        elif "closed" in message and len(stdio.clients) == 1:
            stdio.end_output(int(message["closed"]))
        elif "detach" in message:
            self.leave(client)
