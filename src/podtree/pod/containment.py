"""The pod's view of the world, as a plan of mounts that can be printed before it is executed.

The builder executes `outer_plan` in a mount namespace of its own, while the host's files are still in sight,
then makes the overlay its root. What is of the pid namespace (/proc) is mounted by the pod's first process:
`inner_plan`. Masked and read-only paths are those of other container tools.

Devices: every mount is `nodev`, and the few nodes of /dev are single read-only binds of a small tmpfs that
is itself out of reach. So a node that the pod makes can't be opened, with or without a devices cgroup.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from podtree.errors import Damaged, PodtreeError, UsageError
from podtree.kernel import mount
from podtree.kernel.mount import MountAttr, Resolve
from podtree.pod.dirs import PodDirs
from podtree.pod.paths import make_in, open_in
from podtree.pod.spec import PodSpec, Volume

_OPAQUE = "trusted.overlay.opaque"  # overlayfs.rst: a directory that isn't merged with those below
MARK = "/run/podtree/mark"
HIDDEN = ".podtree"  # at the top of the volume: the unlinked files that a checkpoint keeps

#: File systems of the host that are more than a window on the kernel; mounted elsewhere than on /, each is
#: seen through an overlay of its own.
_HOST_FILE_SYSTEMS = (
    "bcachefs", "btrfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "jfs", "nfs", "nfs4", "nilfs2",
    "reiserfs", "squashfs", "vfat", "virtiofs", "9p", "xfs", "zfs",
)  # fmt: skip
_NODES = {
    "null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0),
}  # fmt: skip
_LINKS = {
    "ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}  # fmt: skip
_MASKED_PROC = (
    "acpi", "asound", "interrupts", "kcore", "keys", "latency_stats", "sched_debug", "scsi", "timer_list",
    "timer_stats",
)  # fmt: skip
_MASKED_SYS = ("/sys/firmware", "/sys/devices/virtual/powercap")
_MASKED_CPU = "/sys/devices/system/cpu/cpu*/thermal_throttle"
_READ_ONLY_PROC = ("bus", "fs", "irq", "sys", "sysrq-trigger")
_PLAIN = MountAttr.NOSUID | MountAttr.NODEV | MountAttr.NOEXEC


class Step(Protocol):
    """One line of the plan. `root` is an O_PATH descriptor of the pod's root, attached somewhere."""

    def describe(self) -> str:
        """For people."""

    def execute(self, root: int) -> None:
        """Do it; raises OSError or PodtreeError."""


@dataclass(frozen=True)
class NewFileSystem:
    """Mount a new instance of `fstype` on `target`; symbolic links on the way are refused."""

    target: str
    fstype: str
    attrs: MountAttr
    options: dict[str, str | None] = field(default_factory=dict)

    def describe(self) -> str:
        return f"{self.fstype} on {self.target}"

    def execute(self, root: int) -> None:
        _attach_on(mount.make_mount(self.fstype, self.options, self.attrs), root, self.target, symlinks=False)


@dataclass(frozen=True)
class HostOverlay:
    """A host file system, mounted on the host at `target`, with the pod's writes kept in `layer`."""

    target: str
    layer: Path
    home: Path

    def describe(self) -> str:
        return f"overlay on {self.target}: {self.target} below, writes in {self.layer}"

    def execute(self, root: int) -> None:
        try:
            made = make_overlay(self.target, self.layer, self.home)
        except OSError:  # an overlay can't lie on just any file system (vfat for one): then it is only shown
            if self.home.is_relative_to(self.target):  # and nothing could hide the pool
                raise
            made = mount.clone_tree(self.target)
            mount.set_attributes(made, MountAttr.RDONLY | MountAttr.NOSUID | MountAttr.NODEV)
        with contextlib.suppress(FileNotFoundError):  # the pod has removed the place
            target = open_in(root, self.target)
            mount.attach(made, target)
            os.close(target)
        os.close(made)


