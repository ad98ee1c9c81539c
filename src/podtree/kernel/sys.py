"""Raw system calls through libc's syscall(2), with errors as OSError.

Numbers: arch/x86/entry/syscalls/syscall_64.tbl (Linux 6.18).
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os

PAGE_SIZE = 4096

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


class NR(enum.IntEnum):
    """x86_64 system call numbers, spelled as in syscall_64.tbl."""

    read = 0
    write = 1
    open = 2
    close = 3
    poll = 7
    lseek = 8
    mmap = 9
    mprotect = 10
    munmap = 11
    brk = 12
    rt_sigaction = 13
    rt_sigprocmask = 14
    rt_sigreturn = 15
    ioctl = 16
    pread64 = 17
    pwrite64 = 18
    readv = 19
    writev = 20
    sched_yield = 24
    mremap = 25
    msync = 26
    mincore = 27
    madvise = 28
    shmget = 29
    shmat = 30
    shmctl = 31
    dup = 32
    dup2 = 33
    pause = 34
    nanosleep = 35
    getitimer = 36
    alarm = 37
    setitimer = 38
    getpid = 39
    socket = 41
    connect = 42
    accept = 43
    sendto = 44
    recvfrom = 45
    sendmsg = 46
    recvmsg = 47
    socketpair = 53
    clone = 56
    fork = 57
    vfork = 58
    execve = 59
    exit = 60
    wait4 = 61
    kill = 62
    semget = 64
    semop = 65
    semctl = 66
    shmdt = 67
    msgget = 68
    msgsnd = 69
    msgrcv = 70
    msgctl = 71
    fcntl = 72
    fchdir = 81
    umask = 95
    ptrace = 101
    setuid = 105
    setgid = 106
    setpgid = 109
    setsid = 112
    setgroups = 116
    setresuid = 117
    setresgid = 119
    capget = 125
    capset = 126
    rt_sigpending = 127
    rt_sigtimedwait = 128
    rt_sigqueueinfo = 129
    sigaltstack = 131
    personality = 135
    statfs = 137
    mlock = 149
    mlockall = 151
    modify_ldt = 154
    mseal = 462
    pivot_root = 155
    prctl = 157
    arch_prctl = 158
    chroot = 161
    mount = 165
    umount2 = 166
    sethostname = 170
    setdomainname = 171
    gettid = 186
    futex = 202
    sched_setaffinity = 203
    sched_getaffinity = 204
    io_setup = 206
    io_getevents = 208
    io_submit = 209
    set_tid_address = 218
    restart_syscall = 219
    semtimedop = 220
    timer_create = 222
    timer_settime = 223
    timer_gettime = 224
    timer_getoverrun = 225
    timer_delete = 226
    clock_nanosleep = 230
    exit_group = 231
    epoll_wait = 232
    epoll_ctl = 233
    tgkill = 234
    mq_open = 240
    mq_unlink = 241
    mq_timedsend = 242
    mq_notify = 244
    mq_getsetattr = 245
    waitid = 247
    keyctl = 250
    ioprio_set = 251
    ioprio_get = 252
    inotify_add_watch = 254
    inotify_rm_watch = 255
    openat = 257
    linkat = 265
    unshare = 272
    set_robust_list = 273
    get_robust_list = 274
    splice = 275
    tee = 276
    vmsplice = 278
    ppoll = 271
    epoll_pwait = 281
    timerfd_create = 283
    timerfd_settime = 286
    timerfd_gettime = 287
    accept4 = 288
    signalfd4 = 289
    dup3 = 292
    inotify_init1 = 294
    preadv = 295
    rt_tgsigqueueinfo = 297
    recvmmsg = 299
    prlimit64 = 302
    open_by_handle_at = 304
    syncfs = 306
    sendmmsg = 307
    setns = 308
    process_vm_readv = 310
    process_vm_writev = 311
    kcmp = 312
    sched_setattr = 314
    sched_getattr = 315
    renameat2 = 316
    seccomp = 317
    memfd_create = 319
    bpf = 321
    execveat = 322
    userfaultfd = 323
    membarrier = 324
    mlock2 = 325
    rseq = 334
    pidfd_send_signal = 424
    open_tree = 428
    move_mount = 429
    fsopen = 430
    fsconfig = 431
    fsmount = 432
    pidfd_open = 434
    clone3 = 435
    close_range = 436
    openat2 = 437
    pidfd_getfd = 438
    epoll_pwait2 = 441
    mount_setattr = 442


def syscall(nr: int, *args: int | bytes | bytearray | ctypes.Array[ctypes.c_char] | None) -> int:
    """Call system call `nr`; integers go as 64-bit values, bytes-like as pointers.

    Returns the result (>= 0); raises OSError with the errno otherwise.
    """
    native: list[object] = []
    for arg in args:
        if isinstance(arg, int):
            native.append(ctypes.c_ulong(arg & 0xFFFFFFFFFFFFFFFF))
        elif isinstance(arg, bytearray):
            native.append((ctypes.c_char * len(arg)).from_buffer(arg))
        elif arg is None:
            native.append(ctypes.c_void_p(0))
        else:
            native.append(arg)
    result: int = _syscall(ctypes.c_long(nr), *native)
    if result == -1:
        code = ctypes.get_errno()
        name = NR(nr).name if nr in NR._value2member_map_ else str(nr)
        raise OSError(code, f"{name}: {os.strerror(code)} ({errno.errorcode.get(code, code)})")
    return result
