/* Tracers inside of a pod: what ptrace(2) tells of the tracee, and what it does next, has to be as before. */
#include "inpod.h"
#include <signal.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>

struct info {
    uint8_t op, pad[3];
    uint32_t arch;
    uint64_t ip, sp, word[8];
};

static volatile struct shared {
    long count, ready, go_on, value, sender;
} *shared;
static pid_t child;
static int pipe_fds[2], out;

static void setup(void (*body)(void))
{
    shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    must(shared != MAP_FAILED && pipe(pipe_fds) == 0);
    out = open("written", O_RDWR | O_CREAT | O_TRUNC | O_APPEND, 0600);
    must(out >= 0);
    child = fork();
    must(child >= 0);
    if (child == 0) {
        body();
        _exit(7);
    }
    while (!shared->ready)
        ;
}

static int next(void)
{
    int status = -1;
    must(waitpid(child, &status, __WALL) == child);
    return status;
}

static void quiet(void)
{
    int status = 0;
    expect(waitpid(child, &status, __WALL | WNOHANG) == 0, "there was news of the child: %#x", status);
}

static void resume(int request, long data)
{
    expect(ptrace(request, child, 0, data) == 0, "request %d: %s", request, strerror(errno));
}

static void is(const char *what, long got, long wanted)
{
    expect(got == wanted, "%s: %#lx instead of %#lx", what, got, wanted);
}

static void seize(long options)
{
    must(ptrace(PTRACE_SEIZE, child, 0, options | PTRACE_O_TRACESYSGOOD) == 0);
    must(ptrace(PTRACE_INTERRUPT, child, 0, 0) == 0);
    must(next() >> 8 == (SIGTRAP | PTRACE_EVENT_STOP << 8));
}

/* The child goes on to its end; `number`: a signal that it is to get now. */
static void finish(int number)
{
    int status;
    resume(PTRACE_CONT, number);
    while (WIFSTOPPED(status = next()) && WSTOPSIG(status) == SIGCHLD)
        resume(PTRACE_CONT, SIGCHLD);
    is("the end", status, 7 << 8);
}

/* --- running */

static void counts(void)
{
    for (shared->ready = 1; !shared->go_on; shared->count++)
        usleep(1000);
    pid_t own = fork();
    if (own == 0)
        _exit(0);
    waitpid(own, NULL, 0);
}

static void seized_running(void)
{
    setup(counts);
    seize(PTRACE_O_TRACEFORK);
    resume(PTRACE_CONT, 0);
    frozen();
    quiet();
    long before = shared->count;
    for (int i = 0; i < 500 && shared->count == before; i++)
        usleep(10000);
    expect(shared->count > before, "the child doesn't run");
    resume(PTRACE_INTERRUPT, 0);
    is("interrupted", next() >> 8, SIGTRAP | PTRACE_EVENT_STOP << 8);
    shared->go_on = 1;
    resume(PTRACE_CONT, 0);
    is("fork", next() >> 8, SIGTRAP | PTRACE_EVENT_FORK << 8);
    long born = 0;
    must(ptrace(PTRACE_GETEVENTMSG, child, 0, &born) == 0);
    must(waitpid(born, NULL, __WALL) == born && ptrace(PTRACE_DETACH, born, 0, 0) == 0);
    finish(0);
}

static void attached_running(void)
{
    setup(counts);
    must(ptrace(PTRACE_ATTACH, child, 0, 0) == 0 && next() >> 8 == SIGSTOP);
    resume(PTRACE_CONT, 0);
    frozen();
    quiet();
    expect(ptrace(PTRACE_INTERRUPT, child, 0, 0) == -1 && errno == EIO, "it is seized now");
    kill(child, SIGUSR1);
    is("signal", next() >> 8, SIGUSR1);
    shared->go_on = 1;
    finish(0);
}

static void spins(void)
{
    must(nice(19) == 19);
    for (shared->ready = 1; !shared->go_on;)
        ;
    getppid();
}

static void runs_to_call(void)
{
    setup(spins);
    seize(0);
    resume(PTRACE_SYSCALL, 0);
    frozen();
    quiet();
    shared->go_on = 1;
    is("call", next() >> 8, SIGTRAP | 0x80);
    struct info info = {0};
    must(ptrace(PTRACE_GET_SYSCALL_INFO, child, sizeof info, &info) > 0);
    is("operation", info.op, PTRACE_SYSCALL_INFO_ENTRY);
    finish(0);
}

