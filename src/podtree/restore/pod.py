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
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from podtree.errors import RestoreFailed
from podtree.image import manifest as manifest_file
from podtree.image import verify
from podtree.image.manifest import Manifest
from podtree.kernel import procfs, ptrace, userfaultfd
from podtree.kernel.namespaces import Clone, clone_python, setns
from podtree.kernel.pidfd import pidfd_getfd, pidfd_open
from podtree.kernel.sys import NR, syscall
from podtree.objects import inotify, sysvipc, tmpfs
from podtree.objects.context import RestoreContext
from podtree.objects.descriptors import Deferred, restore_files
from podtree.objects.memory import free_gap
from podtree.objects.slots import raise_descriptor_limit, slot_base
from podtree.pod.cgroup import Cgroup
from podtree.pod.dirs import PodDirs
from podtree.pod.launch import Builder, launch
from podtree.pod.live import INIT, ClockOffsets, ExecSession, Launched, LivePod
from podtree.pod.spec import PodSpec
from podtree.restore import arena, pager, plan
from podtree.restore.arena import Body
from podtree.restore.late import LateFiles
from podtree.restore.pagecheck import PageCheck
from podtree.restore.pager import Filling
from podtree.restore.process import ProcessRestorer, Shared
from podtree.restore.tree import Tree
from podtree.restore.validate import Bounds, confine, explained
from podtree.script import vdso
from podtree.tracees import OPTIONS

END_PATIENCE_S = 10.0
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

    def __init__(self, manifest: Manifest, bounds: Bounds) -> None:
        self.bounds = bounds
        vmas = [v for p in manifest.processes for v in p.memory.vmas]
        self.stem = free_gap(vmas, arena.SIZE * 2)
        self.arena = self.stem + arena.SIZE
        highest = max((f.fd for p in manifest.processes for f in p.fds), default=0)
        self.slot_base = slot_base(highest)
        self.page_names = verify.page_files(manifest)


def restore_pod(
    pod_id: str, spec: PodSpec, dirs: PodDirs, cgroup: Cgroup, bounds: Bounds, *, verified: bool = False
) -> LivePod:
    """Bring the processes of `dirs.img` back to life over the volume `dirs.vol`, none of them beyond `bounds`.

    `verified`: the image was looked at by `restore.verify` just now. The caller is the parent of the pod's first
    process. Raises RestoreFailed, Damaged or Unsupported; nothing is left running then.
    """
    try:
        return _restore_pod(pod_id, spec, dirs, cgroup, bounds, verified)
    except BaseException as error:
        raise explained(error) from error


