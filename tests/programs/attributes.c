/* What processes and threads set for themselves: rules for memory, sealed memory, segments, faults of rdtsc, machine
 * checks, system calls dispatched to the program; and what a pod doesn't let them have. */
#include "inpod.h"
#include <asm/ldt.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#ifndef PR_SET_MDWE
#define PR_SET_MDWE 65
#define PR_GET_MDWE 66
#endif
#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67
#define PR_GET_MEMORY_MERGE 68
#endif
#ifndef SYS_mseal
#define SYS_mseal 462
#endif

static void *mapped(size_t size, int prot)
{
    void *memory = mmap(NULL, size, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(memory != MAP_FAILED);
    return memory;
}

static int status_of(pid_t child)
{
    int status = -1;
    expect(waitpid(child, &status, 0) == child, "waitpid: %s", strerror(errno));
    return status;
}

/* No memory that is written and executed: a process, its child that inherits it, one to which it isn't handed down. */
static int is_denied(void)
{
    void *memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    void *other = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int denied = memory == MAP_FAILED && errno == EACCES && mprotect(other, 4096, PROT_READ | PROT_EXEC) < 0;
    if (memory != MAP_FAILED)
        munmap(memory, 4096);
    munmap(other, 4096);
    return denied;
}

static void write_or_execute(void)
{
    pid_t children[2];
    for (int i = 0; i < 2; i++) {
        children[i] = fork();
        if (!children[i]) {
            int rule = i ? 3 : 1; /* PR_MDWE_REFUSE_EXEC_GAIN, PR_MDWE_NO_INHERIT */
            void *code = mapped(4096, PROT_READ | PROT_WRITE | PROT_EXEC); /* from before */
            must(!prctl(PR_SET_MDWE, rule, 0, 0, 0));
            pid_t below = fork();
            wait_go();
            memset(code, 0x90, 4096);
            int wanted = below ? rule : i ? 0 : 1;
            int got = prctl(PR_GET_MDWE, 0, 0, 0, 0);
            int right = got == wanted && is_denied() == (wanted != 0);
            _exit(!(right && (!below || status_of(below) == 0)));
        }
    }
    usleep(200 * 1000);
    expect(prctl(PR_GET_MDWE, 0, 0, 0, 0) == 0, "set-up");
    frozen();
    expect(!is_denied(), "the parent can't either");
    for (int i = 0; i < 2; i++)
        expect(status_of(children[i]) == 0, "child %d found it otherwise", i);
}

/* rdtsc faults in one thread, not in others. */
static sigjmp_buf back;
static void fault(int number)
{
    siglongjmp(back, number);
}

static int rdtsc_works(void)
{
    if (sigsetjmp(back, 1))
        return 0;
    __asm__ volatile("rdtsc" ::: "eax", "edx");
    return 1;
}

static volatile int set_up;
static void *without_counter(void *unused)
{
    (void)unused;
    must(!prctl(PR_SET_TSC, PR_TSC_SIGSEGV));
    set_up = 1;
    while (syscall(SYS_access, go_file, F_OK)) /* the C library's clock would read the counter */
        usleep(10000);
    int how = 0;
    prctl(PR_GET_TSC, &how);
    return (void *)(intptr_t)(how == PR_TSC_SIGSEGV && !rdtsc_works());
}

static void time_stamps(void)
{
    signal(SIGSEGV, fault);
    pthread_t thread;
    must(!pthread_create(&thread, NULL, without_counter, NULL));
    while (!set_up)
        usleep(1000);
    frozen();
    void *right = NULL;
    pthread_join(thread, &right);
    expect(right, "the thread may read the counter");
    expect(rdtsc_works(), "the process may not read the counter");
}

/* Each thread has its own way with memory that fails. */
static void *early(void *unused)
{
    (void)unused;
    must(!prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0));
    set_up = 1;
    wait_go();
    return (void *)(intptr_t)prctl(PR_MCE_KILL_GET, 0, 0, 0, 0);
}

static void machine_checks(void)
{
    pthread_t thread;
    must(!pthread_create(&thread, NULL, early, NULL));
    while (!set_up)
        usleep(1000);
    must(!prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_LATE, 0, 0));
    frozen();
    void *got = NULL;
    pthread_join(thread, &got);
    expect((intptr_t)got == PR_MCE_KILL_EARLY, "the thread's is %ld", (long)(intptr_t)got);
    int own = prctl(PR_MCE_KILL_GET, 0, 0, 0, 0);
    expect(own == PR_MCE_KILL_LATE, "the process's is %d", own);
}

/* All memory may be merged with equal memory. */
static void merging(void)
{
    if (prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0)) {
        expect(errno == EINVAL, "PR_SET_MEMORY_MERGE: %s", strerror(errno)); /* a kernel without KSM */
        frozen();
        return;
    }
    frozen();
    expect(prctl(PR_GET_MEMORY_MERGE, 0, 0, 0, 0) == 1, "it is off");
}

