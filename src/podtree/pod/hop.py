"""The last hop before a pod's program: a tiny program in a sealed memory file that executes the real one.

Why: a process's /proc/PID/exe is a way to the file it runs, past every mount. If the interpreter of this
supervisor executed the pod's program itself, a program that is "#!/proc/self/exe" (or is named
/proc/self/exe) would run the host's interpreter inside the pod, and could then open it for writing
(CVE-2019-5736). From here on, /proc/self/exe is a sealed memory file of two hundred bytes.

It marks descriptor 3 close-on-exec (and exits with 127 if there is no such descriptor), calls
execve(argv[0], argv + 1, envp), and when that fails writes the negative errno as 8 bytes to descriptor 3 and
exits with 127. Source, in GNU syntax (a test assembles it):
"""

from __future__ import annotations

import fcntl
import os
import struct

SOURCE = """
.globl _start
_start:
    mov     (%rsp), %rax                # argc
    lea     8(%rsp), %rbx               # argv
    lea     16(%rsp,%rax,8), %r12       # envp
    mov     $72, %eax                   # fcntl(3, F_SETFD, FD_CLOEXEC)
    mov     $3, %edi
    mov     $2, %esi
    mov     $1, %edx
    syscall
    test    %eax, %eax                  # not from here: a program that calls itself by /proc/self/exe
    jnz     1f
    mov     $59, %eax                   # execve(argv[0], argv + 1, envp)
    mov     (%rbx), %rdi
    lea     8(%rbx), %rsi
    mov     %r12, %rdx
    syscall
    push    %rax                        # write(3, &result, 8)
    mov     $1, %eax
    mov     $3, %edi
    mov     %rsp, %rsi
    mov     $8, %edx
    syscall
1:  mov     $231, %eax                  # exit_group(127)
    mov     $127, %edi
    syscall
"""
CODE = bytes.fromhex(
    "488b0424488d5c24084c8d64c410b848000000bf03000000be02000000ba010000000f0585c07526b83b000000488b3b488d"
    "73084c89e20f0550b801000000bf030000004889e6ba080000000f05b8e7000000bf7f0000000f05"
)
REPORT_FD = 3
_MFD_EXEC = 0x10  # memfd_create(2), Linux 6.3
_BASE = 0x400000


def open_hop() -> int:
    """A sealed, executable, close-on-exec memory file with the program."""
    header = 64 + 56
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    # elf(5): ET_EXEC, EM_X86_64, one program header: PT_LOAD, read and execute
    ehdr = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, _BASE + header, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    size = header + len(CODE)
    phdr = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 4096)
    try:
        fd = os.memfd_create("hop", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _MFD_EXEC)
    except OSError:
        fd = os.memfd_create("hop", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, ehdr + phdr + CODE)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd
