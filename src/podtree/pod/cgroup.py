"""The pod's control groups: limits, the device allow-list, and the list of its processes.

Version 2 where it has controllers, else version 1's hierarchies, else none: then limits are refused and
the processes are found by their pid namespace. cgroups(7); Documentation/admin-guide/cgroup-v1/devices.rst.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import msgspec

from podtree.errors import Unsupported
from podtree.kernel.mount import mountinfo
from podtree.pod.spec import PodSpec

PARENT = "podtree"
_CPU_PERIOD_US = 100_000
_LEAST_QUOTA_US = 1000  # the kernel's own bound: min_cfs_quota_period, kernel/sched/core.c

# Other container tools' list: any node may be made, only these opened. Null, zero, full, random, urandom,
# tty, console, ptmx, and the pty slaves.
_DEVICES = (
    "c *:* m", "b *:* m",
    "c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 1:8 rwm", "c 1:9 rwm",
    "c 5:0 rwm", "c 5:1 rwm", "c 5:2 rwm", "c 136:* rwm",
)  # fmt: skip


class Cgroup(msgspec.Struct, frozen=True):
    """The directories of one pod's groups, one per hierarchy; none where the machine has no cgroups."""

    dirs: tuple[str, ...]

    @property
    def name(self) -> str:
        """What they are all called; "" where there are none."""
        return os.path.basename(self.dirs[0]) if self.dirs else ""

    def add(self, pid: int) -> None:
        """Move a process into the pod's groups (0: the caller)."""
        for path in self.dirs:
            _write(Path(path) / "cgroup.procs", str(pid))

    def open_procs(self) -> list[int]:
        """Descriptors to which a process can write "0" to join, wherever it is by then."""
        return [os.open(f"{path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC) for path in self.dirs]

    def pids(self, init_pid: int) -> list[int]:
        """Host pids of the pod's processes, ascending, init included."""
        if not self.dirs:
            return _pids_by_namespace(init_pid)
        with contextlib.suppress(FileNotFoundError):
            return sorted(int(line) for line in _read(Path(self.dirs[0]) / "cgroup.procs").split())
        return []

    def hold(self) -> None:
        """Keep all tasks from running, whoever stops tracing them, until let_go (the freezer of either version)."""
        self._set_freezer("1", "FROZEN")

    def let_go(self) -> None:
        """The reverse; does nothing where nothing is held."""
        self._set_freezer("0", "THAWED")

    def _set_freezer(self, version_2: str, version_1: str) -> None:
        for path in self.dirs:
            for file, word in (("cgroup.freeze", version_2), ("freezer.state", version_1)):
                with contextlib.suppress(FileNotFoundError):
                    _write(Path(path) / file, word)

    def limit_cpus(self, cpus: float | None) -> None:
        """Set the limit on CPU time of a pod that has one, in CPUs; None lifts it."""
        quota = None if cpus is None else max(_LEAST_QUOTA_US, int(cpus * _CPU_PERIOD_US))
        version_2 = f"{'max' if quota is None else quota} {_CPU_PERIOD_US}"
        version_1 = str(-1 if quota is None else quota)
        for path in self.dirs:
            for file, word in (("cpu.max", version_2), ("cpu.cfs_quota_us", version_1)):
                with contextlib.suppress(FileNotFoundError):
                    _write(Path(path) / file, word)

    def limit_tasks(self, pids: int | None) -> None:
        """Set the limit on tasks, None: half of what the machine can have; all pods together leave some to the host.

        Without that, a program that forks without end in one pod would leave nobody a process to stop it by. Tasks
        that are there already stay, however many.
        """
        most = _most_tasks()
        for path in self.dirs:
            with contextlib.suppress(FileNotFoundError):  # another controller's hierarchy
                _write(Path(path) / "pids.max", str(most // 2 if pids is None else pids))
                _write(Path(path).parent / "pids.max", str(most - most // 8))

    def remove(self, timeout_s: float = 2.0) -> None:
        """Remove the groups once their processes are gone; what can't be removed in time is left."""
        deadline = time.monotonic() + timeout_s
        for path in self.dirs:
            while True:
                try:
                    os.rmdir(path)
                except FileNotFoundError:
                    pass
                except OSError:
                    if time.monotonic() < deadline:
                        time.sleep(0.005)
                        continue
                break
            with contextlib.suppress(OSError):  # other pods' groups are in it
                os.rmdir(os.path.dirname(path))


def create(pod_id: str, spec: PodSpec, beside: Cgroup | None = None) -> Cgroup:
    """Make the groups of a pod with the limits of `spec`, but for that on tasks: who builds the pod counts, too.
    It is set by limit_tasks, when they are gone. `beside`: those that it has.

    Raises Unsupported for a limit whose controller the machine lacks.
    """
    name = next(name for name in names(pod_id) if beside is None or name != beside.name)
    root = _version_2()
    if root is not None:
        return _create_v2(root, name, spec)
    hierarchies = _version_1()
    limits = {"memory": spec.memory, "cpu": spec.cpus, "pids": spec.pids}
    for controller, limit in limits.items():
        if limit is not None and controller not in hierarchies:
            raise Unsupported(f"this machine has no {controller} cgroup controller", f"omit --{controller}")
    return _create_v1(hierarchies, name, spec)


def names(pod_id: str) -> tuple[str, str]:
    """What a pod's groups may be called: while it is rewound there are two sets of them."""
    return pod_id, f"{pod_id}.next"


def find(pod_id: str) -> list[Cgroup]:
    """The groups that a pod has."""
    root = _version_2()
    bases = [root] if root is not None else list(_version_1().values())
    found = []
    for name in names(pod_id):
        paths = dict.fromkeys(str(base / PARENT / name) for base in bases)
        found.append(Cgroup(tuple(path for path in paths if os.path.isdir(path))))
    return [group for group in found if group.dirs]


def _create_v1(hierarchies: dict[str, Path], name: str, spec: PodSpec) -> Cgroup:
    """Below the caller's own groups, so that the limits that already bind the caller bind the pod.

    Memory and cpu are joined only for a limit of their own: without one the pod stays where its caller is.
    """
    wanted: list[str] = [c for c in ("pids", "freezer", "devices") if c in hierarchies]
    wanted += [c for c, limit in (("memory", spec.memory), ("cpu", spec.cpus)) if limit is not None]
    dirs = []
    for controller in wanted:
        path = hierarchies[controller] / PARENT / name
        if str(path) not in dirs:
            path.mkdir(parents=True, exist_ok=True)
            dirs.append(str(path))
        if controller == "devices":
            _write(path / "devices.deny", "a")
            for rule in _DEVICES:
                _write(path / "devices.allow", rule)
        elif controller == "memory":
            _write(path / "memory.limit_in_bytes", str(spec.memory))
        elif controller == "cpu" and spec.cpus is not None:
            _write(path / "cpu.cfs_period_us", str(_CPU_PERIOD_US))
            Cgroup((str(path),)).limit_cpus(spec.cpus)
    return Cgroup(tuple(dirs))


def _most_tasks() -> int:
    """Processes and threads that the machine can have: sysctl kernel.pid_max and kernel.threads-max."""
    return min(int(_read(Path(f"/proc/sys/kernel/{name}"))) for name in ("pid_max", "threads-max"))


def _create_v2(root: Path, name: str, spec: PodSpec) -> Cgroup:
    """Below the root: a group with processes of its own can't hand controllers down (cgroups(7))."""
    parent, path = root / PARENT, root / PARENT / name
    path.mkdir(parents=True, exist_ok=True)
    quota = None if spec.cpus is None else f"{max(_LEAST_QUOTA_US, int(spec.cpus * _CPU_PERIOD_US))} {_CPU_PERIOD_US}"
    limits = {
        "memory": ("memory.max", None if spec.memory is None else str(spec.memory)),
        "cpu": ("cpu.max", quota),
        "pids": ("pids.max", None if spec.pids is None else "max"),
    }
    if spec.pids is None:
        with contextlib.suppress(OSError):  # no such controller
            _enable("pids", root, parent)
    for controller, (file, value) in limits.items():
        if value is None:
            continue
        try:
            _enable(controller, root, parent)
            _write(path / file, value)
        except OSError as error:
            Cgroup((str(path),)).remove(0)
            raise Unsupported(f"cgroup limit {file}: {error.strerror}", f"omit --{controller}") from error
    return Cgroup((str(path),))


def _enable(controller: str, *groups: Path) -> None:
    """Hand a controller down to the groups below these (cgroups(7))."""
    for group in groups:
        _write(group / "cgroup.subtree_control", f"+{controller}")


def _version_2() -> Path | None:
    """The hierarchy, unless it only has what version 1 left over."""
    for mount in mountinfo():
        if mount.fstype == "cgroup2":
            with contextlib.suppress(OSError):
                if {"memory", "pids"} <= set(_read(Path(mount.point) / "cgroup.controllers").split()):
                    return Path(mount.point)
    return None


def _version_1() -> dict[str, Path]:
    """Controller -> the caller's own group of that hierarchy."""
    own = {}
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            own[controller] = path
    result = {}
    for mount in mountinfo():
        if mount.fstype == "cgroup":
            for controller in own.keys() & set(mount.options):
                group = Path(mount.point) / own[controller].lstrip("/")
                result[controller] = group if group.is_dir() else Path(mount.point)
    return result


def _pids_by_namespace(init_pid: int) -> list[int]:
    try:
        wanted = os.readlink(f"/proc/{init_pid}/ns/pid")
    except OSError:
        return []
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{name}/ns/pid") == wanted:
                    found.append(int(name))
    return sorted(found)


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii", errors="replace")


def _write(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        raise OSError(error.errno, f"writing {text!r} to {path}: {error.strerror}") from error
    finally:
        os.close(fd)
