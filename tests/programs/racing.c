/* Processes and threads that come, go and change under the eyes of a tracer, as fast as they can.
 *
 * Unlike the other programs these run until they are killed. Each round that went as it should is a byte to
 * standard output; anything else ends the program with a complaint. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;
static char *self = "/proc/thread-self/exe"; /* /proc/self shows the leader, which may have ended */
enum { DONE = 5 };

static void round_is_over(void)
{
    if (write(1, ".", 1) != 1)
        exit(0);
}

static void expect_end(pid_t child, int wanted)
{
    int status = 0;
    pid_t got = waitpid(child, &status, 0);
    if (got != child || status != wanted) {
        fprintf(stderr, "waitpid gave %d (%s), status %#x instead of %#x\n", got, strerror(errno), status, wanted);
        exit(1);
    }
    round_is_over();
}

static void *idle(void *unused)
{
    for (;;)
        usleep(100);
    return unused;
}

static void start_idle_threads(int count)
{
    pthread_t thread;
    while (count--)
        if (pthread_create(&thread, NULL, idle, NULL))
            abort();
}

/* Killed while it may be stopped already, by one who may not be. */
static void killed(void)
{
    for (;;) {
        pid_t child = fork();
        if (!child)
            for (;;)
                getppid();
        usleep(rand() % 300);
        kill(child, SIGKILL);
        expect_end(child, SIGKILL);
    }
}

/* One thread ends the whole process. */
static void ends(void)
{
    for (;;) {
        pid_t child = fork();
        if (!child) {
            start_idle_threads(3);
            usleep(rand() % 500);
            exit(3);
        }
        expect_end(child, 3 << 8);
    }
}

static void *executes(void *unused)
{
    usleep(rand() % 300);
    execl(self, "racing", "done", NULL);
    abort();
    return unused;
}

/* A thread that isn't the leader executes a program: the others end, and it goes on under the leader's number. */
static void thread_executes(void)
{
    for (;;) {
        pid_t child = fork();
        if (!child) {
            pthread_t thread;
            srand(getpid());
            start_idle_threads(2);
            pthread_create(&thread, NULL, executes, NULL);
            idle(NULL);
        }
        expect_end(child, DONE << 8);
    }
}

static void *ends_all(void *unused)
{
    usleep(rand() % 2000);
    exit(3);
    return unused;
}

/* The leader ends before the others, of which one ends the process, or executes a program. */
static void leader_ends(void)
{
    for (int round = 0;; round++) {
        pid_t child = fork();
        if (!child) {
            pthread_t thread;
            srand(getpid());
            start_idle_threads(2);
            pthread_create(&thread, NULL, round % 2 ? ends_all : executes, NULL);
            usleep(rand() % 300);
            syscall(SYS_exit, 1);
        }
        expect_end(child, (round % 2 ? 3 : DONE) << 8);
    }
}

/* posix_spawn(3) is a vfork: the parent can't stop before the child has executed. */
static void spawns(void)
{
    for (;;) {
        pid_t child;
        char *words[] = {"racing", "done", NULL};
        if (posix_spawn(&child, self, NULL, NULL, words, environ))
            abort();
        expect_end(child, DONE << 8);
    }
}

static void *nothing(void *unused)
{
    return unused;
}

static void threads_come_and_go(void)
{
    for (;;) {
        pthread_t threads[4];
        for (int i = 0; i < 4; i++)
            if (pthread_create(&threads[i], NULL, nothing, NULL))
                abort();
        for (int i = 0; i < 4; i++)
            pthread_join(threads[i], NULL);
        round_is_over();
    }
}

static void expect_change(pid_t child, int options, int wanted)
{
    int status = 0;
    pid_t got = waitpid(child, &status, options);
    if (got != child || status != wanted) {
        fprintf(stderr, "waitpid gave %d, status %#x instead of %#x\n", got, status, wanted);
        exit(1);
    }
}

static void stopped_and_continued(void)
{
    pid_t child = fork();
    if (!child) {
        start_idle_threads(1);
        for (;;)
            for (int i = 0; i < 1000; i++)
                getppid();
    }
    for (;;) {
        kill(child, SIGSTOP);
        expect_change(child, WUNTRACED, SIGSTOP << 8 | 0x7f);
        kill(child, SIGCONT);
        expect_change(child, WCONTINUED, 0xffff);
        round_is_over();
    }
}

