"""The tasks that this thread traces: how they are stopped and let go, and that none is forgotten in between.

Every task of a pod is seized and told to stop. Until it does it may do anything: create others, be killed, end, or
execute another program; and one that has stopped may be killed. The tracer has its part in each:

* Only when the tracer has noticed a task's end does the parent hear of it.
* execve(2) in one of several threads ends the others, waits until the tracer has noticed that, and goes on under the
  number of the process (ptrace(2), "execve(2) under ptrace").
* A new task of a traced one is traced from birth.
* The parent inside of vfork(2) can't stop before its child has executed a program or ended, so that child has to run.
* A task can only be let go when it is stopped. One that doesn't stop is kept in mind, and let go when it does.
* A leader may end while other threads live on. Its end can't be noticed before theirs (kernel/exit.c,
  delay_group_leader()), nor can it be let go; so if it was traced by then the process's end is ours to notice.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress

from podtree.errors import Problem, Refused
from podtree.kernel import kcmp, procfs, ptrace
from podtree.kernel.ptrace import Stop
from podtree.kernel.sys import NR

#: What a task is seized with. Not PTRACE_O_SUSPEND_SECCOMP: from the seizing to its stop the program still runs, and
#: could make any system call that its filter forbids.
SEIZE_OPTIONS = (
    ptrace.PTRACE_O_TRACESYSGOOD
    | ptrace.PTRACE_O_TRACEFORK
    | ptrace.PTRACE_O_TRACEVFORK
    | ptrace.PTRACE_O_TRACECLONE
)
OPTIONS = SEIZE_OPTIONS | ptrace.PTRACE_O_SUSPEND_SECCOMP  # once it is stopped: for scripts
_BIRTHS = (ptrace.PTRACE_EVENT_FORK, ptrace.PTRACE_EVENT_VFORK, ptrace.PTRACE_EVENT_CLONE)
_VFORKS = (NR.vfork, NR.clone, NR.clone3)  # clone(2): posix_spawn(3) makes its vfork with CLONE_VFORK
_BUSY_SPINS = 50  # looks without sleeping: a task that runs stops within microseconds
_PAUSE_S = 0.0001
_SEIZE_PATIENCE_S = 0.005
_PATIENCE_PER_TASK_S = 0.005  # on a busy machine; a pod that forks faster than that can't be stopped
_MOMENT_S = 0.002  # longer than a script takes to put its task back
_PARTING_S = 0.05  # how long `release` waits for those that haven't stopped yet


class NotStopped(Exception):
    """Some task didn't stop in time. `why` is for people."""

    def __init__(self, tid: int, why: str) -> None:
        self.tid = tid
        self.why = why
        super().__init__(f"task {tid} did not stop: {why}")


def living_threads(pid: int) -> list[tuple[int, str]]:
    """(tid, state) of the threads of a process that can still be stopped; none for what has ended."""
    found: list[tuple[int, str]] = []
    vanished = True
    with suppress(FileNotFoundError, ProcessLookupError):
        while vanished and not found:  # the last thread may have taken its leader's number, by execve(2)
            vanished = False
            for tid in procfs.threads(pid):
                try:
                    state = procfs.stat(pid, tid).state
                except (FileNotFoundError, ProcessLookupError):
                    vanished = True
                    continue
                if state not in "ZX":
                    found.append((tid, state))
    return found


