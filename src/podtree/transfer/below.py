"""What lies below a pod: which of those files its processes use, and whether they are the same in another place.

"The same base" means: every file below that some process had open or mapped has the size, the modification time and
the contents (BLAKE3) that it had; and what the pod has written to further file systems of the host has those to lie
over. Files that nobody had open aren't compared: a host's root changes all the time.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from blake3 import blake3

from podtree.diff.files import trees
from podtree.diff.overlay import Entry, Parts, Tree
from podtree.errors import Conflict, Unsupported
from podtree.image.manifest import Manifest
from podtree.kernel import fdops
from podtree.kernel.below import open_below
from podtree.kernel.mount import clone_tree
from podtree.objects.files import RegularFile
from podtree.objects.held import OWN_TMPFS, path_bytes, path_text
from podtree.pod.containment import submounts
from podtree.transfer.schema import Below, UsedFile

_CHUNK = 1 << 20
_NAMED = 5  # files that an error names


def points_of(vol: Path) -> tuple[str, ...]:
    """The host's further file systems that the pod has an overlay over."""
    try:
        return tuple(sorted(name.replace("%2F", "/") for name in os.listdir(vol / "mounts")))
    except FileNotFoundError:
        return ()


def written_points(vol: Path) -> list[str]:
    """Those of them that the pod has written to."""
    return [p for p in points_of(vol) if _has_entries(vol / "mounts" / p.replace("/", "%2F") / "upper")]


def _has_entries(directory: Path) -> bool:
    try:
        return any(True for _ in os.scandir(directory))
    except FileNotFoundError:
        return False


def used_files(vol: Path, lower: Path, manifest: Manifest) -> list[UsedFile]:
    """The files below `vol` that the manifest's processes have open or mapped.

    Raises Conflict if one isn't any more what it was: the checkpoint could not be brought back here, either.
    """
    found: dict[tuple[str, str], UsedFile] = {}
    with contextlib.ExitStack() as scope:
        layers = {point: scope.enter_context(tree) for point, tree in trees(vol, lower).items()}
        for state in _files(manifest):
            file = _used(layers, state)
            if file is not None:
                found[file.point, file.path] = file
    return [found[key] for key in sorted(found)]


def _files(manifest: Manifest) -> Iterator[RegularFile]:
    for file in manifest.files:
        if isinstance(file.what, RegularFile) and not file.what.external:
            yield file.what


def _used(layers: dict[str, Tree], state: RegularFile) -> UsedFile | None:
    """None if it is none of those below: the pod has written it, or it lies in its memory."""
    path = os.fsdecode(path_bytes(state.path))
    if any(path.startswith(f"{place}/") for place in OWN_TMPFS):
        return None
    point = max((p for p in layers if path.startswith(f"{p}/")), key=len)
    tree = layers[point]
    entry = _find(tree, tuple(path[len(point) :].strip("/").split("/")))
    if entry is None or not stat.S_ISREG(entry.info.st_mode):
        raise _changed(state.path)
    place = entry.places[0]
    if place.layer < tree.own:
        return None
    fd = tree.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if fd is None:
        raise _changed(state.path)
    try:
        info = os.fstat(fd)
        if (info.st_size, info.st_mtime_ns) != (state.size, state.mtime):
            raise _changed(state.path)
        relative = path_text(os.fsencode("/".join(place.parts)))
        return UsedFile(point=point, path=relative, size=state.size, mtime=state.mtime, digest=_digest(fd))
    finally:
        os.close(fd)


def _changed(path: str) -> Conflict:
    return Conflict(
        f"cannot export: {path}, a file below the pod that it has open, has changed since the checkpoint",
        "a file of the root file system was replaced (an upgrade?); put the old one back",
    )


def _find(tree: Tree, parts: Parts) -> Entry | None:
    entry = tree.top()
    for part in parts:
        if entry is None or not entry.is_directory:
            return None
        with tree.opened(entry) as listing:
            entry = listing.entry(part)
    return entry


def _digest(fd: int) -> bytes:
    whole = blake3()
    while piece := os.read(fd, _CHUNK):
        whole.update(piece)
    return bytes(whole.digest())


def check(below: Below, vol: Path, root: Path, home: Path, *, rooted: bool) -> None:
    """Raise Unsupported for what isn't as it was below the pod: in `root` and, unless the pod has a root of its own
    (`rooted`), in the host's further file systems. `home`: of the pool.
    """
    here = [] if rooted else submounts(home)
    used = {file.point for file in below.used if file.point}
    missing = sorted(point for point in {*written_points(vol), *used} if point not in here)
    if missing:
        raise Unsupported(
            f"the pod has used {', '.join(missing)}: file systems that aren't mounted here",
            "mount them, with the same files",
        )
    covered = list(_covered(vol, [point for point in here if point not in below.points]))
    if covered:
        raise Unsupported(f"the pod has written below {', '.join(covered)}, which is a file system of its own here")
    wrong = list(_wrong(below.used, root))
    if wrong:
        more = f", and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise Unsupported(
            f"the files below the pod are not those that it ran on: {'; '.join(wrong[:_NAMED])}{more}",
            "import where the same files are, or name them with --rootfs; or export again with --with-base",
        )


def _covered(vol: Path, points: list[str]) -> Iterator[str]:
    """Those file systems of this host that would lie over something that the pod has written to its root."""
    for point in points:
        place = vol / "upper" / point.lstrip("/")
        if place.is_dir() and not place.is_symlink() and _has_entries(place):
            yield point


def _wrong(used: Iterable[UsedFile], root: Path) -> Iterator[str]:
    tops: dict[str, int] = {}
    try:
        for file in used:
            if file.point not in tops:
                tops[file.point] = clone_tree(file.point or str(root))
            reason = _compare(tops[file.point], file)
            if reason:
                yield f"{file.point}/{path_bytes(file.path).decode(errors='backslashreplace')} {reason}"
    finally:
        for fd in tops.values():
            os.close(fd)


def _compare(top: int, file: UsedFile) -> str:
    try:
        place = open_below(top, os.fsdecode(path_bytes(file.path)).split("/"), os.O_PATH | os.O_NOFOLLOW)
    except OSError as error:
        return f"can't be opened ({os.strerror(error.errno or 0)})"
    try:
        if not stat.S_ISREG(os.fstat(place).st_mode):  # to open a device may do something already
            return "is no plain file"
        fd = fdops.reopen(place, os.O_RDONLY)
    finally:
        os.close(place)
    try:
        info = os.fstat(fd)
        if info.st_size != file.size:
            return f"has {info.st_size} bytes instead of {file.size}"
        if info.st_mtime_ns != file.mtime:
            return "was modified at another time"
        return "" if _digest(fd) == file.digest else "has other contents"
    finally:
        os.close(fd)
