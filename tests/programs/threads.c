/* What the kernel keeps for a thread and the C library relies on: robust locks, clear_child_tid, rseq;
 * process-shared locks; a thread group whose leader has ended. */
#include "inpod.h"
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/rseq.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static void *just_wait(void *argument)
{
    wait_go();
    return argument;
}

/* A thread that dies holding a robust lock, after the freeze: the next owner is told. */
static pthread_mutex_t *shared_lock(int robust)
{
    pthread_mutex_t *lock = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    if (robust)
        pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(lock, &attributes);
    return lock;
}

static void *die_with_lock(void *lock)
{
    pthread_mutex_lock(lock);
    wait_go();
    return NULL; /* never unlocked */
}

static void robust_list(void)
{
    pthread_mutex_t *of_thread = shared_lock(1), *of_process = shared_lock(1);
    pthread_t thread;
    must(!pthread_create(&thread, NULL, die_with_lock, of_thread));
    pid_t child = fork();
    if (!child) {
        pthread_mutex_lock(of_process);
        wait_go();
        _exit(0);
    }
    usleep(200 * 1000);
    void *before, *after;
    size_t length, length_after;
    must(!syscall(SYS_get_robust_list, 0, &before, &length));
    frozen();
    must(!syscall(SYS_get_robust_list, 0, &after, &length_after));
    expect(before == after && length == length_after, "robust list head %p instead of %p", after, before);
    int got = pthread_mutex_lock(of_thread);
    expect(got == EOWNERDEAD, "the dead thread's lock gave %d", got);
    got = pthread_mutex_lock(of_process);
    expect(got == EOWNERDEAD, "the dead process's lock gave %d", got);
    pthread_join(thread, NULL);
    waitpid(child, NULL, 0);
}

/* Joining waits for the kernel to clear the tid at the thread's end. */
static void clear_child_tid(void)
{
    pthread_t threads[8];
    for (intptr_t i = 0; i < 8; i++)
        must(!pthread_create(&threads[i], NULL, just_wait, (void *)i));
    usleep(100 * 1000);
    frozen();
    for (intptr_t i = 0; i < 8; i++) {
        void *result;
        expect(!pthread_join(threads[i], &result) && result == (void *)i, "join of thread %ld", (long)i);
    }
    must(!pthread_create(&threads[0], NULL, just_wait, NULL)); /* and new ones can be made */
    pthread_join(threads[0], NULL);
}

/* rseq: the kernel goes on writing the CPU's number into the registered area. */
static void *rseq_thread(void *argument)
{
    (void)argument;
    struct rseq *area = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
    wait_go();
    for (int turn = 0; turn < 200; turn++) {
        int cpu = turn % 2;
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(cpu, &set);
        if (sched_setaffinity(0, sizeof set, &set))
            continue; /* one CPU only */
        sched_yield();
        expect((int)area->cpu_id == cpu, "rseq says CPU %d instead of %d", (int)area->cpu_id, cpu);
    }
    /* A second registration is refused: the first is still in force. */
    static struct rseq other __attribute__((aligned(32)));
    long got = syscall(SYS_rseq, &other, 32, 0, 0x53053053);
    expect(got == -1 && (errno == EBUSY || errno == EINVAL), "rseq could be registered again: %ld", got);
    return NULL;
}

static void rseq(void)
{
    pthread_t thread;
    if (!__rseq_size) { /* not used by this C library */
        frozen();
        return;
    }
    must(!pthread_create(&thread, NULL, rseq_thread, NULL));
    say_ready();
    rseq_thread(NULL);
    pthread_join(thread, NULL);
}

/* Locks and conditions shared between processes, with waiters on both. */
static void process_shared(void)
{
    struct shared {
        pthread_mutex_t lock;
        pthread_cond_t changed;
        int turn;
    } *area = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pthread_mutexattr_t mutex_attributes;
    pthread_condattr_t condition_attributes;
    pthread_mutexattr_init(&mutex_attributes);
    pthread_mutexattr_setpshared(&mutex_attributes, PTHREAD_PROCESS_SHARED);
    pthread_condattr_init(&condition_attributes);
    pthread_condattr_setpshared(&condition_attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutex_init(&area->lock, &mutex_attributes);
    pthread_cond_init(&area->changed, &condition_attributes);
    pid_t children[3];
    for (int i = 0; i < 3; i++) {
        if (!(children[i] = fork())) {
            pthread_mutex_lock(&area->lock);
            while (area->turn != i + 1)
                pthread_cond_wait(&area->changed, &area->lock);
            area->turn++;
            pthread_cond_broadcast(&area->changed);
            pthread_mutex_unlock(&area->lock);
            _exit(0);
        }
    }
    usleep(200 * 1000);
    frozen();
    pthread_mutex_lock(&area->lock);
    area->turn = 1;
    pthread_cond_broadcast(&area->changed);
    while (area->turn != 4)
        pthread_cond_wait(&area->changed, &area->lock);
    pthread_mutex_unlock(&area->lock);
    for (int i = 0; i < 3; i++) {
        int status;
        expect(waitpid(children[i], &status, 0) == children[i] && status == 0, "child %d", i);
    }
}

/* A process whose main thread has ended while others go on. */
static void *after_leader(void *argument)
{
    (void)argument;
    wait_go();
    _exit(33);
}

static void dead_leader(void)
{
    pid_t child = fork();
    if (!child) {
        pthread_t thread;
        pthread_create(&thread, NULL, after_leader, NULL);
        pthread_exit(NULL);
    }
    usleep(200 * 1000);
    frozen();
    int status;
    expect(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 33, "status %#x", status);
}

/* Thread-local storage, stacks and cancellation of many threads, some deep in recursion. */
static int deep(int depth, uint64_t seed)
{
    volatile uint64_t frame[64];
    for (int i = 0; i < 64; i++)
        frame[i] = seed + depth * 64 + i;
    if (depth == 0)
        wait_go();
    else if (deep(depth - 1, seed))
        return 1;
    for (int i = 0; i < 64; i++)
        if (frame[i] != seed + depth * 64 + i)
            return 1;
    return 0;
}

static void *deep_thread(void *seed)
{
    return (void *)(intptr_t)deep(1000, (uint64_t)seed);
}

static void stacks(void)
{
    pthread_t threads[5];
    for (uint64_t i = 0; i < 5; i++)
        must(!pthread_create(&threads[i], NULL, deep_thread, (void *)(i * 0x100000001)));
    usleep(200 * 1000);
    frozen();
    for (int i = 0; i < 5; i++) {
        void *result;
        pthread_join(threads[i], &result);
        expect(result == NULL, "the stack of thread %d differs", i);
    }
}

const struct test_case cases[] = {{"robust_list", robust_list},
                                  {"clear_child_tid", clear_child_tid},
                                  {"rseq", rseq},
                                  {"process_shared", process_shared},
                                  {"dead_leader", dead_leader},
                                  {"stacks", stacks},
                                  {NULL, NULL}};