class Tracees:
    """Whom this thread traces. ptrace(2) binds all of it to the thread that uses it.

    `foreign`: (process, tracer) of those that another task of the pod traces, by their number: podtree.ties.
    `stopped`: how those stopped that are. `running`: seized and told to stop, but not there yet; after `release`
    there may be some, which `tend` lets go at last. `ended`: leaders that have ended before their process, of whose
    end `tend` takes notice.
    """

    def __init__(self) -> None:
        self.stopped: dict[int, Stop] = {}
        self.running: set[int] = set()
        self.ended: set[int] = set()
        self.foreign: dict[int, tuple[int, int]] = {}
        self._processes: dict[int, int] = {}  # of each: the process that it is a thread of
        self._buried: set[int] = set()  # whose ends the helper has noticed

    # --- stopping

    def stop_all(self, list_pids: Callable[[], Iterable[int]], patience_s: float) -> None:
        """Stop all tasks of the processes that `list_pids` tells, and those that come into being meanwhile.

        Raises NotStopped, or Refused if another process traces one of them. The caller has to `release` then.
        """
        begun = time.monotonic()
        self.foreign.clear()
        while True:
            awaited = self._seize_new(list(list_pids()))
            deadline = begun + patience_s + _PATIENCE_PER_TASK_S * (len(self.stopped) + len(self.running))
            nobody_new = not self.running
            self._await_stops(deadline)
            if awaited is not None:
                self._check_time(deadline, awaited)
                time.sleep(_PAUSE_S)
            elif nobody_new and self._are_stopped():
                return

    def adopt(self, pid: int, tid: int, patience_s: float) -> None:
        """Seize and stop a task that nobody traces any more. Raises NotStopped, or ProcessLookupError if it is gone."""
        ptrace.seize(tid, SEIZE_OPTIONS)
        ptrace.interrupt(tid)
        self._add(tid, pid)
        self._await_stops(time.monotonic() + patience_s)

    def stop_again(self, tids: Iterable[int], patience_s: float) -> None:
        """Bring stopped tasks from their stop to another one, which tells of what has happened since, without
        letting them run their code in between. Raises NotStopped.
        """
        for tid in tids:
            with suppress(ProcessLookupError):
                ptrace.interrupt(tid)
            self._resume(tid)
        self._await_stops(time.monotonic() + patience_s)

    def run_shortly(self, tids: Iterable[int], patience_s: float) -> None:
        """Let stopped tasks run for a moment, also such as job control keeps stopped. Raises NotStopped."""
        wanted = list(tids)
        for tid in wanted:
            self._resume(tid)
        if wanted:
            time.sleep(_MOMENT_S)
        for tid in wanted:
            with suppress(ProcessLookupError):
                ptrace.interrupt(tid)
        self._await_stops(time.monotonic() + patience_s)

    def _resume(self, tid: int) -> None:
        """Let a stopped task run. One that was killed meanwhile is waited for as the others are."""
        with suppress(ProcessLookupError):
            ptrace.cont(tid)
        del self.stopped[tid]
        self.running.add(tid)

    def _seize_new(self, pids: list[int]) -> int | None:
        """Seize all that aren't traced yet; they are running then. Returns one that can't be seized now, if any.

        A task inside of vfork(2) isn't, nor is its child, which has to go on first.
        """
        threads = [(pid, tid, state) for pid in pids for tid, state in living_threads(pid)]
        known = (self.stopped, self.running, self.foreign)
        new = [one for one in threads if not any(one[1] in tids for tids in known)]
        blocked = [(pid, tid) for pid, tid, state in new if state == "D" and _in_vfork(tid)]
        spared = {child for pid, tid in blocked for child in _vfork_children(pid, tid)}
        self._let_run(spared)
        awaited = [tid for _, tid in blocked]
        related = bool(self.stopped or self.running) or len(new) > len({pid for pid, _, _ in new})
        with self._noticing_deaths() if new and related else nullcontext():
            for pid, tid, _ in new:
                if (pid, tid) not in blocked and pid not in spared and not self._seize(pid, tid, pids):
                    awaited.append(tid)
        return awaited[0] if awaited else None

    @contextmanager
    def _noticing_deaths(self) -> Iterator[None]:
        """While threads are seized, another thread of ours notices the deaths of those that are traced already.

        PTRACE_SEIZE waits for an execve(2) of another thread of that process (cred_guard_mutex), which waits for us
        to notice that its threads are dead: any thread of a tracer can, also when the tracing one hangs.
        """
        done = threading.Event()

        def notice() -> None:
            while not done.wait(_SEIZE_PATIENCE_S):
                for tid in [*self.stopped, *self.running]:
                    if ptrace.has_ended(tid):
                        self._buried.add(tid)
                        _take_note(tid)

        helper = threading.Thread(target=notice, name="deaths")
        helper.start()
        try:
            yield
        finally:
            done.set()
            helper.join()

    def _seize(self, pid: int, tid: int, pids: list[int]) -> bool:
        """False if that is to be tried again. `pids`: the pod's."""
        try:
            ptrace.seize(tid, SEIZE_OPTIONS)
        except ProcessLookupError:
            return False  # it has ended, or has its leader's number by now
        except PermissionError as error:
            try:
                text = procfs.status(pid, tid)
            except (FileNotFoundError, ProcessLookupError):
                return True
            if text["State"][0] in "ZX":
                return True
            if text["TracerPid"] == "0":
                return False  # it is ending
            tracer = int(text["TracerPid"])
            if tracer != os.getpid() and process_of(tracer) in pids:
                self.foreign[tid] = (pid, tracer)
                return True
            if tracer != os.getpid():
                reason = f"is traced by another process (host pid {text['TracerPid']})"
                raise _refuse_traced(pid, tid, reason, "end the debugger or strace first") from error
        try:
            ptrace.interrupt(tid)
        except ProcessLookupError:
            pass
        except OSError as error:  # EIO: not seized by us, nor born of one that is: it did it itself
            reason = "has asked to be traced by its parent (PTRACE_TRACEME), which is outside of the pod"
            raise _refuse_traced(pid, tid, reason, "") from error
        self._add(tid, pid)  # perhaps since its birth, of which we could not be told as its parent was killed
        return True

    def _await_stops(self, deadline: float) -> None:
        """Until nobody is running any more. Raises NotStopped."""
        spins = 0
        while self.running:
            if any(self._step(tid) for tid in list(self.running)):
                spins = 0
                continue
            spins += 1
            if spins > _BUSY_SPINS:
                if spins % 10 == 0:
                    self._notice_deaths()
                    self._notice_ended_leaders()
                    self._let_run([c for tid in self.running if _in_vfork(tid) for c in _vfork_children_of(tid)])
                for tid in list(self.running)[:1]:
                    self._check_time(deadline, tid)
                time.sleep(_PAUSE_S)

    def _step(self, tid: int) -> bool:
        """See what a running task has done; False if nothing."""
        stop = self._next_stop(tid)
        if stop is not None:
            self._handle(tid, stop)
        return stop is not None

    def _handle(self, tid: int, stop: Stop) -> None:
        with suppress(ProcessLookupError):  # killed: its end comes next
            if stop.exited:
                self._bury(tid)
            elif stop.is_interrupt:
                ptrace.set_options(tid, OPTIONS)
                self.running.discard(tid)
                self.stopped[tid] = stop
            elif stop.event:
                self._note_birth(tid, stop)
                ptrace.cont(tid)
            else:
                ptrace.cont(tid, stop.signal)  # a signal is to be delivered; then it stops

    def _next_stop(self, tid: int) -> Stop | None:
        try:
            return ptrace.poll(tid)
        except ChildProcessError:
            self.running.discard(tid)
            process = self._processes.pop(tid, tid)
            if process != tid and tid not in self._buried:  # by execve(2) it has taken its leader's number
                self.stopped.pop(process, None)
                self._add(process, process)
            self._buried.discard(tid)
            return None

    def _add(self, tid: int, pid: int) -> None:
        self.running.add(tid)
        self.ended.discard(tid)  # another thread's execve(2) has taken its number
        self._processes[tid] = pid

    def _note_birth(self, tid: int, stop: Stop) -> None:
        if stop.event in _BIRTHS:
            child = ptrace.event_message(tid)
            if child not in self.stopped:
                self._add(child, process_of(child))

    def _notice_deaths(self) -> None:
        """Of stopped tasks that were killed: somebody else may not stop before we have."""
        for tid in list(self.stopped):
            try:
                stop = ptrace.poll(tid)
            except ChildProcessError:  # noticed by the helper
                self._bury(tid)
                continue
            if stop is not None:  # its end, or the stop of who has taken its number
                del self.stopped[tid]
                self.running.add(tid)
                self._handle(tid, stop)

    def _notice_ended_leaders(self) -> None:
        """Of those that should stop, the leaders that have ended while other threads of theirs live."""
        for tid in list(self.running):
            with suppress(FileNotFoundError, ProcessLookupError):
                stat = procfs.stat(tid, tid)
                if stat.state == "Z" and stat.num_threads > 1:
                    self.running.discard(tid)
                    self.ended.add(tid)

    def _bury_ended(self) -> None:
        """Leaders that had ended, and whose process has ended now; or has executed a program, which needs nothing."""
        for tid in list(self.ended):
            try:
                if ptrace.has_ended(tid):
                    self._bury(tid)
                elif procfs.stat(tid, tid).state != "Z":
                    self.ended.discard(tid)
            except (ChildProcessError, FileNotFoundError, ProcessLookupError):
                self.ended.discard(tid)

    def _bury(self, tid: int) -> None:
        _take_note(tid)
        self.running.discard(tid)
        self.ended.discard(tid)
        self.stopped.pop(tid, None)
        self._processes.pop(tid, None)
        self._buried.discard(tid)

    def _let_run(self, pids: Iterable[int]) -> None:
        """Let processes go on that somebody waits for who can't stop."""
        for pid in pids:
            for tid, _ in living_threads(pid):
                if tid in self.stopped:
                    self._detach(tid)

    def _are_stopped(self) -> bool:
        """Whether all that have stopped still are; one that isn't has been killed, or another thread's execve(2)
        has taken its number.
        """
        for tid in list(self.stopped):
            try:
                ptrace.trap_signal(tid)
            except ProcessLookupError:
                del self.stopped[tid]
                self.running.add(tid)
        return not self.running

    def _check_time(self, deadline: float, tid: int) -> None:
        if time.monotonic() > deadline:
            vfork = "it is inside of vfork(2), and its child has neither executed a program nor ended"
            raise NotStopped(tid, vfork if _in_vfork(tid) else _wait_channel(tid))

    # --- letting go

    def release(self, list_pids: Callable[[], Iterable[int]] | None = None) -> None:
        """Let all go on. With `list_pids`, also such that we trace without knowing."""
        for tid in list(self.stopped):
            self._detach(tid)
        for pid in list_pids() if list_pids else ():
            for tid, _ in living_threads(pid):
                with suppress(FileNotFoundError, ProcessLookupError):
                    if procfs.status(pid, tid)["TracerPid"] == str(os.getpid()):
                        self._add(tid, pid)
        deadline = time.monotonic() + _PARTING_S
        lasting = set(self.ended)
        while self.tend() and (self.running or self.ended - lasting) and time.monotonic() < deadline:
            time.sleep(_PAUSE_S)
        self._processes = {tid: pid for tid, pid in self._processes.items() if tid in self.running}
        self._buried &= self.running

    def tend(self) -> bool:
        """Let go of those that have stopped at last, take notice of who has ended; whether there are more."""
        while any(self._part(tid) for tid in list(self.running)):
            pass
        self._notice_ended_leaders()
        self._bury_ended()
        return bool(self.running or self.ended)

    def _part(self, tid: int) -> bool:
        """Let a running task go if it can be; False if it has not stopped."""
        stop = self._next_stop(tid)
        if stop is None:
            return False
        if stop.exited:
            self._bury(tid)
            return True
        with suppress(ProcessLookupError):
            self._note_birth(tid, stop)
            ptrace.detach(tid, 0 if stop.event or stop.is_syscall else stop.signal)
            self.running.discard(tid)
        return True

    def _detach(self, tid: int) -> None:
        """Let a stopped task go on. One that isn't stopped has been killed, or got away inside of a script."""
        del self.stopped[tid]
        try:
            ptrace.detach(tid)
        except ProcessLookupError:
            self.running.add(tid)
            with suppress(ProcessLookupError):
                ptrace.interrupt(tid)