@dataclass(frozen=True)
class Bind:
    """Show the host's `volume.source` at `volume.target`, but for the pool in `home`, if it lies in there."""

    volume: Volume
    home: Path

    def describe(self) -> str:
        mode = "read-only" if self.volume.read_only else "read-write"
        return f"{self.volume.source} on {self.volume.target}, {mode}"

    def execute(self, root: int) -> None:
        tree = self._clone_source()
        attrs = MountAttr.NODEV | MountAttr.NOSUID
        if self.volume.read_only:
            attrs |= MountAttr.RDONLY
        mount.set_attributes(tree, attrs, recursive=True)
        try:
            _attach_on(tree, root, self.volume.target, directory=stat.S_ISDIR(os.fstat(tree).st_mode))
        except PodtreeError as error:
            raise UsageError(f"-v {self.volume.source}:{self.volume.target}: {error.message}") from error
        if self.home.is_relative_to(self.volume.source):
            within = self.home.relative_to(self.volume.source)
            Mask(os.path.join(self.volume.target, within), symlinks=True).execute(root)

    def _clone_source(self) -> int:
        source = self.volume.source
        if Path(source).is_relative_to(self.home):
            raise PodtreeError(f"-v {source}: what is below {self.home} isn't shown to pods")
        place = _open_host(source, f"-v {source}")
        try:
            return mount.clone_tree("", place, recursive=True)
        finally:
            os.close(place)


@dataclass(frozen=True)
class Devices:
    """The nodes and links of /dev. `staging` is a host directory that the tmpfs of nodes is put over."""

    staging: Path

    def describe(self) -> str:
        return f"/dev: {' '.join([*_NODES, *_LINKS])}"

    def execute(self, root: int) -> None:
        nodes = mount.make_mount("tmpfs", {"mode": "700", "size": "64k"}, MountAttr.NOSUID | MountAttr.NOEXEC)
        place = os.open(self.staging, os.O_PATH | os.O_CLOEXEC)
        mount.attach(nodes, place)  # only an attached mount can be cloned before Linux 6.15
        os.close(place)
        for name, (major, minor) in _NODES.items():
            os.mknod(name, stat.S_IFCHR | 0o666, os.makedev(major, minor), dir_fd=nodes)
            node = mount.clone_tree(name, nodes)
            mount.set_attributes(node, MountAttr.RDONLY | MountAttr.NOSUID | MountAttr.NOEXEC)
            _attach_on(node, root, f"/dev/{name}", directory=False, symlinks=False)
        os.close(nodes)
        dev = open_in(root, "/dev")
        for name, where in _LINKS.items():
            os.symlink(where, name, dir_fd=dev)
        os.close(dev)


