"""Reading the kernel's own structures, by a BPF program of a dozen instructions that copies what it is asked for.

Some state of a stopped program is shown by no file and by no call, because only the kernel acts on it: what a
client has sent on a connection that nobody has accepted yet, say. It is read where it lies. The layout comes
from the running kernel's BTF, the copy is bpf_probe_read_kernel(), which fails instead of faulting, and only
reads. It wants CAP_SYS_ADMIN, a kernel with BTF (all distributions'), and no lockdown for confidentiality.

What is read so can change meanwhile unless the caller knows why not, so it has to be checked against something.
Source: bpf(2), bpf-helpers(7); include/uapi/linux/bpf.h, net/packet/af_packet.c, fs/pipe.c (Linux 6.18).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import struct
from collections.abc import Iterator

from podtree.kernel.btf import Btf
from podtree.kernel.sys import NR, PAGE_SIZE, syscall

BPF_MAP_CREATE, BPF_PROG_LOAD, BPF_PROG_TEST_RUN = 0, 5, 10
BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_PERCPU_ARRAY, BPF_F_MMAPABLE = 2, 6, 1 << 10
BPF_PROG_TYPE_RAW_TRACEPOINT = 17
MAP_LOOKUP_ELEM, GET_CURRENT_TASK, PROBE_READ_KERNEL, MAP_LOOKUP_PERCPU_ELEM = 1, 35, 113, 195  # enum bpf_func_id
SOL_PACKET, PACKET_RX_RING = 263, 5
WINDOW = 1 << 18  # bytes copied by one call
MAX_LIST = 1 << 20  # entries of a list; more is one that has changed under our eyes


class Unreadable(OSError):
    """An address that can't be read, or structures that don't fit together: they have changed meanwhile."""

    def __init__(self, what: str) -> None:
        super().__init__(errno.EFAULT, f"kernel memory: {what}")


def _instruction(code: int, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0) -> bytes:
    return struct.pack("<BBhi", code, dst | src << 4, off, imm)


def _program(map_fd: int) -> bytes:
    """struct bpf_insn of `copy(address, size)`, with address 0: the current task's own address."""
    i = _instruction
    code = (
        i(0x79, 7, 1, 0),  # r7 = the address
        i(0x79, 8, 1, 8),  # r8 = the size
        i(0x62, 10, 0, -4, 0),  # key 0, on the stack
        i(0xBF, 2, 10),
        i(0x07, 2, 0, 0, -4),
        i(0x18, 1, 1, 0, map_fd),  # r1 = the map (two slots)
        i(0),
        i(0x85, imm=MAP_LOOKUP_ELEM),
        i(0x15, 0, 0, 12, 0),  # not there: fail
        i(0xBF, 6, 0),
        i(0x55, 7, 0, 4, 0),
        i(0x85, imm=GET_CURRENT_TASK),
        i(0x7B, 6, 0, 0),
        i(0xB7, 0, 0, 0, 0),
        i(0x95),
        i(0xBF, 1, 6),
        i(0xBF, 2, 8),
        i(0x25, 2, 0, 3, WINDOW),
        i(0xBF, 3, 7),
        i(0x85, imm=PROBE_READ_KERNEL),
        i(0x95),
        i(0xB7, 0, 0, 0, 1),  # fail:
        i(0x95),
    )
    return b"".join(code)


def _per_cpu_program(map_fd: int, per_cpu_fd: int) -> bytes:
    """Puts the address of the second map's element on a CPU, its argument, into the first one."""
    i = _instruction
    code = (
        i(0x79, 7, 1, 0),  # r7 = the CPU
        i(0x62, 10, 0, -4, 0),  # key 0, on the stack
        i(0xBF, 2, 10),
        i(0x07, 2, 0, 0, -4),
        i(0x18, 1, 1, 0, map_fd),
        i(0),
        i(0x85, imm=MAP_LOOKUP_ELEM),
        i(0x15, 0, 0, 11, 0),  # not there: fail
        i(0xBF, 6, 0),
        i(0xBF, 2, 10),
        i(0x07, 2, 0, 0, -4),
        i(0xBF, 3, 7),
        i(0x18, 1, 1, 0, per_cpu_fd),
        i(0),
        i(0x85, imm=MAP_LOOKUP_PERCPU_ELEM),
        i(0x15, 0, 0, 3, 0),
        i(0x7B, 6, 0, 0),
        i(0xB7, 0, 0, 0, 0),
        i(0x95),
        i(0xB7, 0, 0, 0, 1),  # fail:
        i(0x95),
    )
    return b"".join(code)


def _bpf(command: int, attr: bytes) -> tuple[int, bytes]:
    """bpf(2) with a union bpf_attr; its result, and the union as the kernel left it."""
    buffer = ctypes.create_string_buffer(attr.ljust(128, b"\0"), 128)
    return syscall(NR.bpf, command, buffer, 128), buffer.raw