def _restore_pod(
    pod_id: str, spec: PodSpec, dirs: PodDirs, cgroup: Cgroup, bounds: Bounds, verified: bool
) -> LivePod:
    image_fd = os.open(dirs.img, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stem_fd = -1
    check: PageCheck | None = None
    try:
        manifest = manifest_file.load(image_fd)
        check_machine(manifest)
        manifest = confine(manifest, bounds)
        if not verified:
            check = PageCheck(image_fd, manifest)
        steps = plan.plan_tree([p.place for p in manifest.processes] + [z.place for z in manifest.zombies])
        layout = _Layout(manifest, bounds)
        stem_fd = _stem_file(layout.stem)
        clock = _clock_offsets(manifest)

        def in_builder(builder: Builder) -> Any:
            return _make_objects(builder, manifest, layout, image_fd, clock)

        def as_init(builder: Builder) -> NoReturn:
            _become_stem(layout.slot_base, stem_fd)

        launched = launch(spec, dirs, cgroup, clock, in_builder, as_init, inherit=[image_fd, stem_fd])
        made = msgspec.convert(launched.result, _Made)
        family: list[int] = []
        fillings: list[Filling] = []
        try:
            restorers, roots = _grow(
                manifest, steps, layout, launched, made, image_fd, stem_fd, family, clock, dirs.run, fillings
            )
            if check is not None:
                check.finish()
        except BaseException as error:
            _end(launched, family)
            failure = None
            for filling in fillings:
                failure = filling.failure()
                filling.abandon()
            if failure is not None:
                raise failure from error
            raise
        live = LivePod(
            pod_id=pod_id,
            spec=spec,
            dirs=dirs,
            init_pid=launched.init_pid,
            init_pidfd=launched.init_pidfd,
            root_fd=launched.root_fd,
            cgroup=cgroup,
            clock=clock,
            stdio=launched.stdio,
            sessions=roots,
            filling=next(iter(fillings), None),
        )
        cgroup.limit_tasks(spec.pids)
        for restorer in restorers:
            restorer.go()
        return live
    finally:
        if check is not None:
            check.close()
        os.close(image_fd)
        if stem_fd >= 0:
            os.close(stem_fd)


def _clock_offsets(manifest: Manifest) -> ClockOffsets:
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
    proc_slot: int  # the host's /proc
    end: int  # first number above all slots


def _make_objects(
    builder: Builder, manifest: Manifest, layout: _Layout, image_fd: int, clock: ClockOffsets
) -> Any:
    """In the builder: everything that isn't a task. Descriptors end in their slots."""
    socket.sethostname(manifest.hostname)
    context = RestoreContext(
        root_fd=builder.root_fd,
        log_path_fd=builder.log_fd,
        image_dir_fd=image_fd,
        host_proc_fd=builder.host_proc_fd,
        queues=manifest.queues,
        stdio_fds=_make_stdio(builder, manifest),
        clock_offset_ns=clock.monotonic_ns,
    )
    sysvipc.restore(manifest.ipc, context)
    for mount in manifest.tmpfs:
        tmpfs.restore_tmpfs(mount, context)
    deferred = restore_files(list(manifest.files), context, layout.slot_base)
    slots = {name: deferred.end + i for i, name in enumerate(layout.page_names)}
    raise_descriptor_limit(deferred.end + len(slots) + 1)
    for name, slot in slots.items():
        fd = os.open(f"mem/{name}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=image_fd)
        os.dup2(fd, slot, inheritable=True)
        os.close(fd)
    proc_slot = deferred.end + len(slots)
    os.dup2(builder.host_proc_fd, proc_slot, inheritable=True)
    return msgspec.to_builtins(_Made(deferred, slots, proc_slot, proc_slot + 1))


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


def _grow(
    manifest: Manifest,
    steps: list[plan.Step],
    layout: _Layout,
    launched: Launched,
    made: _Made,
    image_fd: int,
    stem_fd: int,
    family: list[int],
    clock: ClockOffsets,
    run: Path,
    fillings: list[Filling],
) -> tuple[list[ProcessRestorer], dict[str, ExecSession]]:
    """All tasks, complete and stopped. The pager, if there is one, is in `fillings`."""
    roots: dict[str, ExecSession] = {}
    names = {one.pid: one.name for one in manifest.stdio}

    def root_body(pid: int) -> Body:
        if pid == 1:
            host = launched.init_pid
        else:
            host = _spawn_outside(launched, pid, layout, made.end, stem_fd)
            name = names.get(pid, f"exec-pid-{pid}")
            roots[name] = ExecSession(name, host, pidfd_open(host))
        family.append(host)
        _seize(host)
        return arena.enter_arena(host, layout.stem, layout.arena, family)

    tree = Tree(layout.arena, root_body)
    tree.grow(steps, [p.place for p in manifest.processes])
    with _asleep(manifest, launched, layout) as sleepers:
        restorers = _bring_back(manifest, tree, layout, launched, made, image_fd, clock, run, fillings)
        sleepers.arm()
    return restorers, roots


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


def _bring_back(
    manifest: Manifest,
    tree: Tree,
    layout: _Layout,
    launched: Launched,
    made: _Made,
    image_fd: int,
    clock: ClockOffsets,
    run: Path,
    fillings: list[Filling],
) -> list[ProcessRestorer]:
    """Make each process of the tree what it was."""
    _check_cpu(manifest, launched.init_pid)
    places = [p.place for p in manifest.processes]
    tree.verify(places)
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last_cap = int(file.read())
    shared = Shared(
        slot_base=layout.slot_base,
        page_slots=made.page_slots,
        image_dir_fd=image_fd,
        deferred=made.deferred,
        flags={f.id: f.flags for f in manifest.files},
        holders=_first_holders(manifest),
        epoll_holders={file: pid for (_, file), pid in reversed(_first_holders(manifest).items())},
        segments={segment.id: segment.size for segment in manifest.ipc.segments},
        last_cap=last_cap,
        clock_offset_ns=clock.monotonic_ns,
        lazily=userfaultfd.is_available(),
        ipc=manifest.ipc,
    )
    restorers = [ProcessRestorer(p, tree.bodies[p.place.pid], shared) for p in manifest.processes]
    for restorer in restorers:
        restorer.clone_threads()
    _make_late_files(manifest, tree, layout, shared)
    tree.make_zombies(list(manifest.zombies))
    if manifest.last_pid:
        tree.set_last_pid(manifest.last_pid, made.proc_slot)
    tree.settle_terminals(places)
    for restorer in restorers:
        restorer.map_memory()
    later = [r.later for r in restorers if r.later]
    filling = pager.start(later, run, launched.init_pidfd)  # before a script touches what is missing
    if filling:
        fillings.append(filling)
    for restorer in restorers:
        restorer.set_attributes()
    for restorer in restorers:
        restorer.change_semaphores_last()
        restorer.set_threads()
        restorer.apply_outside_state()
        restorer.set_leader()
    sysvipc.settle(manifest.ipc, launched.init_pid)
    for restorer in _children_first(restorers):
        children = [r.process for r in restorers if r.process.place.ppid == restorer.pid]
        restorer.hear_of_children(children)
        restorer.finish()
    return restorers


def _make_late_files(manifest: Manifest, tree: Tree, layout: _Layout, shared: Shared) -> None:
    """What is of tasks, and what is watched by epoll of that."""
    files = LateFiles(manifest.files, tree, layout.slot_base, layout.bounds.capabilities)
    tasks = {t.tid for p in manifest.processes for t in p.threads} | {z.place.pid for z in manifest.zombies}
    files.make(tasks.__contains__)
    needed = {p.place.pid: {fd.file for fd in p.fds} | {p.cwd, p.root} for p in manifest.processes}
    for own in shared.deferred.watches:
        needed[shared.watch_owner(own)].add(own.watch.file)
    files.hand_out(lambda pid: needed.get(pid, ()))


def _first_holders(manifest: Manifest) -> dict[tuple[int, int], int]:
    """(descriptor, OpenFile.id) -> the lowest pid that has it so."""
    found: dict[tuple[int, int], int] = {}
    for process in sorted(manifest.processes, key=lambda p: p.place.pid):
        for fd in process.fds:
            found.setdefault((fd.fd, fd.file), process.place.pid)
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