def _take_note(tid: int) -> None:
    """Of a task's end. If we are its parent, that is left for who wants to know how it ended."""
    try:
        text = procfs.status(tid)
        ours = text["PPid"] == str(os.getpid()) and text["Tgid"] == str(tid)
    except (FileNotFoundError, ProcessLookupError):
        ours = False
    if not ours:
        ptrace.reap(tid)


def _refuse_traced(pid: int, tid: int, reason: str, hint: str) -> Refused:
    comm = procfs.read_text(f"/proc/{pid}/task/{tid}/comm").strip()
    inner = procfs.pod_id(procfs.status(pid))
    return Refused([Problem(pid=inner, comm=comm, object="ptrace", reason=reason, hint=hint)])


def _in_vfork(tid: int) -> bool:
    """Whether a task waits, uninterruptibly, for its vfork child (kernel/fork.c, wait_for_vfork_done())."""
    try:
        return procfs.current_call(tid) in _VFORKS and procfs.stat(tid, tid).state == "D"
    except (OSError, IndexError):
        return False


def _vfork_children(pid: int, tid: int) -> list[int]:
    """Children of one thread that still share its memory."""
    found = []
    with suppress(OSError):
        for child in procfs.read_text(f"/proc/{pid}/task/{tid}/children").split():
            with suppress(OSError):
                if kcmp.compare_tasks(tid, int(child), kcmp.KCMP_VM) == 0:
                    found.append(int(child))
    return found


def _vfork_children_of(tid: int) -> list[int]:
    return _vfork_children(process_of(tid), tid)


def process_of(tid: int) -> int:
    """The process that a thread belongs to; the same number if it is gone."""
    try:
        return int(procfs.status(tid)["Tgid"])
    except (FileNotFoundError, ProcessLookupError):
        return tid


def _wait_channel(tid: int) -> str:
    try:
        return f"it waits uninterruptibly in the kernel, in {procfs.read_text(f'/proc/{tid}/wchan')}"
    except OSError:
        return "it waits uninterruptibly in the kernel"