def _possible_cpus() -> list[int]:
    """Numbers of all CPUs that there may ever be: cpu-hotplug.rst."""
    with open("/sys/devices/system/cpu/possible", encoding="ascii") as file:
        ends = [part.split("-") for part in file.read().strip().split(",")]
    return [cpu for part in ends for cpu in range(int(part[0]), int(part[-1]) + 1)]


class View:
    """A structure as it was when it was read; paths as of Btf.member()."""

    def __init__(self, memory: KernelMemory, name: str, address: int, raw: bytes) -> None:
        self.memory = memory
        self.name = name
        self.address = address
        self._raw = raw

    def raw(self, path: str) -> bytes:
        """The bytes of a member."""
        offset, size = self.memory.btf.member(self.name, path)
        return self._raw[offset : offset + size]

    def number(self, path: str) -> int:
        """A member as an unsigned number of its size."""
        return int.from_bytes(self.raw(path), "little")

    def signed(self, path: str) -> int:
        """A member as a signed number of its size."""
        return int.from_bytes(self.raw(path), "little", signed=True)

    def pointer(self, path: str) -> int:
        """A member that is a pointer, or begins with one, as a list's head does."""
        return int.from_bytes(self.raw(path)[:8], "little")

    def cast(self, name: str, path: str = "", index: int = 0) -> View:
        """`struct name` inside of what was read: in a member, of an array the element `index`; or at the very start."""
        size = self.memory.btf.size(name)
        offset = self.memory.btf.member(self.name, path).offset if path else 0
        offset += index * size
        return View(self.memory, name, self.address + offset, self._raw[offset : offset + size])

    def at(self, path: str) -> int:
        """The address of a member."""
        return self.address + self.memory.btf.member(self.name, path).offset


