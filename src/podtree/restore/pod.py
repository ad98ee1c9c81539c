"""Bringing a pod back: namespaces and descriptors by the builder, then the tree, then each process."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec

from podtree.errors import RestoreFailed
from podtree.image import manifest as manifest_file
from podtree.image import verify
from podtree.image.manifest import Manifest
from podtree.kernel import caps, procfs, ptrace, userfaultfd
from podtree.kernel.namespaces import Clone, clone_python, setns
from podtree.kernel.pidfd import pidfd_getfd, pidfd_open
from podtree.kernel.sys import NR, PAGE_SIZE, syscall
from podtree.objects import inotify, sysvipc, tmpfs
from podtree.objects.context import RestoreContext
from podtree.objects.descriptors import Deferred, arm_timers, numbers_needed, restore_files
from podtree.objects.memory import free_gap
from podtree.objects.processes import tables_of
from podtree.objects.procfiles import ProcFile
from podtree.objects.slots import raise_descriptor_limit, slot_base
from podtree.objects.threads import Thread
from podtree.pod.cgroup import Cgroup
from podtree.pod.dirs import PodDirs
from podtree.pod.launch import Builder, launch
from podtree.pod.live import INIT, ClockOffsets, ExecSession, Launched, LivePod
from podtree.pod.spec import PodSpec
from podtree.restore import arena, pager, plan
from podtree.restore.arena import Body
from podtree.restore.holders import Holders
from podtree.restore.late import LateFiles
from podtree.restore.nest import Nest, nest_of
from podtree.restore.pagecheck import PageCheck, Wanted, filled_at_once
from podtree.restore.pager import Filling, Lazy
from podtree.restore.process import ProcessRestorer, Shared
from podtree.restore.time import enter_new_time, join_time
from podtree.restore.tree import Tree
from podtree.restore.validate import Bounds, confine, explained
from podtree.script import vdso
from podtree.ties import Tie, Ties
from podtree.tracees import OPTIONS

END_PATIENCE_S = 10.0
MOST_AHEAD_BYTES = 128 << 20  # of memory for what may never be wanted, and time for it in a supervisor
CLOSE_RANGE_CLOEXEC = 4  # linux/close_range.h


def check_machine(manifest: Manifest) -> None:
    """Refuse an image that this machine can't run. Raises RestoreFailed."""
    if manifest.machine != platform.machine():
        raise RestoreFailed(f"the checkpoint is of a {manifest.machine} machine, this is {platform.machine()}")
    if manifest.vdso != vdso.digest():
        raise RestoreFailed(
            f"the checkpoint was taken on kernel {manifest.kernel}, whose vdso differs from this kernel's",
            "restore it on that kernel",
        )


def _check_cpu(manifest: Manifest, tid: int) -> None:
    """Refuse an image whose CPU state this CPU can't take; `tid` is any stopped task. Raises RestoreFailed."""
    here = len(ptrace.get_xstate(tid))
    if manifest.xstate_size > here:
        raise RestoreFailed(f"the checkpoint has {manifest.xstate_size} bytes of CPU state, this CPU takes {here}")


class _Layout:
    """Numbers that the whole restore agrees on."""

    def __init__(self, manifest: Manifest, bounds: Bounds, nest: Nest) -> None:
        self.bounds = bounds
        vmas = [v for p in manifest.processes for v in p.memory.vmas]
        self.stem = free_gap(vmas, arena.SIZE * 2)
        self.arena = self.stem + arena.SIZE
        highest = max((fd.fd for _, fds in tables_of(manifest.processes) for fd in fds), default=0)
        self.slot_base = slot_base(highest)
        self.page_names = verify.page_files(manifest)
        self.numbers = numbers_needed(self.slot_base, manifest.files) + len(self.page_names) + 1 + nest.slots


def restore_pod(
    pod_id: str, spec: PodSpec, dirs: PodDirs, cgroup: Cgroup, bounds: Bounds, *, verified: bool = False
) -> LivePod:
    """Bring the processes of `dirs.img` back to life over the volume `dirs.vol`, none of them beyond `bounds`.

    `verified`: the image was looked at by `restore.verify` just now. The caller is the parent of the pod's first
    process. Raises RestoreFailed, Damaged or Unsupported; nothing is left running then.
    """
    restore = Restore(pod_id, spec, dirs, cgroup, bounds, verified=verified)
    restore.complete()
    return restore.go()