/* A child that stays inside of vfork(2) for a while: its parent can't be stopped. */
static void stays_in_vfork(void)
{
    for (;;) {
        pid_t child = vfork();
        if (!child) {
            struct timespec span = {2, 0};
            syscall(SYS_nanosleep, &span, NULL);
            _exit(3);
        }
        expect_end(child, 3 << 8);
    }
}

/* ---- calls with a timeout, stopped more often than it lasts */

static const struct timespec limit = {0, 400 * 1000 * 1000};

static void expect_limit(const char *what, long got, int error, const struct timespec *began)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    double took = now.tv_sec - began->tv_sec + (now.tv_nsec - began->tv_nsec) / 1e9;
    int wrong = error ? got != -1 || errno != error : got != 0;
    if (wrong || took < 0.399) {
        fprintf(stderr, "%s gave %ld (%s) after %.3f s\n", what, got, strerror(errno), took);
        exit(1);
    }
    round_is_over();
}

static void limits_run_out(void)
{
    int ends[2];
    char byte;
    sigset_t set;
    struct timeval span = {limit.tv_sec, limit.tv_nsec / 1000};
    struct timespec began;
    struct epoll_event event;
    int watch = epoll_create1(0);
    socketpair(AF_UNIX, SOCK_STREAM, 0, ends);
    setsockopt(ends[0], SOL_SOCKET, SO_RCVTIMEO, &span, sizeof span);
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigprocmask(SIG_BLOCK, &set, NULL);
    for (;;) {
        clock_gettime(CLOCK_MONOTONIC, &began);
        expect_limit("recv", recv(ends[0], &byte, 1, 0), EAGAIN, &began);
        clock_gettime(CLOCK_MONOTONIC, &began);
        expect_limit("read", read(ends[0], &byte, 1), EAGAIN, &began);
        clock_gettime(CLOCK_MONOTONIC, &began);
        expect_limit("sigtimedwait", sigtimedwait(&set, NULL, &limit), EAGAIN, &began);
        clock_gettime(CLOCK_MONOTONIC, &began);
        expect_limit("epoll_pwait2", syscall(441, watch, &event, 1, &limit, NULL, 8), 0, &began);
        clock_gettime(CLOCK_MONOTONIC, &began);
        expect_limit("epoll_wait", epoll_wait(watch, &event, 1, 400), 0, &began);
    }
}

/* Signals that nobody wants to hear of come all the time; epoll_wait(2) isn't restarted after a signal. */
static void ignored_signals(void)
{
    struct epoll_event event;
    int watch = epoll_create1(0);
    pid_t parent = getpid();
    signal(SIGUSR1, SIG_IGN);
    if (!fork())
        for (;;) {
            kill(parent, SIGUSR1);
            kill(parent, SIGWINCH);
            usleep(rand() % 100);
        }
    for (;;) {
        if (epoll_wait(watch, &event, 1, 10)) {
            perror("epoll_wait");
            exit(1);
        }
        round_is_over();
    }
}

/* Signals that are blocked only within epoll_pwait(2), with a handler: they interrupt, and only after it. */
static volatile int handled;
static void on_signal(int number)
{
    (void)number;
    handled++;
}

static void blocked_within(void)
{
    struct epoll_event event;
    int watch = epoll_create1(0);
    pid_t parent = getpid();
    sigset_t all;
    sigfillset(&all);
    signal(SIGUSR1, on_signal);
    if (!fork())
        for (;;) {
            kill(parent, SIGUSR1);
            usleep(rand() % 100);
        }
    for (;;) {
        if (epoll_pwait(watch, &event, 1, 10, &all)) {
            perror("epoll_pwait");
            exit(1);
        }
        round_is_over();
    }
}

int main(int count, char **words)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } cases[] = {{"killed", killed},
                 {"ends", ends},
                 {"thread_executes", thread_executes},
                 {"leader_ends", leader_ends},
                 {"spawns", spawns},
                 {"threads_come_and_go", threads_come_and_go},
                 {"stopped_and_continued", stopped_and_continued},
                 {"stays_in_vfork", stays_in_vfork},
                 {"limits_run_out", limits_run_out},
                 {"ignored_signals", ignored_signals},
                 {"blocked_within", blocked_within}};
    if (count == 2 && !strcmp(words[1], "done"))
        return DONE;
    srand(getpid());
    for (unsigned i = 0; count == 2 && i < sizeof cases / sizeof *cases; i++)
        if (!strcmp(words[1], cases[i].name))
            cases[i].run();
    return 2;
}