class KernelMemory:
    """Reads kernel memory. OSError, KeyError or ValueError if this kernel doesn't let itself be read so."""

    def __init__(self) -> None:
        self.btf = Btf()
        self._map = self._program = -1
        self._cpu_offsets: list[int] = []
        try:
            create = struct.pack("<5I", BPF_MAP_TYPE_ARRAY, 4, WINDOW, 1, BPF_F_MMAPABLE)
            self._map, _ = _bpf(BPF_MAP_CREATE, create)
            self._window = mmap.mmap(self._map, WINDOW)
            self._program = self._load(_program(self._map))
            self._pages = self._find_pages()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of program and map."""
        for fd in (self._map, self._program):
            if fd >= 0:
                os.close(fd)
        self._map = self._program = -1

    def _load(self, program: bytes) -> int:
        code = ctypes.create_string_buffer(program)
        licence = ctypes.create_string_buffer(b"GPL")  # the helper asks for it
        count, at = (len(code) - 1) // 8, ctypes.addressof
        attr = struct.pack("<IIQQ", BPF_PROG_TYPE_RAW_TRACEPOINT, count, at(code), at(licence))
        return _bpf(BPF_PROG_LOAD, attr)[0]

    def _run(self, first: int, second: int, program: int = -1) -> int:
        """What the (first) program returns: 0, or that it failed."""
        program = self._program if program < 0 else program
        context = ctypes.create_string_buffer(struct.pack("<QQ", first, second), 16)
        attr = struct.pack("<IIIIQQIIIIQQ", program, *[0] * 7, 16, 0, ctypes.addressof(context), 0)
        _, answer = _bpf(BPF_PROG_TEST_RUN, attr)
        result: int = struct.unpack_from("<i", answer, 4)[0]
        return result

    def read(self, address: int, size: int) -> bytes:
        """Bytes at a kernel address. Raises Unreadable."""
        if not 0 < size <= WINDOW:
            parts = range(0, size, WINDOW)
            return b"".join(self.read(address + at, min(WINDOW, size - at)) for at in parts)
        if not 0 < address < 1 << 64 or self._run(address, size):
            raise Unreadable(f"{size} bytes at {address:#x}")
        return self._window[:size]

    def pointer(self, address: int) -> int:
        """The pointer that lies at an address."""
        return int.from_bytes(self.read(address, 8), "little")

    def view(self, name: str, address: int) -> View:
        """`struct name` at an address, as it is now."""
        return View(self, name, address, self.read(address, self.btf.size(name)))

    def container(self, name: str, path: str, address: int) -> View:
        """The `struct name` whose member `path` lies at an address."""
        return self.view(name, address - self.btf.member(name, path).offset)

    def each(self, head: int, name: str, path: str) -> Iterator[View]:
        """The structures of a list (list_head, sk_buff_head and their like); `path`: the member that links them."""
        at = self.pointer(head)
        for _ in range(MAX_LIST):
            if at == head:
                return
            found = self.container(name, path, at)
            yield found
            at = found.pointer(path)
        raise Unreadable("a list without an end")

    def of_all_cpus(self, pointer: int, name: str) -> Iterator[View]:
        """The `struct name` of each possible CPU to which a __percpu pointer leads."""
        for offset in self._find_cpu_offsets():
            yield self.view(name, pointer + offset & (1 << 64) - 1)

    def _find_cpu_offsets(self) -> list[int]:
        """What is added to a __percpu pointer, by CPU (include/linux/percpu-defs.h, per_cpu_ptr()).

        A map with an element for each has such a pointer, and a program is told where they are.
        """
        if not self._cpu_offsets:
            per_cpu, _ = _bpf(BPF_MAP_CREATE, struct.pack("<5I", BPF_MAP_TYPE_PERCPU_ARRAY, 4, 8, 1, 0))
            program = -1
            try:
                program = self._load(_per_cpu_program(self._map, per_cpu))
                array = self.container("bpf_array", "map", self.file(per_cpu).pointer("private_data"))
                pointer = self.pointer(array.at("pptrs"))
                for cpu in _possible_cpus():
                    if self._run(cpu, 0, program):
                        raise Unreadable(f"the area of CPU {cpu}")
                    self._cpu_offsets.append(int.from_bytes(self._window[:8], "little") - pointer)
            finally:
                os.close(per_cpu)
                if program >= 0:
                    os.close(program)
        return self._cpu_offsets

    # --- where to begin

    def this_task(self) -> View:
        """The calling thread."""
        if self._run(0, 0):
            raise Unreadable("the current task")
        return self.view("task_struct", int.from_bytes(self._window[:8], "little"))

    def file(self, fd: int) -> View:
        """The open file description behind one of the caller's descriptors."""
        files = self.view("files_struct", self.this_task().pointer("files"))
        table = self.view("fdtable", files.pointer("fdt"))
        return self.view("file", self.pointer(table.pointer("fd") + 8 * fd))

    def sock(self, fd: int) -> int:
        """Address of the struct sock behind one of the caller's descriptors."""
        return self.view("socket", self.file(fd).pointer("private_data")).pointer("sk")

    def task(self, pidfd: int) -> View:
        """The task that a pidfd refers to: of a process its leader."""
        file = self.file(pidfd)
        pid = file.pointer("private_data")
        if not pid:  # since Linux 6.9
            pid = self.view("inode", file.pointer("f_inode")).pointer("i_private")
        tasks, links = self.btf.member("pid", "tasks"), self.btf.member("task_struct", "pid_links")
        return self.view("task_struct", self.pointer(pid + tasks.offset) - links.offset)  # PIDTYPE_PID is the first

    # --- pages

    def page_address(self, page: int) -> int:
        """Where the bytes of a struct page are mapped."""
        struct_page, mapped = self._pages
        return mapped + (page - struct_page) // self.btf.size("page") * PAGE_SIZE

    def _find_pages(self) -> tuple[int, int]:
        """A struct page's address and where that page is mapped: both maps are linear (x86_64: vmemmap).

        Of a packet socket's ring the kernel notes where its pages are mapped, of a pipe that such a page is
        spliced into, which struct page it is. Another page of the ring then shows whether that is understood.
        """
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC) as ring:
            ring.setsockopt(SOL_PACKET, PACKET_RX_RING, struct.pack("4I", PAGE_SIZE, 2, PAGE_SIZE // 2, 4))
            with mmap.mmap(ring.fileno(), 2 * PAGE_SIZE) as area:
                words = [os.urandom(16), os.urandom(16)]
                for at, word in enumerate(words):
                    area[at * PAGE_SIZE + 64 : at * PAGE_SIZE + 80] = word
                vector = self.view("packet_sock", self.sock(ring.fileno())).pointer("rx_ring.pg_vec")
                mapped = [self.pointer(vector + 8 * at) for at in range(2)]
                pages = self._spliced(area)
                self._pages = pages[0], mapped[0]
                found = [self.read(address + 64, 16) for address in (*mapped, *map(self.page_address, pages))]
        if found != words * 2:
            raise ValueError("this kernel maps its memory in another way than expected")
        return self._pages

    def _spliced(self, area: mmap.mmap) -> list[int]:
        """The struct pages of two pages of ours."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            start = ctypes.c_char.from_buffer(area)
            syscall(NR.vmsplice, writing, struct.pack("QQ", ctypes.addressof(start), 2 * PAGE_SIZE), 1, 0)
            del start  # or `area` could not be closed
            pipe = self.view("pipe_inode_info", self.file(reading).pointer("private_data"))
            size = self.btf.size("pipe_buffer")
            where = self.btf.member("pipe_buffer", "page").offset
            return [self.pointer(pipe.pointer("bufs") + at * size + where) for at in range(2)]
        finally:
            os.close(reading)
            os.close(writing)
