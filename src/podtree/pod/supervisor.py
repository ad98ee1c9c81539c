"""The supervisor of one pod: parent of its first process, end of its stdio, its tracer when it is saved.

One thread around an event loop. It never waits for "any child": the checkpoint's ptrace stops are waited
for in this same process. What the keeper has to know to replace it goes there before anybody is told.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from podtree.errors import Conflict, PodtreeError, UsageError
from podtree.kernel.pidfd import has_ended, pidfd_open, pidfd_send_signal
from podtree.pod import cgroup, engine, hop, keeper, metrics, nursery, recording, requests, rewinding, seccomp, wire
from podtree.pod.attached import Attachments
from podtree.pod.branching import Branch
from podtree.pod.cgroup import Cgroup
from podtree.pod.dirs import PodDirs
from podtree.pod.enter import Entered, enter
from podtree.pod.live import INIT, ClockOffsets, ExecSession, Launched, LivePod, StdioEnds
from podtree.pod.loop import Connection, Loop, Timer
from podtree.pod.nursery import Start
from podtree.pod.program import launch_program
from podtree.pod.rewinding import Ahead
from podtree.pod.spec import PodSpec, check
from podtree.pod.stdio import Stdio
from podtree.pool.draft import Draft
from podtree.pool.pool import Pool
from podtree.pool.records import CheckpointId, PodId, PodRecord, PodState
from podtree.recorder.recorder import Recorder

_LINGER_S = 10.0  # how long an attached client may take to fetch the last of the output
_RETRY_S = 3.0
_END_S = 60.0  # how long the processes of a pod may take to end, once they are killed
_TEND_S = 0.05
_NOTE_S = 2.0  # how long the keeper may take to note the end of a process
_UNKNOWN = 255  # the exit code of a process of which nobody could note it
_REPORT_S = 10.0  # from entering a pod to execve; a process of the pod may have got hold of the report pipe


class _StillRuns(Conflict):
    """The pod isn't this supervisor's to start."""


class _NotWanted(PodtreeError):
    """Nobody asked for a branch that was made ready."""


class Supervisor:
    """See the module's text. `held` are the keeper's copies of a predecessor's descriptors."""

    def __init__(
        self,
        start: Start,
        dirs: PodDirs,
        listener: socket.socket,
        keeper_channel: socket.socket,
        held: dict[str, int],
    ) -> None:
        self.start = start
        self.dirs = dirs
        self.loop = Loop()
        self.live: LivePod | None = None
        self.exit_code: int | None = None
        self.final_state = PodState.EXITED
        self.checkpointer: Any = None
        self.recorder: Recorder | None = None
        self.pool = Pool.open(dirs.home)
        self.pod_id = PodId(start.pod_id)
        if start.branch is None:
            record = self.pool.pod(start.pod_id)
            self.name, spec = record.name, record.spec
        else:
            self.name, spec = "", self.pool.spec_of(CheckpointId(start.branch))
        self.spec = PodSpec.from_dict(spec)
        self.clients = Attachments(self.loop, interactive=self.spec.interactive, changed=self.tell_state)
        self._listener = listener
        self._keeper: socket.socket | None = keeper_channel
        self._held = held
        self._hop_fd = hop.open_hop()
        self.filter = seccomp.load(dirs.home, nested=self.spec.nested)
        self._connections: set[Connection] = set()
        self.waiting: list[Connection] = []
        self.looks: dict[Connection, list[Draft]] = {}
        self._ended: dict[str, int] = {}  # codes of sessions that are over, until their clients are told
        self._serial = 0
        self._finished = False
        self._tending: Timer | None = None
        self.ahead = Ahead(self)
        self.tally = metrics.Tally()

    # ---- beginning

    def begin(self, starter: socket.socket, lock_fd: int) -> None:
        """Launch or restore the pod and tell the starter; a failure leaves nothing behind.

        `lock_fd` holds the pod's lock, which is let go when the index knows that the pod runs.
        """
        begun = time.monotonic()
        client = None if self.start.standby else self._connect(starter)
        self.pool.inherit_lock(self.pod_id, lock_fd)
        try:
            if self.start.branch is None:
                self._start()
            else:
                if client is None and self.spec.volumes:
                    raise _NotWanted("what it opens of the host's counts: it isn't opened ahead")
                branch, name = Branch(self), self.start.name
                if client is None:
                    name, client = self._stand_by(starter, branch)
                    begun = time.monotonic()
                self._be(*branch.let_go(name))
        except Exception as error:
            self._failed(client, error)
            return
        finally:
            self.pool.release_lock(self.pod_id)
        assert self.live is not None and client is not None
        if self.start.attach:
            self.clients.attach(client, INIT, None)
        self._listen()
        ready_ms = (time.monotonic() - begun) * 1e3
        client.send({"ok": {"pod": self.name, "id": self.pod_id, "pid": self.live.init_pid,
                            "ready_ms": round(ready_ms, 3)}})  # fmt: skip

    def _start(self) -> None:
        self._check_ended()
        if self.start.rewind is not None:
            rewinding.reset(self, self.start.rewind)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.dirs.pod / "exit.json")
        group = self.new_cgroup()
        if self.start.restore:
            self.install(engine.restore(self, group, verified=self.start.rewind is not None))
        else:
            self._launch(group)

    def _stand_by(self, keeper: socket.socket, branch: Branch) -> tuple[str | None, Connection]:
        """Wait until somebody wants the branch: its name, and who. Ends everything when nobody will."""
        with contextlib.suppress(OSError):
            keeper.send(nursery.READY)
            order, fds = wire.receive(keeper)
            if order is not None:
                keeper.close()
                return order["name"], self._connect(socket.socket(fileno=fds[0]))
        branch.abandon()
        raise _NotWanted("nobody wanted the branch")

    def _be(self, record: PodRecord, live: LivePod) -> None:
        """The branch exists, and runs."""
        self.name = record.name
        self.install(live, noted=True)

    def _check_ended(self) -> None:
        """Raise Conflict while processes of the pod are there, though nobody may keep it any more."""
        if self.pool.pod(self.pod_id).is_running:
            raise _StillRuns(f"pod {self.name} is running already")

    def new_cgroup(self) -> Cgroup:
        """The pod's groups, known to the keeper before anything is in them.

        The limit on CPU time begins when the pod does (`install`): it isn't there for what builds the pod.
        """
        group = self.next_cgroup()
        self._tell_keeper({"state": {"cgroup": list(group.dirs)}})
        return group

    def next_cgroup(self) -> Cgroup:
        """Groups beside those that the pod has, if it runs."""
        group = cgroup.create(self.pod_id, self.spec, self.live.cgroup if self.live is not None else None)
        if self.spec.cpus is not None:
            group.limit_cpus(None)
        return group

    def _launch(self, group: Cgroup) -> None:
        launched = launch_program(
            self.spec, self.dirs, group, self._hop_fd, self.filter, size=self.start.size
        )
        self.install(self.live_pod(launched, ClockOffsets(), {}))

    def live_pod(self, launched: Launched, clock: ClockOffsets, sessions: dict[str, ExecSession]) -> LivePod:
        """What launch() gave, as a LivePod."""
        return LivePod(
            self.pod_id, self.spec, self.dirs, launched.init_pid, launched.init_pidfd, launched.root_fd,
            launched.cgroup, clock, launched.stdio, sessions,
        )  # fmt: skip

    def install(self, live: LivePod, expected: Sequence[str] = (), *, noted: bool = False) -> None:
        """Take charge of a pod that has just begun to run: launched, restored, or a predecessor's.

        `expected`: the stdio to which clients of a predecessor were attached. `noted`: the index knows that it runs.
        """
        self.live = live
        if self.spec.cpus is not None:
            live.cgroup.limit_cpus(self.spec.cpus)
        holds = {"root": live.root_fd}
        for name, ends in live.stdio.items():
            holds.update(_holds(name, ends))
        self._make_all_stdio(live.stdio, expected)
        self._tell_keeper({"hold": list(holds), "state": self._state()}, list(holds.values()))
        self.loop.watch(live.init_pidfd, read=lambda: self._when_back(INIT, live.init_pidfd, self._init_ended))
        for session in live.sessions.values():
            self._watch_session(session)
        for name in live.stdio:
            if name != INIT:
                self._serial = max(self._serial, int(name.rpartition("-")[2]))
                if name not in expected:  # whoever was connected is connected to the origin
                    self.clients.stdio[name].end_input()
        self.checkpointer = engine.checkpointer(live, self._memory_lost)
        if live.filling is not None:
            self._watch_filling(os.dup(live.filling.fileno()))
        if not noted:
            self._note_running(live)
        if self.recorder is not None:  # rewound: what it watched is another pod's, so to speak
            self.recorder.watch()

    def _watch_filling(self, fd: int) -> None:
        """`fd` becomes readable when all memory is there, or when that was waited for elsewhere."""

        def filled() -> None:
            self.loop.forget(fd)
            os.close(fd)
            self._settle_memory()

        self.loop.watch(fd, read=filled)

    def _settle_memory(self) -> None:
        if self.checkpointer is not None:
            self.checkpointer.settle()
            if self.live is not None and self.live.filling is not None:  # it couldn't be stopped just now
                self.loop.later(_RETRY_S, self._settle_memory)

    def _memory_lost(self, error: PodtreeError) -> None:
        """The pod is ended because memory of it can't come in: say so where its output goes."""
        text = f"\r\npodtree: {error.message}\r\n" if self.spec.stdio == "tty" else f"podtree: {error.message}\n"
        data = text.encode(errors="replace")
        with contextlib.suppress(OSError):
            log_fd = _open_log(self.dirs)
            try:
                os.write(log_fd, data)
            finally:
                os.close(log_fd)
        for client in self.clients.stdio[INIT].clients if INIT in self.clients.stdio else ():
            client.send({"out": data, "fd": 2})

    def _note_running(self, live: LivePod) -> None:
        """Tell the index, now or, when it is busy or its disk is full, later: the pod comes first."""
        try:
            self.pool.set_pod_state(
                self.pod_id, PodState.RUNNING, init_pid=live.init_pid, monitor_pid=os.getpid()
            )
        except PodtreeError:
            traceback.print_exc()
            self.loop.later(_RETRY_S, lambda: self._note_running(live) if self.live is live else None)

    def _note_end(self) -> None:
        for _ in range(3):
            try:
                self.pool.set_pod_state(self.pod_id, self.final_state, exit_code=self.exit_code)
                return
            except PodtreeError:  # exit.json has the code, and the index will see that the pod is gone
                traceback.print_exc()

    def _make_all_stdio(self, all_ends: dict[str, StdioEnds], expected: Sequence[str]) -> None:
        logged = self.spec.stdio in ("tty", "pipes")
        for name, ends in all_ends.items():
            log_fd = _open_log(self.dirs) if logged and name == INIT else None
            self.clients.stdio[name] = self._make_stdio(name, ends, log_fd)
        self.clients.expect(expected)

    def _make_stdio(self, name: str, ends: StdioEnds, log_fd: int | None) -> Stdio:
        def closed() -> None:
            """The keeper's copy would keep the other side from noticing."""
            self._tell_keeper({"drop": [f"{name}:{number}" for number, fd in enumerate(ends.pipes) if fd is None]})
            self.tell_state()

        return Stdio(self.loop, ends, log_fd, closed)

    def adopt(self, state: dict[str, Any]) -> None:
        """Take over the pod of a supervisor that died."""
        held = self._held  # no duplicates: one that stayed open would keep an end of file from arriving
        self._ended = dict(state["ended"])
        stdio = {}
        for name, data in state["stdio"].items():
            ends = msgspec.convert(data, StdioEnds)
            ends.console = held.get(f"{name}:c")
            ends.pipes = (held.get(f"{name}:0"), held.get(f"{name}:1"), held.get(f"{name}:2"))
            stdio[name] = ends
        group = Cgroup(tuple(state["cgroup"]))
        self._serial = state["serial"]
        try:
            pidfd = pidfd_open(state["init_pid"])
        except ProcessLookupError:
            pidfd = -1
        expected = [name for name in state["attached"] if name in stdio]
        if pidfd < 0 or (self.dirs.pod / "exit.json").exists():
            self._adopt_ended(group, stdio, state["sessions"], expected)
            return
        sessions, notes = {}, []
        for name, pid in state["sessions"].items():
            try:
                process = pidfd_open(pid)
            except ProcessLookupError:
                process = -1
            if process < 0 or self._noted(pid).exists():  # the number may be another's already
                notes.append(self._noted(pid))
                self._ended[name] = _noted_code(notes[-1])
            else:
                sessions[name] = ExecSession(name, pid, process)
        clock = ClockOffsets(*state["clock"])
        self.install(
            LivePod(
                self.pod_id, self.spec, self.dirs, state["init_pid"], pidfd, held["root"], group, clock,
                stdio, sessions,
            ),
            expected,
        )  # fmt: skip
        self._remove_groups(group.name)
        for note in notes:  # the keeper has been told; the number may come again
            note.unlink(missing_ok=True)
        for name in list(self._ended):
            self.clients.when_back(name, partial(self._session_over, name))
        self.checkpointer.recover()
        if state.get("recording"):
            self.recorder = recording.begin(self, state["recording"])
        self.tend()
        self._listen()

    def _adopt_ended(
        self, group: Cgroup, stdio: dict[str, StdioEnds], sessions: dict[str, int], expected: Sequence[str]
    ) -> None:
        """The pod ended while nobody supervised it. What it wrote last is still in its pipes or its terminal."""
        self.exit_code = keeper.read_exit(self.dirs.pod / "exit.json")
        codes = dict(self._ended)
        for name, pid in sessions.items():
            code = keeper.read_exit(self._noted(pid))
            codes[name] = 128 + signal.SIGKILL if code is None else code
        group.remove()
        self._make_all_stdio(stdio, expected)
        self._listen()
        left = set(stdio)

        def over(name: str) -> None:
            code = self.exit_code if name == INIT else codes.get(name)
            self.clients.end(name, _UNKNOWN if code is None else code)
            left.discard(name)
            if not left:
                self._finish()

        for name in stdio:
            self.clients.when_back(name, partial(over, name))

    def _state(self) -> dict[str, Any]:
        assert self.live is not None
        live = self.live
        return {
            "init_pid": live.init_pid,
            "cgroup": list(live.cgroup.dirs),
            "clock": [live.clock.monotonic_ns, live.clock.boottime_ns],
            "stdio": {name: msgspec.to_builtins(ends) for name, ends in live.stdio.items()},
            "sessions": {name: session.pid for name, session in live.sessions.items()},
            "ended": self._ended,
            "serial": self._serial,
            "attached": self.clients.attached(),
            "recording": msgspec.to_builtins(self.recorder.settings) if self.recorder else None,
        }

    def tell_state(self) -> None:
        if self.live is not None:
            self._tell_keeper({"state": self._state()})

    def _tell_keeper(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        if self._keeper is not None:
            try:
                wire.send(self._keeper, message, fds or [])
            except OSError:  # it was killed: this supervisor won't be replaced, and goes on
                self._keeper = None

    def _failed(self, client: Connection | None, error: Exception) -> None:
        """There is no pod: everything that was made for it goes, and the starter learns why."""
        if not isinstance(error, _StillRuns):
            self._remove_processes()
            with contextlib.suppress(Exception):
                self.pool.set_pod_state(self.pod_id, PodState.EXITED, exit_code=getattr(error, "exit_code", 125))
        keeper.remove_run_dir(self.dirs)
        if self.start.branch is not None:
            self.pool.forget_runtime(self.pod_id)
        self._tell_keeper({"done": True})
        if client is not None:
            client.send(wire.encode_error(error))
            client.close(flush=True)
        self._leave_when_sent()

    def _remove_processes(self) -> None:
        if self.live is not None:
            with contextlib.suppress(ProcessLookupError):
                pidfd_send_signal(self.live.init_pidfd, signal.SIGKILL)
        self._remove_groups("")

    def _remove_groups(self, mine: str) -> None:
        """Control groups other than `mine`, with whatever is in them."""
        for group in cgroup.find(self.pod_id):
            if group.name != mine:
                for pid in group.pids(0):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                group.remove()

    # ---- the loop

    def run(self) -> None:
        """Until the pod has ended and everybody knows."""
        self.loop.run()

    def _listen(self) -> None:
        self._listener.setblocking(False)
        self.loop.watch(self._listener.fileno(), read=self._accept)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._connect(self._listener.accept()[0])

    def _connect(self, sock: socket.socket) -> Connection:
        client = Connection(self.loop, sock, self._heard, self._gone)
        self._connections.add(client)
        return client

    def _gone(self, client: Connection) -> None:
        self._connections.discard(client)
        self.clients.detach(client)
        if client in self.waiting:
            self.waiting.remove(client)
        for draft in self.looks.pop(client, ()):
            with contextlib.suppress(OSError):  # then the next checkpoint removes it
                draft.abort()

    def _heard(self, client: Connection, message: dict[str, Any]) -> None:
        """A request, or what an attached client sends on."""
        try:
            if "do" not in message:
                self.clients.hear(client, message, self._signal_to)
                return
            request = requests.BY_NAME.get(str(message["do"]))
            if request is None:
                raise UsageError(f"the pod's supervisor knows no {message['do']!r}")
            result = request(self, client, message)
            if result is not None:
                client.send({"ok": result})
        except Exception as error:
            if not isinstance(error, PodtreeError | OSError):
                traceback.print_exc()
            client.send(wire.encode_error(error))
        finally:
            self.tend()

    def tend(self) -> None:
        """A task that a checkpoint could not stop is let go when it stops at last."""
        if self._tending is not None:
            self._tending.cancel()
            self._tending = None
        if self.checkpointer is not None and self.checkpointer.tend():
            self._tending = self.loop.later(_TEND_S, self.tend)

    def running(self) -> LivePod:
        """The pod; raises Conflict when it has ended."""
        if self.live is None:
            raise Conflict(f"pod {self.name} has ended")
        return self.live

    def _signal_to(self, name: str, number: int) -> None:
        """A signal for the process that a stdio is of."""
        if self.live is not None:
            pidfd = self.live.init_pidfd if name == INIT else self.live.sessions[name].pidfd
            with contextlib.suppress(ProcessLookupError):
                pidfd_send_signal(pidfd, number)

    # ---- processes of `exec`

    def execute(self, client: Connection, message: dict[str, Any]) -> None:
        """Start a process in the pod; the reply comes when it is known whether that worked."""
        live = self.running()
        spec = check(PodSpec.from_dict(message["spec"]))
        self._serial += 1
        size = message.get("size")
        entered = enter(live, f"exec-{self._serial}", spec, self._hop_fd, self.filter, size)
        name = entered.session.name
        live.sessions[name], live.stdio[name] = entered.session, entered.ends
        holds = _holds(name, entered.ends)
        self._tell_keeper({"hold": list(holds), "state": self._state()}, list(holds.values()))
        self._watch_report(client, entered, attach=not message.get("detach"))

    def _watch_report(self, client: Connection, entered: Entered, *, attach: bool) -> None:
        """Reply when it is known whether the program could be executed, or can be taken to be.

        Its output isn't read before: who asked for it is to get all of it, after the reply.
        """
        session = entered.session

        def known() -> None:
            self.loop.forget(entered.report_r)
            timer.cancel()
            data = b""
            with contextlib.suppress(BlockingIOError):
                data = os.read(entered.report_r, 1 << 20)
            os.close(entered.report_r)
            failure = wire.parse_report(data, entered.command)
            if self.live is None or self.live.sessions.get(session.name) is not session:
                failure = failure or Conflict(f"pod {self.name} has ended")
                for fd in entered.ends.fds():
                    os.close(fd)
                client.send(wire.encode_error(failure))
                return
            self.clients.stdio[session.name] = self._make_stdio(session.name, entered.ends, None)
            if failure is not None:
                client.send(wire.encode_error(failure))
            else:
                client.send({"ok": {"pid": session.pid, "name": session.name}})
                if attach and not client.closed:
                    self.clients.attach(client, session.name, None)
            self._watch_session(session)

        timer = self.loop.later(_REPORT_S, known)
        self.loop.watch(entered.report_r, read=known)

    def drain_output(self) -> None:
        """Everything that the pod has written so far is in the log, and on its way to who is attached."""
        for stdio in self.clients.stdio.values():
            stdio.drain()

    # ---- ends

    def _watch_session(self, session: ExecSession) -> None:
        def ended() -> None:
            if self.live is not None and self.live.sessions.get(session.name) is session:
                self._session_ended(session)

        self.loop.watch(session.pidfd, read=lambda: self._when_back(session.name, session.pidfd, ended))

    def _when_back(self, name: str, pidfd: int, call: Callable[[], None]) -> None:
        """A process has ended: see to it once whoever is expected to want its output is there."""
        self.loop.forget(pidfd)
        self.clients.when_back(name, call)

    def _session_ended(self, session: ExecSession) -> None:
        """A process that `exec` started has ended. The keeper hears of it first, so that it isn't forgotten."""
        self.loop.forget(session.pidfd)
        os.close(session.pidfd)
        note = self._noted(session.pid)
        self._ended[session.name] = self._reap(session.pid, note)
        if self.live is not None:
            self.live.sessions.pop(session.name, None)
        self.tell_state()
        note.unlink(missing_ok=True)  # the number may come again
        self._session_over(session.name)

    def _session_over(self, name: str) -> None:
        """Tell its clients."""
        self.clients.end(name, self._ended.pop(name))
        if self.live is not None and self.live.stdio.pop(name, None) is not None:
            self._tell_keeper({"drop": [f"{name}:{part}" for part in "c012"], "state": self._state()})

    def _noted(self, pid: int) -> Path:
        """Where the keeper notes how a process of `exec` ended whose parent it had become."""
        return self.dirs.run / f"exit-{pid}.json"

    def _reap(self, pid: int, note: Path) -> int:
        """The exit code of a process that has ended: ours to wait for, or the keeper's, who notes it.

        It is noted before the process is gone: a successor could not ask any more.
        """
        with contextlib.suppress(ChildProcessError):
            found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            assert found is not None
            keeper.write_exit(note, found.si_status << 8 if found.si_code == os.CLD_EXITED else found.si_status)
            os.waitpid(pid, 0)
        return _noted_code(note)

    def kill_processes(self) -> None:
        """Kill the pod; `await_end` follows."""
        live = self.running()
        with contextlib.suppress(ProcessLookupError):
            pidfd_send_signal(live.init_pidfd, signal.SIGKILL)
        engine.release(self.checkpointer)

    def await_end(self) -> None:
        """Wait until no process of a pod that was killed is left; the stdio's clients stay (for a rewind)."""
        live = self.running()
        deadline = time.monotonic() + _END_S
        while not has_ended(live.init_pidfd, _TEND_S) and time.monotonic() < deadline:
            self.checkpointer.tend()
        self._release(self._reap(live.init_pid, self.dirs.pod / "exit.json"))

    def _init_ended(self) -> None:
        live = self.live
        if live is None or not has_ended(live.init_pidfd, 0):  # rewound since
            return
        self.exit_code = self._reap(live.init_pid, self.dirs.pod / "exit.json")
        self._release(self.exit_code)
        self.clients.end(INIT, self.exit_code)
        self._finish()

    def _release(self, code: int) -> None:
        """Let go of a pod whose first process has ended: the kernel has killed the rest."""
        live = self.running()
        self.loop.forget(live.init_pidfd)
        for session in list(live.sessions.values()):
            has_ended(session.pidfd, 10)
            self._session_ended(session)
        engine.release(self.checkpointer)
        os.close(live.init_pidfd)
        os.close(live.root_fd)
        live.cgroup.remove()
        self._tell_keeper({"drop": ["root"]})
        self.live = self.checkpointer = None

    def take_clients(self) -> list[Connection]:
        """Those attached to the first process, for the one that takes its place; its stdio is closed."""
        return self.clients.close(INIT)

    def give_clients(self, clients: list[Connection]) -> None:
        """The reverse."""
        for client in clients:
            self.clients.attach(client, INIT, None)

    def _finish(self) -> None:
        """The pod's story is over: note it, tell everybody, leave.

        The sockets go first: from when it is noted on, the next keeper may make its own.
        """
        self._finished = True
        self.ahead.drop()
        self._remove_groups("")
        if self.recorder is not None:
            self.recorder.stop()
        self.loop.forget(self._listener.fileno())
        keeper.remove_run_dir(self.dirs)
        self._note_end()
        with contextlib.suppress(PodtreeError):
            if self.spec.auto_remove and not self.pool.checkpoints(self.pod_id):
                self.pool.remove_pod(self.pod_id)
        self._tell_keeper({"done": True})
        for client in self.waiting:
            client.send({"ok": {"code": self.exit_code}})
        self._leave_when_sent()

    def give_up(self) -> None:
        """A rewind failed after the pod's processes were gone: it has ended."""
        if self.live is not None:
            self.kill_processes()
            self.await_end()
        self.exit_code = 255
        self._finish()

    def _leave_when_sent(self) -> None:
        deadline = time.monotonic() + _LINGER_S

        def look() -> None:
            if time.monotonic() > deadline or not any(c.waiting for c in self._connections):
                self.loop.stop()
            else:
                self.loop.later(0.01, look)

        look()


def _noted_code(note: Path) -> int:
    """What the keeper notes of a process's end, which it is just about to do if it has not yet."""
    deadline = time.monotonic() + _NOTE_S
    while (code := keeper.read_exit(note)) is None and time.monotonic() < deadline:
        time.sleep(0.005)
    return _UNKNOWN if code is None else code


def _holds(name: str, ends: StdioEnds) -> dict[str, int]:
    """Names for the descriptors that the keeper is to hold."""
    parts = {"c": ends.console, "0": ends.pipes[0], "1": ends.pipes[1], "2": ends.pipes[2]}
    return {f"{name}:{part}": fd for part, fd in parts.items() if fd is not None}


def _open_log(dirs: PodDirs) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.open(dirs.log, flags, 0o600)
