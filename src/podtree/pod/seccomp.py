"""The default seccomp filter: an allow-list in the spirit of other container tools' default profile.

What isn't listed fails with EPERM; what this list is too old to know fails with ENOSYS, so that libraries
fall back. Compiled by libseccomp once and kept as BPF under the pool's home. seccomp(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import struct
import tempfile
from pathlib import Path

from podtree.errors import Unsupported
from podtree.kernel.sys import NR, syscall

# Groups as in section 2 of the manual: a newcomer should see at once what a pod's program may do.
_ALLOWED_TEXT = """
accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom recvmmsg recvmsg send
sendmmsg sendmsg sendto setsockopt shutdown socketcall socketpair
access adjtimex alarm arch_prctl brk cachestat capget capset chdir chmod chown chown32 clock_adjtime
clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep
clock_nanosleep_time64 close close_range copy_file_range creat dup dup2 dup3
epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old
eventfd eventfd2 execve execveat exit exit_group
faccessat faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown
fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat
fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64
futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake futimesat
getcpu getcwd getdents getdents64 getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32
getitimer getpgid getpgrp getpid getppid getpriority getrandom getresgid getresgid32 getresuid getresuid32
getrlimit get_robust_list getrusage getsid gettid get_thread_area gettimeofday getuid getuid32 getxattr
getxattrat inotify_add_watch inotify_init inotify_init1 inotify_rm_watch
io_cancel ioctl io_destroy io_getevents io_pgetevents io_pgetevents_time64 ioprio_get ioprio_set io_setup
io_submit ipc kill
lchown lchown32 lgetxattr link linkat listmount listxattr listxattrat llistxattr _llseek lremovexattr lseek
lsetxattr lstat lstat64
madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2
mlockall mmap mmap2 mprotect mseal
mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64
mq_unlink mremap msgctl msgget msgrcv msgsnd msync munlock munlockall munmap
name_to_handle_at nanosleep newfstatat _newselect open openat openat2 pause pidfd_open pidfd_send_signal
pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl pread64 preadv preadv2 prlimit64
process_mrelease pselect6 pselect6_time64 ptrace process_vm_readv process_vm_writev pwrite64 pwritev pwritev2
read readahead readlink readlinkat readv remap_file_pages removexattr removexattrat rename renameat renameat2
restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn
rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo
sched_getaffinity sched_getattr sched_getparam sched_get_priority_max sched_get_priority_min
sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr
sched_setparam sched_setscheduler sched_yield
seccomp select semctl semget semop semtimedop semtimedop_time64 sendfile sendfile64
setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setitimer setpgid setpriority
setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid setreuid32 setrlimit
set_robust_list setsid set_thread_area set_tid_address setuid setuid32 setxattr setxattrat
shmat shmctl shmdt shmget sigaltstack signalfd signalfd4 sigprocmask sigreturn splice stat stat64 statfs
statfs64 statmount statx symlink symlinkat sync sync_file_range syncfs sysinfo
tee tgkill time timer_create timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime
timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times
tkill truncate truncate64 ugetrlimit umask uname unlink unlinkat uretprobe utime utimensat utimensat_time64
utimes vfork vmsplice wait4 waitid waitpid write writev
modify_ldt chroot
"""
_ALLOWED = _ALLOWED_TEXT.split()
#: What PodSpec.nested adds. All of these want CAP_SYS_ADMIN over the namespace that they change, which a pod's program
#: has only in a user namespace of its own making, and of namespaces that this one owns (user_namespaces(7)).
_NESTED_TEXT = """
fsconfig fsmount fsopen fspick mount mount_setattr move_mount open_tree open_tree_attr pivot_root setdomainname
sethostname setns umount umount2
"""
_NESTED = _NESTED_TEXT.split()

_AF_VSOCK = 40
_PERSONALITIES = (0x0, 0x0008, 0x20000, 0x20008, 0xFFFFFFFF)
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEW* of clone(2), but for the time namespace that it can't ask for
_NEW_TIME, _NEW_CGROUP = 0x80, 0x02000000  # CLONE_NEWTIME, CLONE_NEWCGROUP: see _compile
_NEWEST_KNOWN = 467  # open_tree_attr, Linux 6.15: above it ENOSYS
_AUDIT_ARCH_X86_64, _AUDIT_ARCH_I386 = 0xC000003E, 0x40000003
_X32_BIT = 0x40000000
_RET_ERRNO, _RET_ALLOW = 0x00050000, 0x7FFF0000
_SECCOMP_SET_MODE_FILTER = 1
#: A Landlock domain can't be read from outside, so a branch would run without it: there is none to begin with.
_NOT_SAVED = ("landlock_add_rule", "landlock_create_ruleset", "landlock_restrict_self")
_REVISION = 5  # of the rules below that _ALLOWED doesn't show
_IOCTL = {_AUDIT_ARCH_X86_64: 16, _AUDIT_ARCH_I386: 54}  # number by architecture
_UFFD_IOCTLS = 0xAA00  # UFFDIO: bits 8 to 15 of all ioctls of a userfaultfd, and of nothing else


def load(home: Path, *, nested: bool = False) -> bytes:
    """The filter as an array of struct sock_filter, from the cache in `home`, or compiled now.

    `nested`: with what PodSpec.nested allows. Raises Unsupported when it must be compiled and libseccomp is missing.
    """
    rules = (_REVISION, _NEWEST_KNOWN, _ALLOWED, _PERSONALITIES, _NESTED if nested else ())
    key = hashlib.sha256(repr(rules).encode()).hexdigest()[:16]
    path = home / "cache" / f"seccomp-{key}.bpf"
    with contextlib.suppress(FileNotFoundError):
        program = path.read_bytes()
        if program and len(program) % 8 == 0:
            return program
    program = _compile(nested)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent)
    with open(fd, "wb") as file:
        file.write(program)
    os.rename(temporary, path)
    return program


def install(program: bytes) -> None:
    """Put the filter on the calling thread; it stays. Needs CAP_SYS_ADMIN, as no_new_privs isn't set."""
    buffer = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    syscall(NR.seccomp, _SECCOMP_SET_MODE_FILTER, 0, fprog)


