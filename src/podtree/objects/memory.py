"""Address spaces: mappings, which pages hold data of their own, and how they come back.

Anonymous memory comes back as anonymous memory, filled by copying: a private mapping of the page
file would bring old bytes back after MADV_DONTNEED, where programs rely on zeros.

Sources: proc_pid_smaps(5), mmap(2), madvise(2), PR_SET_MM (PR_SET_MM_MAP), arch_prctl(2).
"""

from __future__ import annotations

import enum
import functools
import itertools
import os
import struct
from collections.abc import Callable, Iterable, Iterator

import msgspec

from podtree.errors import RestoreFailed
from podtree.kernel import mm, procfs
from podtree.kernel.pageruns import subtract_runs
from podtree.kernel.procfs import MapEntry
from podtree.kernel.sys import NR, PAGE_SIZE
from podtree.objects import aio
from podtree.objects.aio import AioRing
from podtree.script.task import Script

ARCH_MAP_VDSO_64 = 0x2003
PR_SET_MM, PR_SET_MM_MAP = 35, 14
SHM_RDONLY, SHM_REMAP = 0o10000, 0o40000

# VmFlags (Documentation/filesystems/proc.rst) that madvise(2) brings back
ADVICE = {"sr": 2, "rr": 1, "dc": 10, "wf": 18, "dd": 16, "hg": 14, "nh": 15, "mg": 12}
MADV_GUARD_INSTALL = 102
MLOCK_ONFAULT = 1
MCL_FUTURE, MCL_ONFAULT = 2, 4
REFUSED_FLAGS = {
    "io": "maps device memory",
    "pf": "maps device memory",
    "ht": "uses huge pages of hugetlbfs",
    "ss": "is a shadow stack",
    "dp": "is droppable memory",
    "um": "is registered with userfaultfd by the program",
    "ui": "is registered with userfaultfd by the program",
}


class VmaKind(enum.StrEnum):
    """Where the contents of a mapping come from."""

    ANON = "anon"  # private anonymous
    FILE = "file"  # a file, private or shared; also memfd and shared anonymous memory
    SYSV = "sysv"  # attached System V shared memory
    AIO = "aio"  # the ring of an AIO context
    VDSO = "vdso"  # vvar and vdso together


class Vma(msgspec.Struct, frozen=True, kw_only=True):
    """One mapping [start, end)."""

    start: int
    end: int
    kind: VmaKind
    prot: int  # PROT_*
    shared: bool = False
    file: int = -1  # OpenFile.id for FILE, shm id for SYSV
    offset: int = 0
    grows_down: bool = False
    no_reserve: bool = False
    read_only: bool = False  # of SYSV: attached with SHM_RDONLY
    locked: bool = False
    lock_on_fault: bool = False  # MLOCK_ONFAULT, mlock2(2)
    advice: tuple[str, ...] = ()  # VmFlags of ADVICE
    sealed: bool = False  # mseal(2)


class MemoryLayout(msgspec.Struct, frozen=True, kw_only=True):
    """struct prctl_mm_map: where the kernel believes code, data, heap, stack, arguments are."""

    start_code: int
    end_code: int
    start_data: int
    end_data: int
    start_brk: int
    brk: int
    start_stack: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    auxv: bytes


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """One address space. `pages` names its page file; `guards` are (address, length); `rings` of AIO contexts.

    `lock_future`: MCL_FUTURE and MCL_ONFAULT of mlockall(2).
    """

    vmas: tuple[Vma, ...]
    layout: MemoryLayout
    pages: str
    guards: tuple[tuple[int, int], ...] = ()
    rings: tuple[AioRing, ...] = ()
    lock_future: int = 0


def is_vdso(entry: MapEntry) -> bool:
    """The kernel's own mappings: vvar, vvar_vclock, vdso."""
    return entry.path in ("[vdso]", "[vvar]", "[vvar_vclock]")


def is_attached_segment(entry: MapEntry) -> bool:
    """Attached System V shared memory, which is on a memory file system of the kernel's own; a file of the pod may
    have such a name, too."""
    return entry.path.startswith("/SYSV") and entry.device == _kernels_tmpfs()


@functools.cache
def _kernels_tmpfs() -> tuple[int, int]:
    """Device of shm_mnt (mm/shmem.c), where memfds are as well."""
    fd = os.memfd_create("probe", os.MFD_CLOEXEC)
    try:
        device = os.fstat(fd).st_dev
    finally:
        os.close(fd)
    return os.major(device), os.minor(device)