/* --- in a system call */

static void reads(void)
{
    char text[8] = "";
    for (shared->ready = 1; !shared->go_on;)
        ;
    is("read", read(pipe_fds[0], text, sizeof text), 5);
    _exit(strcmp(text, "hello") ? 1 : 7);
}

static void sleeps(void)
{
    for (shared->ready = 1; !shared->go_on;)
        ;
    struct timespec time = {1, 500000000}, left = {0, 0};
    is("sleep", syscall(SYS_nanosleep, &time, &left), 0);
}

static void to_next_call(void (*body)(void), int stops)
{
    setup(body);
    seize(0);
    shared->go_on = 1;
    for (int i = 0; i < stops; i++) {
        resume(PTRACE_SYSCALL, 0);
        must(next() >> 8 == (SIGTRAP | 0x80));
    }
    resume(PTRACE_SYSCALL, 0);
}

static void call_ends(long result)
{
    struct info info = {0};
    is("call", next() >> 8, SIGTRAP | 0x80);
    must(ptrace(PTRACE_GET_SYSCALL_INFO, child, sizeof info, &info) > 0);
    is("operation", info.op, PTRACE_SYSCALL_INFO_EXIT);
    is("result", info.word[0], result);
    finish(0);
}

static void in_read(void)
{
    to_next_call(reads, 1);
    frozen();
    quiet();
    must(write(pipe_fds[1], "hello", 5) == 5);
    call_ends(5);
}

static void in_sleep(void)
{
    to_next_call(sleeps, 1);
    frozen();
    call_ends(0);
}

/* --- stopped at a system call */

static void writes(void)
{
    for (shared->ready = 1; !shared->go_on;)
        ;
    is("write", write(out, "once", 4), 4);
}

static void wrote_once(void)
{
    char text[16] = "";
    is("bytes written", pread(out, text, sizeof text, 0), 4);
    expect(!strcmp(text, "once"), "%s", text);
}

static void settled(void)
{
    siginfo_t info;
    must(waitid(P_PID, child, &info, WSTOPPED | WNOWAIT | __WALL) == 0);
}

static void at_a_call(int stops, int heard)
{
    to_next_call(writes, stops - 1);
    settled();
    if (heard)
        must(next() >> 8 == (SIGTRAP | 0x80));
    frozen();
    if (heard)
        quiet();
    else
        is("call", next() >> 8, SIGTRAP | 0x80);
    struct info info = {0};
    struct user_regs_struct regs;
    must(ptrace(PTRACE_GET_SYSCALL_INFO, child, sizeof info, &info) > 0);
    must(ptrace(PTRACE_GETREGS, child, 0, &regs) == 0);
    is("operation", info.op, stops);
    is("number", regs.orig_rax, SYS_write);
    is("rax", (long)regs.rax, stops == 1 ? -ENOSYS : 4);
    is("rdi", regs.rdi, out);
    is("rcx", regs.rcx, regs.rip);
    if (stops == 1) {
        is("number", info.word[0], SYS_write);
        resume(PTRACE_SYSCALL, 0);
        is("call", next() >> 8, SIGTRAP | 0x80);
    }
    finish(0);
    wrote_once();
}

static void at_entry(void)
{
    at_a_call(1, 1);
}

static void at_entry_unheard(void)
{
    at_a_call(1, 0);
}

static void at_exit_of_call(void)
{
    at_a_call(2, 1);
}

static void at_exit_unheard(void)
{
    at_a_call(2, 0);
}

/* --- stopped by a signal */

static void note(int number, siginfo_t *info, void *context)
{
    (void)context, (void)number;
    shared->value = info->si_value.sival_int;
    shared->sender = info->si_pid;
}

static void handles(void)
{
    struct sigaction action = {.sa_sigaction = note, .sa_flags = SA_SIGINFO};
    sigaction(SIGRTMIN, &action, NULL);
    shared->ready = 1;
    while (!shared->value)
        shared->count++;
    _exit(shared->value == 4711 && shared->sender == getppid() ? 7 : 1);
}