def _compile(nested: bool) -> bytes:
    try:
        import pyseccomp as lib
    except (ImportError, RuntimeError, OSError) as error:
        raise Unsupported(f"the seccomp filter can't be made: {error}", "install libseccomp2") from error
    rules = lib.SyscallFilter(lib.ERRNO(errno.EPERM))
    rules.add_arch(lib.Arch.X86)
    for name in _ALLOWED:
        with contextlib.suppress(ValueError, OSError):  # a call that this libseccomp, or this machine, lacks
            rules.add_rule(lib.ALLOW, name)
    # Any address family but the hypervisor's.
    rules.add_rule(lib.ALLOW, "socket", lib.Arg(0, lib.NE, _AF_VSOCK))
    for persona in _PERSONALITIES:
        rules.add_rule(lib.ALLOW, "personality", lib.Arg(0, lib.EQ, persona))
    # With a cgroup namespace comes the right to mount cgroup2, whose files are root's: its limits would be off.
    forbidden = _NEW_CGROUP if nested else _NEW_NAMESPACES
    rules.add_rule(lib.ALLOW, "clone", lib.Arg(0, lib.MASKED_EQ, forbidden, 0))
    # A thread may have descriptors or directories for itself.
    rules.add_rule(lib.ALLOW, "unshare", lib.Arg(0, lib.MASKED_EQ, forbidden | _NEW_TIME, 0))
    for name in _NESTED if nested else ():
        with contextlib.suppress(ValueError, OSError):
            rules.add_rule(lib.ALLOW, name)
    # Its flags lie in memory, where a filter can't look: ENOSYS makes libraries use clone.
    rules.add_rule(lib.ERRNO(errno.ENOSYS), "clone3")
    for name in _NOT_SAVED:
        rules.add_rule(lib.ERRNO(errno.ENOSYS), name)
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return _newer_are_unknown() + _sealing_is_allowed() + _no_faults_for_others() + file.read()


# Instructions to put in front. BPF's jumps are relative, so libseccomp's program behind them needs no change.
_LOAD, _EQUAL, _GREATER, _AND, _RETURN = 0x20, 0x15, 0x25, 0x54, 0x06
_NR, _ARCH, _ARG_1 = 0, 4, 24  # offsets in struct seccomp_data


def _assemble(*instructions: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("HBBI", *i) for i in instructions)


def _newer_are_unknown() -> bytes:
    """A native call newer than this list is ENOSYS, as on an older kernel."""
    return _assemble(
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 0, 3, _AUDIT_ARCH_X86_64),
        (_LOAD, 0, 0, _NR),
        (_GREATER, 0, 1, _NEWEST_KNOWN),  # x32 calls have bit 30 set, and go the same way
        (_RETURN, 0, 0, _RET_ERRNO | errno.ENOSYS),
    )


def _sealing_is_allowed() -> bytes:
    """mseal(2), which is younger than many a libseccomp."""
    return _assemble(
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 0, 3, _AUDIT_ARCH_X86_64),
        (_LOAD, 0, 0, _NR),
        (_EQUAL, 0, 1, NR.mseal),
        (_RETURN, 0, 0, _RET_ALLOW),
    )


def _no_faults_for_others() -> bytes:
    """A program can't make a userfaultfd, with which it could stop the kernel in the middle of anything; but as long
    as a branch's memory comes in it can find one (podtree.restore.pager): there is nothing to be done with it.
    """
    native, compat = _IOCTL[_AUDIT_ARCH_X86_64], _IOCTL[_AUDIT_ARCH_I386]
    return _assemble(
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 0, 2, _AUDIT_ARCH_X86_64),
        (_LOAD, 0, 0, _NR),
        (_EQUAL, 2, 6, native),
        (_LOAD, 0, 0, _NR),
        (_EQUAL, 0, 4, compat),
        (_LOAD, 0, 0, _ARG_1),
        (_AND, 0, 0, 0xFF00),
        (_EQUAL, 0, 1, _UFFD_IOCTLS),
        (_RETURN, 0, 0, _RET_ERRNO | errno.EPERM),
    )