def is_trackable(entry: MapEntry) -> bool:
    """Private mappings, whose written pages are found with userfaultfd."""
    return entry.perms[3] == "p" and not is_vdso(entry) and entry.path != "[vsyscall]"


def collect_vmas(
    entries: list[MapEntry], file_of: Callable[[MapEntry, bool], int | None], refuse: Callable[[str, str], None]
) -> list[Vma]:
    """Turn /proc/PID/smaps into state.

    `file_of(entry, writable)` registers the mapped file and gives its id, or None after refusing.
    `refuse(object, reason)` notes a mapping that can't be saved.
    """
    found: list[Vma] = []
    vdso = [e for e in entries if is_vdso(e)]
    for entry in entries:
        if is_vdso(entry) or entry.path == "[vsyscall]":
            continue
        vma = _collect_vma(entry, file_of, refuse)
        if vma:
            found.append(vma)
    if vdso:
        if vdso[-1].path != "[vdso]" or any(a.end != b.start for a, b in itertools.pairwise(vdso)):
            refuse("vdso", "is partly unmapped or moved")
        start, end = vdso[0].start, vdso[-1].end
        found.append(Vma(start=start, end=end, kind=VmaKind.VDSO, prot=mm.PROT_READ | mm.PROT_EXEC))
    else:
        refuse("vdso", "is not mapped; podtree needs it to act inside the process")
    return sorted(found, key=lambda v: v.start)


def _collect_vma(
    entry: MapEntry, file_of: Callable[[MapEntry, bool], int | None], refuse: Callable[[str, str], None]
) -> Vma | None:
    name = f"mapping {entry.start:x}-{entry.end:x} {entry.path}".rstrip()
    for flag, reason in REFUSED_FLAGS.items():
        if flag in entry.flags:
            refuse(name, reason)
            return None
    if entry.protection_key:
        refuse(name, "has a protection key (pkey_mprotect)")
        return None
    shared = entry.perms[3] == "s"
    kind, file = VmaKind.ANON, -1
    if aio.is_ring(entry):
        kind = VmaKind.AIO
    elif is_attached_segment(entry):
        kind, file = VmaKind.SYSV, entry.inode  # the inode number is the segment's id (ipc/shm.c)
    elif entry.inode and not (entry.path == "/dev/zero" and not shared):
        kind = VmaKind.FILE
        number = file_of(entry, shared and "mw" in entry.flags)
        if number is None:
            return None
        file = number
    elif shared:
        refuse(name, "is shared memory without an inode")
        return None
    prot = sum(
        bit
        for letter, bit in zip("rwx", (mm.PROT_READ, mm.PROT_WRITE, mm.PROT_EXEC), strict=True)
        if letter in entry.perms
    )
    return Vma(
        start=entry.start,
        end=entry.end,
        kind=kind,
        prot=prot,
        shared=shared,
        file=file,
        offset=entry.offset if kind is not VmaKind.ANON else 0,
        grows_down="gd" in entry.flags,
        no_reserve="nr" in entry.flags,
        read_only=kind is VmaKind.SYSV and "mw" not in entry.flags,
        locked="lo" in entry.flags,
        lock_on_fault="lf" in entry.flags,
        advice=tuple(sorted(entry.flags & ADVICE.keys())),
        sealed="sl" in entry.flags,
    )


def collect_layout(pid: int, brk: int) -> MemoryLayout:
    """Layout of a stopped process from /proc/PID/stat and auxv; `brk` is the current program break."""
    stat = procfs.stat(pid)
    with open(f"/proc/{pid}/auxv", "rb") as file:
        auxv = file.read()
    return MemoryLayout(
        start_code=stat.start_code,
        end_code=stat.end_code,
        start_data=stat.start_data,
        end_data=stat.end_data,
        start_brk=stat.start_brk,
        brk=brk,
        start_stack=stat.start_stack,
        arg_start=stat.arg_start,
        arg_end=stat.arg_end,
        env_start=stat.env_start,
        env_end=stat.env_end,
        auxv=auxv,
    )


class ScannedPages(msgspec.Struct):
    """Runs (first page, count) of one address space's private mappings."""

    saved: list[tuple[int, int]]  # hold data of their own
    written: list[tuple[int, int]]  # the part of `saved` written since the last scan
    guards: list[tuple[int, int]]


