/* Threads blocked in system calls of all kinds, none of which may notice that it was frozen:
 * no EINTR, no early or lost wake-up, no wrong remaining time. With "many" the test takes many checkpoints. */
#include "inpod.h"
#include <linux/futex.h>
#include <mqueue.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>

static int wake[32][2]; /* one pipe or socket pair a thread */
static uint32_t futex_word, bitset_word;
static sem_t semaphore;
static pid_t sleeping_child;
static struct timespec began;
enum { STREAM = 1 << 20 };
static char stream[STREAM]; /* what goes through the pipe of in_write */
static double nanosleep_woke_at, clock_nanosleep_woke_at; /* s since the start; both begin at once, for 8 s */

static double since_start(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec - began.tv_sec + (now.tv_nsec - began.tv_nsec) / 1e9;
}

static const char *why(long result)
{
    static __thread char text[64];
    snprintf(text, sizeof text, "returned %ld (%s) after %.3f s", result, result < 0 ? strerror(errno) : "-",
             since_start());
    return text;
}

/* Whether to call again: a tracer that is killed right after a stop can't undo the EINTR that signal(7) lists
 * for this call. PT_EINTR in the environment says that such a thing may happen here; nothing else may. */
static int again(long result)
{
    return result < 0 && errno == EINTR && getenv("PT_EINTR");
}

static void *in_read(void *argument)
{
    int *pipe_ends = argument;
    char byte = 0;
    long got = read(pipe_ends[0], &byte, 1);
    expect(got == 1 && byte == 'w', "read %s", why(got));
    return NULL;
}

static void *in_poll(void *argument)
{
    struct pollfd one = {((int *)argument)[0], POLLIN, 0};
    long got = poll(&one, 1, -1);
    expect(got == 1 && one.revents == POLLIN, "poll %s", why(got));
    return NULL;
}

static void *in_poll_limited(void *argument)
{
    struct pollfd one = {((int *)argument)[0], POLLIN, 0};
    long got = poll(&one, 1, 600 * 1000);
    expect(got == 1, "poll with a limit %s", why(got));
    return NULL;
}

static void *in_ppoll(void *argument)
{
    struct pollfd one = {((int *)argument)[0], POLLIN, 0};
    struct timespec limit = {600, 0};
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR1);
    sigaddset(&mask, SIGRTMIN + 4); /* another thread waits for it */
    long got = ppoll(&one, 1, &limit, &mask);
    expect(got == 1, "ppoll %s", why(got));
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    expect(!sigismember(&mask, SIGUSR1), "ppoll left its mask behind");
    return NULL;
}

static void *in_select(void *argument)
{
    fd_set set;
    FD_ZERO(&set);
    FD_SET(((int *)argument)[0], &set);
    struct timeval limit = {600, 0};
    long got = select(((int *)argument)[0] + 1, &set, NULL, NULL, &limit);
    expect(got == 1, "select %s", why(got));
    return NULL;
}

static void *in_pselect(void *argument)
{
    fd_set set;
    FD_ZERO(&set);
    FD_SET(((int *)argument)[0], &set);
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGRTMIN + 4); /* another thread waits for it */
    long got = pselect(((int *)argument)[0] + 1, &set, NULL, NULL, NULL, &mask);
    expect(got == 1, "pselect %s", why(got));
    return NULL;
}

static void *in_epoll(void *argument)
{
    int poll_fd = epoll_create1(0);
    struct epoll_event event = {EPOLLIN, {.u64 = 0x123456789abc}};
    epoll_ctl(poll_fd, EPOLL_CTL_ADD, ((int *)argument)[0], &event);
    memset(&event, 0, sizeof event);
    long got;
    while (again(got = epoll_wait(poll_fd, &event, 1, -1)))
        ;
    expect(got == 1 && event.data.u64 == 0x123456789abc, "epoll_wait %s", why(got));
    return NULL;
}

static void *in_epoll_limited(void *argument)
{
    int poll_fd = epoll_create1(0);
    struct epoll_event event = {EPOLLIN, {.u64 = 7}};
    epoll_ctl(poll_fd, EPOLL_CTL_ADD, ((int *)argument)[0], &event);
    long got;
    while (again(got = epoll_wait(poll_fd, &event, 1, 600 * 1000)))
        ;
    expect(got == 1, "epoll_wait with a limit %s", why(got));
    return NULL;
}

static void *in_recv(void *argument)
{
    char byte;
    long got = recv(((int *)argument)[0], &byte, 1, 0);
    expect(got == 1, "recv %s", why(got));
    return NULL;
}