/* Sealed mappings can't be changed any more; what is written to them is another matter. */
static void sealed(void)
{
    char *memory = mapped(5 * 4096, PROT_READ | PROT_WRITE), *code = mapped(4096, PROT_READ | PROT_WRITE);
    memset(memory, 'a', 5 * 4096);
    memset(code, 0xc3, 4096); /* ret */
    must(!mprotect(code, 4096, PROT_READ | PROT_EXEC));
    if (syscall(SYS_mseal, memory + 4096, 3 * 4096, 0) || syscall(SYS_mseal, code, 4096, 0)) {
        expect(errno == ENOSYS, "mseal: %s", strerror(errno));
        frozen();
        return;
    }
    say_ready();
    while (!go())
        memory[2 * 4096]++, usleep(5000);
    expect(munmap(memory + 4096, 4096) < 0 && errno == EPERM, "it can be unmapped");
    expect(mprotect(memory + 3 * 4096, 4096, PROT_READ) < 0 && errno == EPERM, "it can be protected");
    expect(mmap(memory + 2 * 4096, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED,
           "it can be mapped over");
    expect(mprotect(code, 4096, PROT_READ | PROT_WRITE) < 0 && errno == EPERM, "the code can be protected");
    ((void (*)(void))code)();
    expect(memory[4096] == 'a' && memory[4 * 4096 - 1] == 'a', "it holds something else");
    memory[4096] = 'b';
    expect(!mprotect(memory, 4096, PROT_READ) && !munmap(memory + 4 * 4096, 4096), "its neighbours are sealed, too");
}

/* Segments of its own, one of them in use. */
static uint32_t through_gs(void)
{
    uint32_t value;
    __asm__ volatile("movl %%gs:8, %0" : "=r"(value));
    return value;
}

static void segments(void)
{
    uint32_t *low = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
    must(low != MAP_FAILED);
    low[2] = 0x12345678;
    struct user_desc wanted[] = {
        {.entry_number = 3, .base_addr = (uint32_t)(uintptr_t)low, .limit = 0xfff, .seg_32bit = 1, .useable = 1},
        {.entry_number = 200, .base_addr = 0x12345000, .limit = 0xfffff, .seg_32bit = 1, .contents = 1,
         .limit_in_pages = 1, .read_exec_only = 1},
        {.entry_number = 77, .base_addr = 0xfedcb000, .limit = 0x12, .contents = 3, .seg_not_present = 1, .seg_32bit = 1}};
    for (int i = 0; i < 3; i++)
        must(!syscall(SYS_modify_ldt, 0x11, &wanted[i], sizeof wanted[i]));
    uint16_t selector = 3 << 3 | 7;
    __asm__ volatile("mov %0, %%gs" ::"r"(selector));
    must(through_gs() == 0x12345678);
    static char before[65536], after[65536];
    long size = syscall(SYS_modify_ldt, 0, before, sizeof before);
    frozen();
    long now = syscall(SYS_modify_ldt, 0, after, sizeof after);
    expect(now == size && !memcmp(before, after, sizeof before), "the table is another, %ld bytes", now);
    uint16_t got;
    __asm__ volatile("mov %%gs, %0" : "=r"(got));
    expect(got == selector, "gs is %#x", got);
    expect(through_gs() == 0x12345678, "what gs leads to is %#x", through_gs());
    __asm__ volatile("mov %0, %%gs" ::"r"(selector)); /* loaded anew from the table */
    expect(through_gs() == 0x12345678, "what gs leads to is %#x when loaded", through_gs());
}

/* System calls dispatched to the program: refused, and nobody makes any meanwhile in its name. */
static volatile char selector;
static volatile int dispatched, finish;
static void on_dispatch(int number)
{
    (void)number;
    selector = 0; /* allow */
    dispatched = 1;
}

static void *has_no_calls(void *unused)
{
    volatile long turns = 0;
    (void)unused;
    must(!prctl(59, 1, 0, 0, &selector)); /* PR_SET_SYSCALL_USER_DISPATCH, _ON */
    selector = 1;
    set_up = 1;
    while (!finish)
        turns++;
    selector = 0;
    return NULL;
}

static void dispatch(void)
{
    pthread_t thread;
    signal(SIGSYS, on_dispatch);
    must(!pthread_create(&thread, NULL, has_no_calls, NULL));
    while (!set_up)
        usleep(1000);
    frozen();
    finish = 1;
    pthread_join(thread, NULL);
    expect(!dispatched, "a call was made in its name");
}

/* What nobody could save isn't to be had inside: keyrings, policies for memory, flags of those who write back memory. */
static void not_offered(void)
{
    frozen();
    expect(syscall(SYS_keyctl, 1, 0) < 0 && errno == EPERM, "keyctl: %s", strerror(errno));
    expect(syscall(SYS_add_key, "user", "x", "y", 1, -2) < 0 && errno == EPERM, "add_key: %s", strerror(errno));
    expect(syscall(SYS_set_mempolicy, 0, NULL, 0) < 0 && errno == EPERM, "set_mempolicy: %s", strerror(errno));
    expect(syscall(SYS_mbind, mapped(4096, 3), 4096, 1, NULL, 0, 0) < 0 && errno == EPERM, "mbind: %s", strerror(errno));
    expect(prctl(57, 1, 0, 0, 0) < 0 && errno == EPERM, "PR_SET_IO_FLUSHER: %s", strerror(errno));
    expect(syscall(444, NULL, 0, 1) < 0 && errno == ENOSYS, "landlock_create_ruleset: %s", strerror(errno));
}

const struct test_case cases[] = {{"write_or_execute", write_or_execute},
                                  {"time_stamps", time_stamps},
                                  {"machine_checks", machine_checks},
                                  {"merging", merging},
                                  {"sealed", sealed},
                                  {"segments", segments},
                                  {"dispatch", dispatch},
                                  {"not_offered", not_offered},
                                  {NULL, NULL}};