def scan(pid: int, entries: list[MapEntry], *, tracked: bool) -> ScannedPages:
    """Walk the private mappings: what is there, what was written since the last walk.

    What is tracked is write-protected again; mappings that aren't (or all, unless `tracked`) count as all written.
    A page of a private file mapping that is still the file's own (PAGE_IS_FILE), and the shared zero page, hold
    nothing to save, and are replaced when they are written to, so they need no protection.
    ProcessLookupError if the process has ended, which one that runs may at any time.
    """
    private = [e for e in entries if is_trackable(e)]
    of_files = [e for e in private if e.inode]
    pages = ScannedPages([], [], [])
    fd = _open_pagemap(pid)
    try:
        if tracked:
            for start, end, near_files in _stretches(of_files):
                _take(pages, fd, _walk(fd, start, end, near_files, protect=True), of_files)
        else:
            for e in private:
                found = _walk(fd, e.start, e.end, bool(e.inode), protect=False)
                _take(pages, fd, [(start, end, what | mm.PAGE_IS_WRITTEN) for start, end, what in found], of_files)
        if guard := _guard_category():
            for e in entries:
                if e.perms[3] == "s":
                    found = mm.scan_pages(fd, e.start, e.end, anyof=guard, returned=guard)
                    pages.guards += [(start, end - start) for start, end, _ in found]
    finally:
        os.close(fd)
    return pages


def _open_pagemap(pid: int) -> int:
    try:
        return os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ProcessLookupError(error.errno, f"process {pid} has ended") from error


_NEAR = 256 << 10  # bytes; walking over so much of other memory takes no longer than another call
Region = tuple[int, int, int]  # begin, end, categories


def _stretches(of_files: list[MapEntry]) -> list[tuple[int, int, bool]]:
    """The address space in parts: those with private mappings of files in them, and those between.

    To tell a page of a file the kernel looks at the page's description, which takes many times longer than the
    rest of a walk: so only where there can be some.
    """
    parts: list[list[int]] = []
    for entry in of_files:
        if parts and entry.start - parts[-1][1] <= _NEAR:
            parts[-1][1] = entry.end
        else:
            parts.append([entry.start, entry.end])
    found: list[tuple[int, int, bool]] = []
    position = 0
    for start, end in parts:
        found += [(position, start, False), (start, end, True)]
        position = end
    return [*found, (position, mm.TASK_SIZE, False)]


def _walk(pagemap_fd: int, start: int, end: int, near_files: bool, *, protect: bool) -> list[Region]:
    """What there is in a part of the address space, but for pages of files and the shared zero page."""
    anyof = mm.PAGE_IS_PRESENT | mm.PAGE_IS_SWAPPED | _guard_category()
    without = mm.PAGE_IS_PFNZERO | (mm.PAGE_IS_FILE if near_files else 0)
    swapped = mm.PAGE_IS_SWAPPED if near_files else 0
    return mm.scan_pages(
        pagemap_fd,
        start,
        end,
        allof=without | (mm.PAGE_IS_WPALLOWED if protect else 0),
        inverted=without,
        anyof=anyof,
        returned=mm.PAGE_IS_WRITTEN | swapped | _guard_category(),
        flags=mm.PM_SCAN_WP_MATCHING if protect else 0,
    )