static void *in_recvmsg_limited(void *argument)
{
    struct timeval limit = {600, 0};
    char byte;
    struct iovec vector = {&byte, 1};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1};
    setsockopt(((int *)argument)[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    long got;
    while ((got = recvmsg(((int *)argument)[0], &message, 0)) < 0 && errno == EINTR)
        ; /* with a limit, signal(7) allows EINTR after a stop even without a handler */
    expect(got == 1, "recvmsg with a limit %s", why(got));
    return NULL;
}

static void *in_accept(void *argument)
{
    int server = *(int *)argument;
    long got = accept(server, NULL, NULL);
    expect(got >= 0, "accept %s", why(got));
    return NULL;
}

static void *in_nanosleep(void *argument)
{
    (void)argument;
    struct timespec span = {8, 0};
    double at = since_start();
    long got = nanosleep(&span, NULL);
    double slept = since_start() - at;
    expect(got == 0, "nanosleep %s", why(got));
    expect(slept > 7.99, "nanosleep of 8 s took %.3f s", slept);
    nanosleep_woke_at = since_start();
    return NULL;
}

static void *in_clock_nanosleep(void *argument)
{
    (void)argument;
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += 8;
    long got = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
    expect(got == 0, "clock_nanosleep returned %ld", got);
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    double late = now.tv_sec - until.tv_sec + (now.tv_nsec - until.tv_nsec) / 1e9;
    expect(late > -0.001 && late < 60, "clock_nanosleep woke %.3f s late", late);
    clock_nanosleep_woke_at = since_start();
    return NULL;
}

static void *in_futex(void *argument)
{
    (void)argument;
    while (__atomic_load_n(&futex_word, __ATOMIC_SEQ_CST) == 0) {
        long got = syscall(SYS_futex, &futex_word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
        expect(got == 0 || errno == EAGAIN, "futex %s", why(got));
    }
    return NULL;
}

static void *in_futex_limited(void *argument)
{
    (void)argument;
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += 600;
    while (__atomic_load_n(&bitset_word, __ATOMIC_SEQ_CST) == 0) {
        long got = syscall(SYS_futex, &bitset_word, FUTEX_WAIT_BITSET_PRIVATE, 0, &until, NULL, 0xf);
        expect(got == 0 || errno == EAGAIN, "futex with a limit %s", why(got));
    }
    return NULL;
}

static void *in_sem_wait(void *argument)
{
    (void)argument;
    long got = sem_wait(&semaphore);
    expect(got == 0, "sem_wait %s", why(got));
    return NULL;
}

static void *in_waitpid(void *argument)
{
    (void)argument;
    int status = 0;
    long got = waitpid(sleeping_child, &status, 0);
    expect(got == sleeping_child && WEXITSTATUS(status) == 3, "waitpid %s", why(got));
    return NULL;
}

static void *in_sigwait(void *argument)
{
    *(pid_t *)argument = gettid();
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 4);
    siginfo_t info;
    long got;
    while (again(got = sigwaitinfo(&set, &info)))
        ;
    expect(got == SIGRTMIN + 4 && info.si_value.sival_int == 99, "sigwaitinfo %s", why(got));
    return NULL;
}

/* Blocked with part of it taken: a stop then ends write(2) with the number of bytes taken so far, as ^Z does.
 * Whatever is returned must be true: the reader finds each byte once. */
static void *in_write(void *argument)
{
    int fd = ((int *)argument)[1];
    for (long done = 0, got; done < STREAM; done += got) {
        got = write(fd, stream + done, STREAM - done);
        expect(got > 0 && got <= STREAM - done, "write %s", why(got));
        if (got <= 0)
            break;
    }
    close(fd);
    return NULL;
}

static void *in_pipe_join(void *argument)
{
    long got = pthread_join(*(pthread_t *)argument, NULL);
    expect(got == 0, "pthread_join returned %ld", got);
    return NULL;
}

static void *(*const on_pipe[])(void *) = {in_read,    in_poll,    in_poll_limited, in_ppoll,
                                           in_select,  in_pselect, in_epoll,        in_epoll_limited};

static void all_kinds(void)
{
    enum { PIPES = sizeof on_pipe / sizeof *on_pipe };
    pthread_t threads[24];
    pid_t sigwait_tid = 0;
    int count = 0;
    clock_gettime(CLOCK_MONOTONIC, &began);
    for (int i = 0; i < STREAM; i++)
        stream[i] = (char)(i * 2654435761u >> 24);
    sem_init(&semaphore, 0, 0);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 4);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    if (!(sleeping_child = fork())) {
        wait_go();
        _exit(3);
    }
    for (int i = 0; i < PIPES; i++) {
        must(!pipe(wake[i]));
        pthread_create(&threads[count++], NULL, on_pipe[i], wake[i]);
    }
    for (int i = PIPES; i < PIPES + 2; i++) {
        must(!socketpair(AF_UNIX, SOCK_STREAM, 0, wake[i]));
        pthread_create(&threads[count++], NULL, i == PIPES ? in_recv : in_recvmsg_limited, wake[i]);
    }
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int server = socket(AF_INET, SOCK_STREAM, 0), written[2];
    must(!bind(server, (void *)&address, sizeof address) && !listen(server, 5));
    must(!getsockname(server, (void *)&address, &length));
    must(!pipe(written));
    pthread_create(&threads[count++], NULL, in_accept, &server);
    pthread_create(&threads[count++], NULL, in_write, written);
    void *(*const plain[])(void *) = {in_nanosleep,     in_clock_nanosleep, in_futex,
                                      in_futex_limited, in_sem_wait,        in_waitpid};
    for (unsigned i = 0; i < sizeof plain / sizeof *plain; i++)
        pthread_create(&threads[count++], NULL, plain[i], NULL);
    pthread_create(&threads[count++], NULL, in_sigwait, &sigwait_tid);
    pthread_create(&threads[count], NULL, in_pipe_join, &threads[count - 1]);
    count++;
    usleep(300 * 1000);

    frozen();

    for (int i = 0; i < PIPES + 2; i++)
        must(write(wake[i][1], "w", 1) == 1);
    int client = socket(AF_INET, SOCK_STREAM, 0);
    must(!connect(client, (void *)&address, sizeof address));
    static char sink[1 << 16];
    long total = 0;
    for (long got; (got = read(written[0], sink, sizeof sink)) > 0; total += got)
        if (total + got > STREAM || memcmp(sink, stream + total, got)) {
            bad("the pipe gave other bytes than were written, after %ld", total);
            break;
        }
    expect(total == STREAM, "%ld bytes came through the pipe", total);
    __atomic_store_n(&futex_word, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &futex_word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    __atomic_store_n(&bitset_word, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &bitset_word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    sem_post(&semaphore);
    union sigval value = {.sival_int = 99};
    must(!sigqueue(getpid(), SIGRTMIN + 4, value));
    for (int i = 0; i < count; i++)
        if (i != count - 2) /* that one is joined by a thread of its own */
            pthread_join(threads[i], NULL);
    /* A branch starts a relative sleep anew, at most 8 s late. Starting anew at each of many stops would take longer. */
    double apart = nanosleep_woke_at - clock_nanosleep_woke_at;
    expect(apart > -3 && apart < 8 + 3, "the relative sleep ended %.3f s after the absolute one", apart);
}

/* Time limits run out while nobody is looking: each call ends with its own time-out, not early, not with EINTR. */
static void limits_run_out(void)
{
    clock_gettime(CLOCK_MONOTONIC, &began);
    int ends[2];
    must(!pipe(ends));
    say_ready();
    for (int round = 0; !failures && !go(); round++) {
        struct pollfd one = {ends[0], POLLIN, 0};
        double at = since_start();
        long got = poll(&one, 1, 300);
        double took = since_start() - at;
        expect(got == 0 && took > 0.299, "poll of 0.3 s %s, took %.3f s", why(got), took);
        struct timespec limit = {0, 200 * 1000 * 1000};
        at = since_start();
        uint32_t word = 0;
        got = syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &limit, NULL, 0);
        took = since_start() - at;
        expect(got == -1 && errno == ETIMEDOUT && took > 0.199, "futex of 0.2 s %s, took %.3f s", why(got), took);
        at = since_start();
        got = nanosleep(&limit, NULL);
        took = since_start() - at;
        expect(got == 0 && took > 0.199, "nanosleep of 0.2 s %s, took %.3f s", why(got), took);
    }
}

/* A process that makes short system calls as fast as it can, and checks each answer. */
static void busy_calls(void)
{
    pid_t pid = getpid();
    int ends[2];
    must(!pipe(ends));
    say_ready();
    for (uint64_t round = 0; !failures; round++) {
        uint64_t got = 0;
        expect(syscall(SYS_getpid) == pid, "getpid");
        expect(write(ends[1], &round, 8) == 8, "write: %s", strerror(errno));
        expect(read(ends[0], &got, 8) == 8 && got == round, "read: %s", strerror(errno));
        expect(syscall(SYS_lseek, 1000, 0, 0) == -1 && errno == EBADF, "lseek on no file: %s", strerror(errno));
        if (round % 1024 == 0 && go())
            break;
    }
}

/* A handler runs when a signal comes after the freeze, interrupting a read as it should: EINTR is then right. */
static volatile int handled;
static void on_signal(int number)
{
    (void)number;
    handled++;
}

static void handler_interrupts(void)
{
    int ends[2];
    char byte;
    must(!pipe(ends));
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGUSR1, &action, NULL);
    pid_t parent = getpid();
    say_ready();
    if (!fork()) {
        wait_go();
        kill(parent, SIGUSR1);
        _exit(0);
    }
    long got = read(ends[0], &byte, 1);
    expect(got == -1 && errno == EINTR && handled == 1, "read %s, handled %d", why(got), handled);
    expect(go(), "interrupted before anybody sent a signal");
    action.sa_flags = SA_RESTART;
    sigaction(SIGUSR1, &action, NULL);
    wait(NULL);
}

const struct test_case cases[] = {{"all_kinds", all_kinds},
                                  {"limits_run_out", limits_run_out},
                                  {"busy_calls", busy_calls},
                                  {"handler_interrupts", handler_interrupts},
                                  {NULL, NULL}};