static void before_a_signal(int heard)
{
    setup(handles);
    must(ptrace(PTRACE_ATTACH, child, 0, 0) == 0 && next() >> 8 == SIGSTOP);
    resume(PTRACE_CONT, 0);
    union sigval value = {.sival_int = 4711};
    must(sigqueue(child, SIGRTMIN, value) == 0);
    settled();
    if (heard)
        must(next() >> 8 == SIGRTMIN);
    frozen();
    if (heard)
        quiet();
    else
        is("signal", next() >> 8, SIGRTMIN);
    siginfo_t info;
    must(ptrace(PTRACE_GETSIGINFO, child, 0, &info) == 0);
    is("signal", info.si_signo, SIGRTMIN);
    is("value", info.si_value.sival_int, 4711);
    is("sender", info.si_pid, getpid());
    finish(SIGRTMIN);
}

static void signal_held(void)
{
    before_a_signal(1);
}

static void signal_unheard(void)
{
    before_a_signal(0);
}

/* --- as a debugger */

static void breaks(void)
{
    ptrace(PTRACE_TRACEME, 0, 0, 0);
    shared->ready = 1;
    __asm__ volatile("movq $0x1234, %%r12\n\tint3\n\tmovq $1, %0" : "=m"(shared->value) : : "r12");
    shared->count = 1;
}

static void breakpoint(void)
{
    setup(breaks);
    must(next() >> 8 == SIGTRAP);
    must(ptrace(PTRACE_SETOPTIONS, child, 0, PTRACE_O_TRACEEXIT | PTRACE_O_EXITKILL) == 0);
    long debug = offsetof(struct user, u_debugreg), watched = (long)&shared->count;
    must(ptrace(PTRACE_POKEUSER, child, debug, watched) == 0);
    must(ptrace(PTRACE_POKEUSER, child, debug + 7 * 8, 1 | 1 << 16 | 2 << 18) == 0); /* writes of 8 bytes */
    frozen();
    quiet();
    struct user_regs_struct regs;
    siginfo_t info;
    must(ptrace(PTRACE_GETREGS, child, 0, &regs) == 0 && ptrace(PTRACE_GETSIGINFO, child, 0, &info) == 0);
    is("r12", regs.r12, 0x1234);
    is("code", info.si_code, 0x80); /* SI_KERNEL */
    resume(PTRACE_CONT, 0);
    is("watched", next() >> 8, SIGTRAP);
    is("count", shared->count, 1);
    is("value", shared->value, 1);
    is("address", ptrace(PTRACE_PEEKUSER, child, debug, 0), watched);
    resume(PTRACE_CONT, 0);
    is("exit", next() >> 8, SIGTRAP | PTRACE_EVENT_EXIT << 8);
    finish(0);
}

/* --- one that is traced itself */

static void ends(void)
{
    shared->ready = 1;
    while (!shared->go_on)
        usleep(1000);
}

static void traces(void)
{
    pid_t below = fork();
    if (below == 0)
        for (;;)
            usleep(1000);
    expect(ptrace(PTRACE_SEIZE, below, 0, PTRACE_O_EXITKILL) == 0, "PTRACE_SEIZE: %s", strerror(errno));
    ends();
}

static void traced_tracer(void)
{
    setup(traces);
    seize(0);
    resume(PTRACE_CONT, 0);
    frozen();
    quiet();
    shared->go_on = 1;
    is("the end", next(), 7 << 8);
}

/* --- refused */

static void at_event(void)
{
    setup(ends);
    seize(PTRACE_O_TRACEEXIT);
    shared->go_on = 1;
    resume(PTRACE_CONT, 0);
    must(next() >> 8 == (SIGTRAP | PTRACE_EVENT_EXIT << 8));
    frozen();
    finish(0);
}

const struct test_case cases[] = {
    {"at_event", at_event},
    {"traced_tracer", traced_tracer},
    {"seized_running", seized_running},
    {"attached_running", attached_running},
    {"runs_to_call", runs_to_call},
    {"in_read", in_read},
    {"in_sleep", in_sleep},
    {"at_entry", at_entry},
    {"at_entry_unheard", at_entry_unheard},
    {"at_exit_of_call", at_exit_of_call},
    {"at_exit_unheard", at_exit_unheard},
    {"signal_held", signal_held},
    {"signal_unheard", signal_unheard},
    {"breakpoint", breakpoint},
    {NULL, NULL},
};