def _take(pages: ScannedPages, pagemap_fd: int, regions: list[Region], of_files: list[MapEntry]) -> None:
    """Add what a walk has found.

    In a mapping of a file, what was dropped (madvise(2), reclaim) after it had been write-protected leaves a mark that
    looks like a swapped page: the next access reads the file. Anonymous memory keeps no such marks (mm/memory.c,
    pte_install_uffd_wp_if_needed()).
    """
    for start, end, categories in regions:
        runs = [(start // PAGE_SIZE, (end - start) // PAGE_SIZE)]
        if categories & mm.PAGE_IS_GUARD:
            pages.guards.append((start, end - start))
            continue
        if categories & mm.PAGE_IS_SWAPPED:
            for entry in of_files:
                if entry.start < end and start < entry.end:
                    first, last = max(start, entry.start), min(end, entry.end)
                    runs = subtract_runs(runs, mm.write_protection_marks(pagemap_fd, first, last))
        pages.saved += runs
        if categories & mm.PAGE_IS_WRITTEN:
            pages.written += runs


def written(pid: int) -> list[tuple[int, int]]:
    """Runs of tracked pages written since the last `scan`; the next finds them too. ProcessLookupError as there."""
    fd = _open_pagemap(pid)
    wanted = mm.PAGE_IS_WPALLOWED | mm.PAGE_IS_WRITTEN | mm.PAGE_IS_PFNZERO
    present = mm.PAGE_IS_PRESENT | mm.PAGE_IS_SWAPPED
    no_file = mm.PAGE_IS_FILE
    try:
        unprotected = mm.scan_pages(
            fd, 0, mm.TASK_SIZE, allof=wanted, inverted=mm.PAGE_IS_PFNZERO, anyof=present, returned=mm.PAGE_IS_WRITTEN
        )
        regions = [  # pages of files are never protected; whether it is one is asked of these only
            region
            for start, end, _ in unprotected
            for region in mm.scan_pages(fd, start, end, allof=no_file, inverted=no_file, anyof=present, returned=0)
        ]
    finally:
        os.close(fd)
    return [(start // PAGE_SIZE, (end - start) // PAGE_SIZE) for start, end, _ in regions]


@functools.cache
def _guard_category() -> int:
    """PAGE_IS_GUARD if this kernel (6.15+) knows it, else 0."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        mm.scan_pages(fd, 0x10000, 0x11000, anyof=mm.PAGE_IS_GUARD, returned=mm.PAGE_IS_GUARD)
    except OSError:
        return 0
    finally:
        os.close(fd)
    return mm.PAGE_IS_GUARD


def map_flags(vma: Vma) -> int:
    """mmap(2) flags that make this mapping again."""
    flags = mm.MAP_FIXED_NOREPLACE | (mm.MAP_SHARED if vma.shared else mm.MAP_PRIVATE)
    if vma.kind is VmaKind.ANON:
        flags |= mm.MAP_ANONYMOUS
    if vma.grows_down:
        flags |= mm.MAP_GROWSDOWN
    if vma.no_reserve:
        flags |= mm.MAP_NORESERVE
    return flags


def restore_vma(vma: Vma, script: Script, slot_base: int, fill: bool) -> None:
    """Add the calls that make one mapping; writable for now if pages are to be filled in.

    Only then: a reservation of terabytes without access rights must not count as committed memory.
    """
    what = f"map {vma.start:#x}-{vma.end:#x}"
    length = vma.end - vma.start
    if vma.kind is VmaKind.VDSO:
        script.add(NR.arch_prctl, ARCH_MAP_VDSO_64, vma.start, name=f"{what} (vdso)")
    elif vma.kind not in (VmaKind.SYSV, VmaKind.AIO):
        prot = vma.prot | mm.PROT_READ | mm.PROT_WRITE if fill else vma.prot
        fd = slot_base + vma.file if vma.kind is VmaKind.FILE else -1
        script.add(NR.mmap, vma.start, length, prot, map_flags(vma), fd, vma.offset, name=what)


def attachments(vmas: tuple[Vma, ...]) -> list[list[Vma]]:
    """The mappings of System V shared memory, those of one shmat(2) together: parts of one may be protected
    otherwise, unmapped or moved.
    """

    def attachment(vma: Vma) -> tuple[int, int, bool]:
        return vma.file, vma.start - vma.offset, vma.read_only

    attached = sorted((v for v in vmas if v.kind is VmaKind.SYSV), key=attachment)
    return [list(group) for _, group in itertools.groupby(attached, attachment)]


def attachment_calls(parts: list[Vma], size: int, spare: int) -> Iterator[tuple[NR, tuple[int, ...], str]]:
    """The calls, with names, that attach a segment of `size` bytes at the free address `spare`, move its parts to
    their places and unmap the rest. At its own place something else may lie between the parts by now.
    """
    first = parts[0]
    end = -(-size // PAGE_SIZE) * PAGE_SIZE
    what = f"attach segment {first.file} for {first.start:#x}"
    move = mm.MREMAP_MAYMOVE | mm.MREMAP_FIXED
    usual = mm.PROT_READ if first.read_only else mm.PROT_READ | mm.PROT_WRITE
    yield NR.shmat, (first.file, spare, SHM_RDONLY if first.read_only else 0), f"{what} (shmat)"
    position = 0
    for vma in sorted(parts, key=lambda v: v.offset):
        length = vma.end - vma.start
        if not position <= vma.offset <= end - length:
            raise RestoreFailed(f"the image's mapping {vma.start:#x}-{vma.end:#x} is no part of segment {vma.file}")
        if vma.offset > position:
            yield NR.munmap, (spare + position, vma.offset - position), f"{what} (munmap)"
        position = vma.offset + length
        yield NR.mremap, (spare + vma.offset, length, length, move, vma.start), f"{what} (mremap)"
        if vma.prot != usual:
            yield NR.mprotect, (vma.start, length, vma.prot), f"{what} (mprotect)"
    if position < end:
        yield NR.munmap, (spare + position, end - position), f"{what} (munmap)"


def settle_vma(vma: Vma, script: Script, filled: bool) -> None:
    """Add the calls that give a filled mapping its protection and advice."""
    length = vma.end - vma.start
    what = f"{vma.start:#x}-{vma.end:#x}"
    for flag in vma.advice:
        script.add(NR.madvise, vma.start, length, ADVICE[flag], name=f"madvise {what} {flag}")
    if filled and vma.prot | mm.PROT_READ | mm.PROT_WRITE != vma.prot:
        script.add(NR.mprotect, vma.start, length, vma.prot, name=f"mprotect {what}")


def lock_vma(vma: Vma, script: Script) -> None:
    """Add the call that locks a mapping, after all else.

    It fails where pages can't be had (no access rights, guard pages, behind a file's end), having locked the rest
    and the mapping all the same (mm/mlock.c); `unlocked` tells.
    """
    script.add(NR.mlock2, vma.start, vma.end - vma.start, MLOCK_ONFAULT if vma.lock_on_fault else 0)


def unlocked(pid: int, vmas: Iterable[Vma]) -> list[Vma]:
    """Those of `vmas` that are not all locked in a process."""
    entries = [e for e in procfs.smaps(pid) if "lo" not in e.flags]
    return [v for v in vmas if any(e.start < v.end and v.start < e.end for e in entries)]


def future_locks(pid: int, entries: list[MapEntry], new: int) -> int:
    """MCL_FUTURE and MCL_ONFAULT as a process has set them (mlockall(2)), told by what became of a mapping that it
    has just made: the one at `new`, which isn't among `entries`.
    """
    known = sum(e.length for e in entries if "lo" in e.flags)
    if int(procfs.status(pid)["VmLck"].split()[0]) << 10 == known:
        return 0
    flags = next((e.flags for e in procfs.smaps(pid) if e.start <= new < e.end), frozenset())
    return (MCL_FUTURE if "lo" in flags else 0) | (MCL_ONFAULT if "lf" in flags else 0)


def restore_layout(layout: MemoryLayout, script: Script, exe_slot: int) -> None:
    """Add PR_SET_MM_MAP: heap, stack, arguments, auxv and /proc/PID/exe as they were.

    struct prctl_mm_map (linux/prctl.h): eleven addresses, pointer to auxv, its size, exe fd.
    """
    auxv = script.put(layout.auxv)
    data = struct.pack(
        "<11QQII",
        layout.start_code,
        layout.end_code,
        layout.start_data,
        layout.end_data,
        layout.start_brk,
        layout.brk,
        layout.start_stack,
        layout.arg_start,
        layout.arg_end,
        layout.env_start,
        layout.env_end,
        auxv,
        len(layout.auxv),
        exe_slot & 0xFFFFFFFF,
    )
    script.add(NR.prctl, PR_SET_MM, PR_SET_MM_MAP, script.put(data), len(data), 0, name="PR_SET_MM_MAP")


def free_gap(vmas: tuple[Vma, ...] | list[Vma], size: int, avoid: list[tuple[int, int]] | None = None) -> int:
    """An address at which `size` bytes collide with none of the mappings (nor with `avoid`)."""
    taken = sorted([(v.start, v.end) for v in vmas] + (avoid or []))
    address = 0x100000
    guard = 1 << 20  # stack_guard_gap below growing stacks
    for start, end in taken:
        if start - guard >= address + size:
            return address
        address = max(address, (end + PAGE_SIZE - 1) & -PAGE_SIZE)
    if address + size < mm.TASK_SIZE:
        return address
    raise ValueError(f"no room for {size} bytes in the address space")