@dataclass(frozen=True)
class Mask:
    """Put nothing in the place of `target`, where it exists: an empty directory, or /dev/null."""

    target: str
    symlinks: bool = False  # whether there may be any on the way

    def describe(self) -> str:
        return f"mask {self.target}"

    def execute(self, root: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            target = open_in(root, self.target, symlinks=self.symlinks)
            if stat.S_ISDIR(os.fstat(target).st_mode):
                cover = mount.make_mount("tmpfs", {"size": "0", "mode": "555"}, _PLAIN | MountAttr.RDONLY)
            else:
                null = open_in(root, "/dev/null")
                cover = mount.clone_tree("", null)
                os.close(null)
            mount.attach(cover, target)
            os.close(cover)
            os.close(target)


@dataclass(frozen=True)
class ReadOnly:
    """Make `target`, where it exists, and what lies below unwritable."""

    target: str

    def describe(self) -> str:
        return f"{self.target} read-only"

    def execute(self, root: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            target = open_in(root, self.target, symlinks=False)
            tree = mount.clone_tree("", target)
            mount.set_attributes(tree, _PLAIN | MountAttr.RDONLY)
            mount.attach(tree, target)
            os.close(tree)
            os.close(target)


def _open_host(path: str, option: str) -> int:
    """An O_PATH descriptor of what `option` named on the host. Raises PodtreeError.

    The path had no symbolic links when the pod was made: one that is there now may have been put there by a pod that
    can write to a directory above it, and would show this one, in a branch, whatever it likes.
    """
    try:
        return mount.openat2(mount.AT_FDCWD, path, os.O_PATH, Resolve.NO_SYMLINKS)
    except OSError as error:
        link = error.errno == errno.ELOOP
        what = "is, or lies behind, a symbolic link now" if link else os.strerror(error.errno or 0)
        hint = "put back what was there, or make a new pod" if link or error.errno == errno.ENOENT else ""
        raise PodtreeError(f"{option}: {what}", hint) from error


def outer_plan(spec: PodSpec, dirs: PodDirs) -> list[Step]:
    """What the builder mounts, before the overlay becomes its root."""
    steps: list[Step] = []
    if spec.rootfs is None:
        layers = dirs.vol / "mounts"
        steps += [HostOverlay(p, layers / p.replace("/", "%2F"), dirs.home) for p in submounts(dirs.home)]
    steps += [
        NewFileSystem("/sys", "sysfs", _PLAIN | MountAttr.RDONLY),
        NewFileSystem("/dev", "tmpfs", _PLAIN, {"mode": "755", "size": "64m"}),
        Devices(dirs.vol),
        NewFileSystem(
            "/dev/pts", "devpts", MountAttr.NOSUID | MountAttr.NOEXEC,
            {"newinstance": None, "ptmxmode": "0666", "mode": "0620", "gid": "5"},
        ),
        NewFileSystem("/dev/shm", "tmpfs", _PLAIN, {"mode": "1777"}),
        NewFileSystem("/dev/mqueue", "mqueue", _PLAIN),
        Mask(f"/{HIDDEN}"),
    ]  # fmt: skip
    steps += [Mask(path) for path in (*_MASKED_SYS, *sorted(glob.glob(_MASKED_CPU)))]
    # One below another comes after it, in whatever order they were given.
    steps += [Bind(volume, dirs.home) for volume in sorted(spec.volumes, key=lambda volume: volume.target.count("/"))]
    return steps


def inner_plan() -> list[Step]:
    """What the first process mounts, inside the pod."""
    steps: list[Step] = [NewFileSystem("/proc", "proc", _PLAIN)]
    steps += [ReadOnly(f"/proc/{name}") for name in _READ_ONLY_PROC]
    steps += [Mask(f"/proc/{name}") for name in _MASKED_PROC]
    return steps


def execute(steps: Sequence[Step], root: int) -> None:
    """Run a plan in order; an error says at which step."""
    for step in steps:
        try:
            step.execute(root)
        except OSError as error:
            raise OSError(error.errno, f"{step.describe()}: {error.strerror}") from error


def prepare_volume(spec: PodSpec, dirs: PodDirs) -> None:
    """Give a new volume what the overlay needs: the top directory's mode as below, the hidden directory."""
    upper = dirs.vol / "upper"
    hidden = upper / HIDDEN
    _expect_directories(dirs.vol, "upper", "mounts")
    upper.mkdir(exist_ok=True)
    if not os.path.lexists(hidden):
        _copy_attributes(Path(spec.rootfs or "/"), upper)
        hidden.mkdir(mode=0o700)
        os.setxattr(hidden, _OPAQUE, b"y")  # whatever the root below has under that name isn't ours


def _expect_directories(place: Path, *names: str) -> None:
    """Raise Damaged if one of these (of a volume that came with a checkpoint, say) is something else, as a link."""
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISDIR(os.lstat(place / name).st_mode):
                raise Damaged(f"{name} in the pod's volume is no directory", "podtree fsck")


def make_root(spec: PodSpec, dirs: PodDirs) -> tuple[int, int]:
    """The pod's root, attached over the run directory: (descriptor of it, detached clone).

    The clone stays free of whatever gets mounted on the root: through it the hidden directory is reachable.
    """
    if spec.rootfs is not None:
        os.close(_open_host(spec.rootfs, f"--rootfs {spec.rootfs}"))
    root = make_overlay(spec.rootfs or "/", dirs.vol, dirs.home)
    place = os.open(dirs.run, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    mount.attach(root, place)
    os.close(place)
    return root, mount.clone_tree("", root)


def make_overlay(lower: str, layer: Path, home: Path) -> int:
    """A detached overlay: `lower` below, `layer`/upper above.

    Relative names, so that the pod's /proc/mounts neither tells where the pool is nor differs in a branch.
    redirect_dir: directories of the lower layer can be renamed. xino: one st_dev for all files.
    """
    _expect_directories(layer.parent, layer.name)
    _expect_directories(layer, "upper", "work", "veil")
    (layer / "upper").mkdir(parents=True, exist_ok=True)
    (layer / "work").mkdir(exist_ok=True)
    options: dict[str, str | None] = {"upperdir": "upper", "workdir": "work"}
    options.update(redirect_dir="on", metacopy="off", index="off", xino="on")
    layers = [lower.replace("\\", "\\\\").replace(":", "\\:")]
    if home.is_relative_to(lower) and home != Path(lower):
        _make_veil(layer / "veil", Path(lower), home.relative_to(lower))
        layers.insert(0, "veil")
    options["lowerdir"] = ":".join(layers)
    place = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chdir(layer)
        return mount.make_mount("overlay", options, MountAttr.NODEV)
    finally:
        os.fchdir(place)
        os.close(place)


def _make_veil(veil: Path, lower: Path, home: Path) -> None:
    """A layer between `lower` and the pod's own in which `home` is deleted.

    A mount on top of it wouldn't do: the pod could rename a directory above the mount point, and would find
    the bare pool there once the mount is made again, in a branch.
    """
    with contextlib.suppress(OSError):
        if stat.S_ISCHR(os.lstat(veil / home).st_mode):
            return
    shutil.rmtree(veil, ignore_errors=True)
    below = list(reversed(home.parents))  # "." first
    for directory in below:
        (veil / directory).mkdir(parents=True)
    os.mknod(veil / home, stat.S_IFCHR, os.makedev(0, 0))  # overlayfs.rst: a whiteout
    for directory in reversed(below):
        _copy_attributes(lower / directory, veil / directory)


def _copy_attributes(source: Path, target: Path) -> None:
    status = os.stat(source)
    os.chown(target, status.st_uid, status.st_gid)
    shutil.copystat(source, target)


def submounts(home: Path) -> list[str]:
    """Where the host has other file systems of its own, outermost first. `home`: of the pool."""
    own = ("/proc", "/sys", "/dev", "/run", str(home))
    points = {m.point for m in mount.mountinfo() if m.fstype in _HOST_FILE_SYSTEMS and m.point != "/"}
    points = {p for p in points if not any(p == o or p.startswith(o + "/") for o in own)}
    return sorted(p for p in points if not _is_pool(Path(p)))


def _is_pool(path: Path) -> bool:
    """Whether another PODTREE_HOME's pool is mounted there: it holds other pods' secrets."""
    try:
        return (path / "ckpts").is_dir() and (path / "index.sqlite").exists()
    except OSError:
        return False


def write_names(root: int, hostname: str) -> None:
    """Give a new pod an /etc/hosts and an /etc/hostname that know its name.

    `root` is the overlay without what is mounted on it: what -v shows there is the host's, and stays as it is.
    """
    hosts = f"127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost ip6-localhost ip6-loopback\n"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK
    for path, text in (("/etc/hosts", hosts), ("/etc/hostname", f"{hostname}\n")):
        with contextlib.suppress(OSError, PodtreeError):  # no /etc, or something strange in its place
            os.close(make_in(root, "/etc", directory=True, symlinks=False))
            fd = open_in(root, path, flags, symlinks=False, mode=0o644)
            with open(fd, "w", encoding="ascii") as file:
                file.write(text)


def make_mark(root: int) -> None:
    """Give a new pod the file that its programs write to when a moment is worth keeping; likewise."""
    directory, _, _name = MARK.rpartition("/")
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    with contextlib.suppress(OSError, PodtreeError):
        os.close(make_in(root, directory, directory=True, symlinks=False))
        fd = open_in(root, MARK, flags, symlinks=False, mode=0o666)
        os.fchmod(fd, 0o666)  # whoever they run as
        os.close(fd)


def _attach_on(
    made: int, root: int, target: str, *, directory: bool = True, symlinks: bool = True
) -> None:
    place = make_in(root, target, directory=directory, symlinks=symlinks)
    try:
        mount.attach(made, place)
    finally:
        os.close(place)
        os.close(made)