class Restore:
    """A pod on its way back, in two parts.

    Made, it has everything that isn't of the moment: its world, files, tree and memory. `complete` does what has to
    do with when it goes on: clocks, timers, threads, pending signals; then `go`. In between somebody may let time
    pass, if that was said (`waits`). Each raises RestoreFailed, Damaged or Unsupported, and nothing is left then;
    else `go` or `abandon` has to follow.
    """

    def __init__(
        self,
        pod_id: str,
        spec: PodSpec,
        dirs: PodDirs,
        cgroup: Cgroup,
        bounds: Bounds,
        *,
        verified: bool = False,
        waits: bool = False,
    ) -> None:
        self.pod_id = pod_id
        self.spec = spec
        self.dirs = dirs
        self.cgroup = cgroup
        self.bounds = bounds
        self._waits = waits
        self._clock = ClockOffsets()
        self._sessions: dict[str, ExecSession] = {}
        self._restorers: list[ProcessRestorer] = []
        self._family: list[int] = []
        self._filling: Filling | None = None
        self._launched: Launched | None = None
        self._image_fd = os.open(dirs.img, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._stem_fd = -1
        self._namespaces = contextlib.ExitStack()  # those that programs had made
        try:
            self._prepare(verified)
        except BaseException as error:
            self.abandon()
            raise explained(error) from error

    def _prepare(self, verified: bool) -> None:
        manifest = manifest_file.load(self._image_fd)
        check_machine(manifest)
        self._manifest = manifest = confine(manifest, self.bounds)
        wanted = {} if verified else filled_at_once(self._image_fd, manifest)
        if self._waits:
            _check_may_wait(manifest, wanted)
        self._nest = nest = nest_of(manifest.nesting, manifest.processes, manifest.zombies)
        check = None if verified else PageCheck(self._image_fd, wanted)
        try:
            steps = plan.plan_image(manifest)
            self._layout = layout = _Layout(manifest, self.bounds, nest)
            self._stem_fd = _stem_file(layout.stem)

            def in_builder(builder: Builder) -> Any:
                return _make_objects(builder, manifest, layout, self._image_fd, nest)

            def as_init(builder: Builder) -> NoReturn:
                _become_stem(layout.slot_base, self._stem_fd)

            nest.holders = self._namespaces.enter_context(Holders(manifest.nesting)).pids
            self._namespaces.callback(nest.close)
            self._launched = launch(
                self.spec, self.dirs, self.cgroup, None, in_builder, as_init,
                inherit=[self._image_fd, self._stem_fd], numbers=layout.numbers,
            )  # fmt: skip
            self._made = msgspec.convert(self._launched.result, _Made)
            nest.proc_slot = self._made.proc_slot
            self._grow(steps)
            if check is not None:
                check.finish()
        finally:
            if check is not None:
                check.close()

    @property
    def is_gone(self) -> bool:
        """Whether it was let go, or abandoned."""
        return self._launched is None

    @property
    def init_pid(self) -> int:
        """The host's number of the pod's first process."""
        assert self._launched is not None
        return self._launched.init_pid

    def complete(self) -> None:
        """All but the last step: every task is what it was, and stopped."""
        assert self._launched is not None
        try:
            if self._filling is not None:
                self._filling.begin()  # a script may touch what is missing
            if self._waits:
                self._set_clock()
            with _asleep(self._manifest, self._launched, self._layout) as sleepers:
                self._bring_back()
                sleepers.arm()
            self._nest.verify(self._tree.bodies)
        except BaseException as error:
            raise explained(self._end() or error) from error

    def go(self, dirs: PodDirs | None = None) -> LivePod:
        """Let it run. `dirs`: where its things lie by now."""
        assert self._launched is not None
        try:
            traced = _trace_again(self._restorers)
        except BaseException as error:
            raise explained(self._end() or error) from error
        launched, self._launched = self._launched, None
        self._close()
        live = LivePod(
            pod_id=self.pod_id,
            spec=self.spec,
            dirs=dirs or self.dirs,
            init_pid=launched.init_pid,
            init_pidfd=launched.init_pidfd,
            root_fd=launched.root_fd,
            cgroup=self.cgroup,
            clock=self._clock,
            stdio=launched.stdio,
            sessions=self._sessions,
            filling=self._filling,
        )
        self.cgroup.limit_tasks(self.spec.pids)
        for restorer in self._restorers:
            restorer.go(traced)
        return live

    def abandon(self) -> None:
        """End all that was made. Does nothing after `go`."""
        self._end()

    def _end(self) -> Exception | None:
        """Returns why memory could not come in, if that is what went wrong."""
        failure = None
        if self._launched is not None:
            _end(self._launched, self._family)
            self._launched = None
            if self._filling is not None:
                failure = self._filling.failure()
                self._filling.abandon()
            else:
                for lazy in self._lazies():
                    os.close(lazy.uffd)
                    lazy.pages.close()
        self._close()
        return failure

    def _close(self) -> None:
        self._namespaces.close()
        for fd in (self._image_fd, self._stem_fd):
            if fd >= 0:
                os.close(fd)
        self._image_fd = self._stem_fd = -1

    def _grow(self, steps: list[plan.Step]) -> None:
        """All processes, with their memory."""
        assert self._launched is not None
        launched, manifest, layout = self._launched, self._manifest, self._layout
        names = {one.pid: one.name for one in manifest.stdio}

        def root_body(pid: int) -> Body:
            if pid == 1:
                host = launched.init_pid
            else:
                host = _spawn_outside(launched, pid, layout, self._nest.end, self._stem_fd)
                name = names.get(pid, f"exec-pid-{pid}")
                self._sessions[name] = ExecSession(name, host, pidfd_open(host))
            self._family.append(host)
            _seize(host)
            body = arena.enter_arena(host, layout.stem, layout.arena, self._family)
            self._nest.open_all(body)
            if pid == plan.INIT:
                self._nest.open_channel(body)
            if pid == 1 and not self._waits:  # all others are born with it
                self._clock = _go_on_from(manifest)
                enter_new_time(body, self._clock, self._made.proc_slot)
            return body

        self._tree = tree = Tree(layout.arena, root_body, self._nest)
        places = [p.place for p in manifest.processes]
        tree.grow(steps, places)
        _check_cpu(manifest, launched.init_pid)
        tree.verify(places)
        self._shared = Shared(
            slot_base=layout.slot_base,
            page_slots=self._made.page_slots,
            image_dir_fd=self._image_fd,
            deferred=self._made.deferred,
            flags={f.id: f.flags for f in manifest.files},
            holders=_first_holders(manifest),
            epoll_holders={file: pid for (_, file), pid in reversed(_first_holders(manifest).items())},
            segments={segment.id: segment.size for segment in manifest.ipc.segments},
            last_cap=caps.last_cap(),
            lazily=userfaultfd.is_available(),
            ipc=manifest.ipc,
            nest=self._nest,
            settled=set(),
        )
        by_pid = {p.place.pid: p for p in manifest.processes}
        self._restorers = [
            ProcessRestorer(p, tree.bodies[p.place.pid], self._shared, by_pid) for p in manifest.processes
        ]
        for restorer in self._restorers:
            restorer.map_memory()
        self._filling = pager.start(self._lazies(), self.dirs.run, launched.init_pidfd)

    def _lazies(self) -> list[Lazy]:
        """Memory that is to come later."""
        return [r.later for r in self._restorers if r.later]

    def _set_clock(self) -> None:
        """The pod's clocks go on now."""
        self._clock = _go_on_from(self._manifest)
        first = self._tree.bodies[1]
        enter_new_time(first, self._clock, self._made.proc_slot)
        for body in self._tree.bodies.values():
            if body is not first:
                join_time(body)

    def _bring_back(self) -> None:
        """Make each process of the tree what it was."""
        assert self._launched is not None
        manifest, tree, shared, restorers = self._manifest, self._tree, self._shared, self._restorers
        shared.clock_offset_ns = self._clock.monotonic_ns
        for restorer in restorers:
            if restorer.pid != plan.INIT:  # which keeps its rights to the last, and has no threads if it's nested
                self._nest.enter(tree.bodies, restorer.process)
            restorer.clone_threads(tree.bodies)
        _make_late_files(manifest, tree, self._layout, shared, restorers)
        tree.make_zombies(list(manifest.zombies))
        self._nest.settle(tree.bodies)
        if manifest.last_pid:
            tree.set_last_pid(manifest.last_pid, self._made.proc_slot)
        self._nest.enter(tree.bodies, next(r.process for r in restorers if r.pid == plan.INIT))
        tree.settle_terminals([p.place for p in manifest.processes])
        arm_timers(manifest.files, self._file, time.monotonic_ns() + self._clock.monotonic_ns)
        for restorer in restorers:
            restorer.set_attributes()
        for restorer in restorers:
            restorer.place_descriptors()
        for restorer in restorers:
            restorer.change_semaphores_last()
            restorer.set_threads()
            restorer.apply_outside_state()
            restorer.set_leader()
        for restorer in restorers:
            restorer.end_leader()
        for restorer in restorers:
            restorer.set_what_credentials_take_away()
        sysvipc.settle(manifest.ipc, procfs.living_thread(self._launched.init_pid))
        for restorer in _children_first(restorers):
            children = [r.process for r in restorers if r.process.place.ppid == restorer.pid]
            restorer.hear_of_children(children)
            restorer.finish()

    def _file(self, number: int) -> int:
        """A duplicate of a restored file, as long as it is in its slot."""
        assert self._launched is not None
        return pidfd_getfd(self._launched.init_pidfd, self._layout.slot_base + number)


def _check_may_wait(manifest: Manifest, at_once: Wanted) -> None:
    """Raises RestoreFailed for what had better not be made before it is wanted."""
    if any(process.shared.memory for process in manifest.processes):
        raise RestoreFailed("processes that share memory can't be given their clocks later")  # setns(2)
    if manifest.nesting.users:  # who is in a user namespace can't join that of the pod's clocks
        raise RestoreFailed("a checkpoint with user namespaces made inside can't be brought back ahead")
    size = sum(verify.shared_contents(manifest).values())
    size += sum(count for runs in at_once.values() for _, count in runs) * PAGE_SIZE
    if size > MOST_AHEAD_BYTES:
        raise RestoreFailed(f"{size >> 20} MiB of memory would have to be there ahead")


def _go_on_from(manifest: Manifest) -> ClockOffsets:
    """The pod's clocks go on from where they stood."""
    return ClockOffsets(
        manifest.clock.monotonic_ns - time.clock_gettime_ns(time.CLOCK_MONOTONIC),
        manifest.clock.boottime_ns - time.clock_gettime_ns(time.CLOCK_BOOTTIME),
    )


def _stem_file(address: int) -> int:
    try:
        fd = os.memfd_create("stem", os.MFD_CLOEXEC | 0x10)  # MFD_EXEC, memfd_create(2)
    except OSError:
        fd = os.memfd_create("stem", os.MFD_CLOEXEC)
    os.write(fd, arena.stem_elf(address))
    return fd


@dataclass(slots=True)
class _Made:
    """What the builder tells the supervisor of its work."""

    deferred: Deferred
    page_slots: dict[str, int]
    proc_slot: int  # the host's /proc; behind it are namespaces


def _make_objects(builder: Builder, manifest: Manifest, layout: _Layout, image_fd: int, nest: Nest) -> Any:
    """In the builder: everything that isn't a task. Descriptors end in their slots."""
    socket.sethostname(manifest.hostname)
    context = RestoreContext(
        root_fd=builder.root_fd,
        log_path_fd=builder.log_fd,
        image_dir_fd=image_fd,
        host_proc_fd=builder.host_proc_fd,
        queues=manifest.queues,
        stdio_fds=_make_stdio(builder, manifest),
        networks=nest.networks(),
    )
    sysvipc.restore(manifest.ipc, context)
    for mount in manifest.tmpfs:
        tmpfs.restore_tmpfs(mount, context)
    deferred = restore_files(list(manifest.files), context, layout.slot_base)
    slots = {name: deferred.end + i for i, name in enumerate(layout.page_names)}
    raise_descriptor_limit(deferred.end + len(slots) + 1 + nest.slots)
    for name, slot in slots.items():
        fd = os.open(f"mem/{name}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=image_fd)
        os.dup2(fd, slot, inheritable=True)
        os.close(fd)
    proc_slot = deferred.end + len(slots)
    os.dup2(builder.host_proc_fd, proc_slot, inheritable=True)
    return msgspec.to_builtins(_Made(deferred, slots, proc_slot))


def _make_stdio(builder: Builder, manifest: Manifest) -> tuple[int, ...]:
    """New stdio for all process trees from outside; the pod's ends of the pipes, three for each."""
    fds: list[int] = []
    for one in manifest.stdio:
        made = builder.stdio[INIT] if one.name == INIT else builder.make_stdio(one.name, one.mode, one.index)
        if made.mode != one.mode:
            raise RestoreFailed(f"the checkpoint's stdio is {one.mode!r}, the pod's {made.mode!r}")
        fds += made.fds if one.mode == "pipes" else (-1, -1, -1)
    builder.close_spare_ptys()
    return tuple(fds)


def _become_stem(slot_base: int, stem_fd: int) -> NoReturn:
    """Execute the stem with nothing open below the slots, and all signals at their default."""
    for number in range(1, signal.NSIG):
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    syscall(NR.close_range, 0, slot_base - 1, CLOSE_RANGE_CLOEXEC)
    os.execve(stem_fd, ["podtree"], {})


def _seize(tid: int) -> None:
    ptrace.seize(tid, OPTIONS | ptrace.PTRACE_O_EXITKILL)
    ptrace.interrupt(tid)
    while not (stop := ptrace.wait(tid)).is_interrupt:
        if stop.exited:
            raise RestoreFailed(f"the stem ended at once ({stop})")
        ptrace.cont(tid)


@contextlib.contextmanager
def _asleep(manifest: Manifest, launched: Launched, layout: _Layout) -> Iterator[inotify.Sleepers]:
    """The pod's inotify watches, which are not to be told of the restore."""
    instances = [(f.id, f.what) for f in manifest.files if isinstance(f.what, inotify.Inotify)]
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    raise_descriptor_limit()
    sleepers = inotify.Sleepers(instances, lambda file: pidfd_getfd(launched.init_pidfd, layout.slot_base + file))
    try:
        yield sleepers
    finally:
        sleepers.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def _trace_again(restorers: list[ProcessRestorer]) -> set[int]:
    """Who was traced by another task of the pod is again; their host tids: they aren't ours any more."""
    tasks = {
        thread.tid: (restorer.body.tid, body.tid, thread)
        for restorer in restorers
        for thread, body in zip(restorer.process.threads, restorer.bodies, strict=True)
    }
    ties = Ties()
    for pid, tid, thread in sorted(tasks.values(), key=lambda task: _tracers_above(task[2], tasks)):
        if thread.tracing:
            ties.taken[tid] = Tie(pid, tid, thread.tid, tasks[thread.tracing.tracer][1], thread.tracing)
    traced = set(ties.taken)
    if lost := ties.give_back():
        raise RestoreFailed(f"task {lost[0].inner} can't be traced again by {lost[0].tracing.tracer}")
    return traced


def _tracers_above(thread: Thread, tasks: dict[int, tuple[int, int, Thread]]) -> int:
    """How many trace it, and each other; the image was checked to have no circles."""
    return 1 + _tracers_above(tasks[thread.tracing.tracer][2], tasks) if thread.tracing else 0


def _make_late_files(
    manifest: Manifest, tree: Tree, layout: _Layout, shared: Shared, restorers: list[ProcessRestorer]
) -> None:
    """What is of tasks, and what is watched by epoll of that."""
    files = LateFiles(manifest.files, tree, layout.slot_base, layout.bounds.capabilities)
    tasks = {t.tid for p in manifest.processes for t in p.threads}
    tasks |= {p.place.pid for p in manifest.processes} | {z.place.pid for z in manifest.zombies}
    files.make(tasks.__contains__)
    gone = {f.id for f in manifest.files if isinstance(f.what, ProcFile) and f.what.gone}
    for process in (p for p in manifest.processes if tree.nest.is_apart(p.place.pid)):
        for file in {process.root, process.cwd} & gone:
            files.change_directory(file, process, root=file == process.root)
            shared.settled.add((process.place.pid, file))
    needed = {holder: {fd.file for fd in fds} for holder, fds in tables_of(manifest.processes)}
    for process in manifest.processes:
        needed[process.shared.files or process.place.pid] |= {process.cwd, process.root}
        for thread in process.threads:
            if thread.directories:
                holder = process.shared.files or process.place.pid if thread.fds is None else thread.tid
                needed[holder] |= {thread.directories.cwd, thread.directories.root}
    for own in shared.deferred.watches:
        needed[shared.watch_owner(own)].add(own.watch.file)
    bodies = {restorer.pid: restorer.body for restorer in restorers}
    bodies |= {t.tid: body for r in restorers for t, body in zip(r.process.threads, r.bodies, strict=True)}
    files.hand_out([(bodies[holder], ids, tree.nest.is_apart(holder)) for holder, ids in needed.items()])


def _first_holders(manifest: Manifest) -> dict[tuple[int, int], int]:
    """(descriptor, OpenFile.id) -> the first holder (see `tables_of`) that has it so."""
    found: dict[tuple[int, int], int] = {}
    for holder, fds in sorted(tables_of(manifest.processes), key=lambda table: table[0]):
        for fd in fds:
            found.setdefault((fd.fd, fd.file), holder)
    return found


def _children_first(restorers: list[ProcessRestorer]) -> list[ProcessRestorer]:
    """In an order in which no process comes before one of its children."""
    parent = {r.pid: r.process.place.ppid for r in restorers}
    depth = {0: 0}
    for pid in parent:
        path, above = [], pid
        while above not in depth:
            path.append(above)
            above = parent.get(above, 0)
        for number, below in enumerate(reversed(path), start=depth[above] + 1):
            depth[below] = number
    return sorted(restorers, key=lambda r: -depth[r.pid])


def _spawn_outside(launched: Launched, pid: int, layout: _Layout, end: int, stem_fd: int) -> int:
    """Make a process of the pod whose parent is outside of it, as `podtree exec` does; returns its host pid."""
    from_stem = pidfd_open(launched.init_pid)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    helper = os.fork()
    if helper == 0:
        try:
            launched.cgroup.add(0)
            raise_descriptor_limit(end)
            for slot in range(layout.slot_base, end):
                try:
                    fd = pidfd_getfd(from_stem, slot)
                except OSError:
                    continue
                if fd != slot:
                    os.dup2(fd, slot)
                    os.close(fd)
                os.set_inheritable(slot, True)
            flags = Clone.NEWNS | Clone.NEWNET | Clone.NEWIPC | Clone.NEWUTS | Clone.NEWCGROUP
            setns(from_stem, flags | Clone.NEWTIME | Clone.NEWPID)
            child = clone_python(Clone.PARENT, (pid,))
            if child == 0:
                os.chdir("/")
                _become_stem(layout.slot_base, stem_fd)
            os.write(writer, str(child).encode())
        except BaseException as error:
            os.write(writer, f"- {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        answer = file.read().decode()
    os.waitpid(helper, 0)
    os.close(from_stem)
    if not answer.isdigit():
        raise RestoreFailed(f"process {pid} can't be started from outside of the pod: {answer[2:]}")
    _await_stem(int(answer), layout.stem)
    return int(answer)


def _await_stem(host: int, stem: int) -> None:
    """Wait until a process has executed the stem."""
    deadline = time.monotonic() + 10
    while not any(e.start == stem for e in procfs.maps(host)):
        if time.monotonic() > deadline:
            raise RestoreFailed("a stem did not start")
        time.sleep(0.0002)


def _end(launched: Launched, family: list[int]) -> None:
    """Kill everything that was made and reap it.

    The pod's first process can't end before all others are reaped, and those that are traced wait for
    their tracer; in what order they become reapable depends on their place in the tree.
    """
    left = {launched.init_pid, *family}
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + END_PATIENCE_S
    while left and time.monotonic() < deadline:
        for tid in list(left):
            try:
                stop = ptrace.poll(tid)
            except ChildProcessError:
                left.discard(tid)
                continue
            if stop and stop.exited:
                ptrace.reap(tid)
                left.discard(tid)
        time.sleep(0.0005)
    os.close(launched.init_pidfd)
    os.close(launched.root_fd)
    for ends in launched.stdio.values():
        for fd in ends.fds():
            os.close(fd)
