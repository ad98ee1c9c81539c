/* Thread groups whose leader has ended while other threads live: the process goes on, and what it has is to be reached
 * through those. */
#include "inpod.h"
#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sem.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static pthread_t started(void *(*body)(void *), void *argument)
{
    pthread_t thread;
    must(!pthread_create(&thread, NULL, body, argument));
    return thread;
}

/* Ends the calling thread alone. */
static void end_thread(int code)
{
    syscall(SYS_exit, code);
    abort();
}

static char state_of(pid_t pid)
{
    char path[64], text[512] = "";
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int fd = open(path, O_RDONLY);
    if (fd < 0 || read(fd, text, sizeof text - 1) <= 0)
        return '?';
    close(fd);
    return strrchr(text, ')')[2];
}

/* As the last field of its line in /proc tells. */
static int leaders_code(pid_t pid)
{
    char path[64], text[1024] = "";
    snprintf(path, sizeof path, "/proc/%d/task/%d/stat", pid, pid);
    int fd = open(path, O_RDONLY);
    must(fd >= 0 && read(fd, text, sizeof text - 1) > 0);
    close(fd);
    return atoi(strrchr(text, ' '));
}

static void until_leader_ended(pid_t pid)
{
    for (int i = 0; i < 2000 && state_of(pid) != 'Z'; i++)
        usleep(5000);
    must(state_of(pid) == 'Z');
}

static int status_of(pid_t child)
{
    int status = -1;
    expect(waitpid(child, &status, 0) == child, "waitpid: %s", strerror(errno));
    return status;
}

/* The status of a process whose threads end one by one: that of its last thread, before Linux 6.0 its leader's. */
static int wait_first = 1;
static void *last_thread(void *memory)
{
    prctl(PR_SET_NAME, "the last one");
    if (wait_first)
        wait_go();
    else
        until_leader_ended(getpid());
    int *numbers = memory;
    for (int i = 0; i < 100000; i++)
        if (numbers[i] != i)
            _exit(99);
    end_thread(5);
    return NULL;
}

static pid_t without_leader(void)
{
    pid_t child = fork();
    if (!child) {
        int *numbers = mmap(NULL, 400000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        for (int i = 0; i < 100000; i++)
            numbers[i] = i;
        prctl(PR_SET_NAME, "gone leader");
        started(last_thread, numbers);
        end_thread(7);
    }
    return child;
}

static void exit_code(void)
{
    pid_t child = without_leader();
    int code = 0, seen;
    until_leader_ended(child);
    say_ready();
    for (; !go(); usleep(10000))
        if (seen = leaders_code(child), !go()) /* it was still there */
            code = seen;
    expect(state_of(child) == 'Z', "its leader's state is %c", state_of(child));
    char path[64], name[32] = "";
    snprintf(path, sizeof path, "/proc/%d/comm", child);
    int fd = open(path, O_RDONLY);
    must(read(fd, name, sizeof name - 1) > 0);
    close(fd);
    expect(!strcmp(name, "gone leader\n"), "it is called %s", name);
    expect(code == 7 << 8, "its leader ended with %#x", code);
    int status = status_of(child);
    wait_first = 0;
    int wanted = status_of(without_leader());
    expect(status == wanted, "status %#x instead of %#x", status, wanted);
}

/* Signals that wait for the process, with what goes with them; a handler; descriptors; a timer. */
static volatile int told[4];
static void tell(int number, siginfo_t *info, void *context)
{
    (void)context;
    if (number == SIGUSR1)
        told[0] = info->si_value.sival_int;
    if (number == SIGCHLD)
        told[1] = info->si_pid;
    if (number == SIGALRM)
        told[2]++;
}

static int shared_fd;
static void *with_signals(void *argument)
{
    (void)argument;
    wait_go();
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_UNBLOCK, &all, NULL);
    for (int i = 0; i < 1000 && !told[2]; i++)
        usleep(10000);
    char text[8] = "";
    int right = told[0] == 4711 && told[1] > 0 && waitpid(told[1], NULL, WNOHANG) == told[1] && told[2] &&
                pread(shared_fd, text, 5, 0) == 5 && !strcmp(text, "hello");
    if (!right)
        dprintf(1, "told %d %d %d, read '%s'\n", told[0], told[1], told[2], text);
    _exit(right ? 42 : 1);
}

static void signals(void)
{
    pid_t child = fork();
    if (!child) {
        struct sigaction action = {.sa_sigaction = tell, .sa_flags = SA_SIGINFO};
        int numbers[] = {SIGUSR1, SIGCHLD, SIGALRM};
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_BLOCK, &all, NULL);
        for (int i = 0; i < 3; i++)
            sigaction(numbers[i], &action, NULL);
        sigqueue(getpid(), SIGUSR1, (union sigval){.sival_int = 4711});
        if (!fork())
            _exit(3);
        timer_t timer;
        struct itimerspec in_a_while = {{0, 0}, {1, 0}};
        struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGALRM};
        must(!timer_create(CLOCK_MONOTONIC, &event, &timer));
        must(!timer_settime(timer, 0, &in_a_while, NULL));
        shared_fd = memfd_create("shared", 0);
        must(write(shared_fd, "hello", 5) == 5);
        started(with_signals, NULL);
        end_thread(0);
    }
    until_leader_ended(child);
    frozen();
    int status = status_of(child);
    expect(WIFEXITED(status) && WEXITSTATUS(status) == 42, "status %#x", status);
}

/* Children of such a process that are to be killed at their parent's end, one of them of a thread that lives. */
static void *with_children(void *argument)
{
    int *pids = argument;
    pid_t one = fork();
    if (!one) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;)
            pause();
    }
    pids[1] = one;
    wait_go();
    usleep(300 * 1000);
    int right = kill(pids[0], 0) == 0 && state_of(pids[0]) != 'Z' && kill(pids[1], 0) == 0 && state_of(pids[1]) != 'Z';
    kill(pids[0], SIGTERM);
    int status, got = waitpid(pids[0], &status, 0) == pids[0] && WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM;
    _exit(right && got ? 43 : 1);
}

static void children(void)
{
    int *pids = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pid_t child = fork();
    if (!child) {
        started(with_children, pids);
        while (!*(volatile int *)&pids[1])
            usleep(1000);
        pid_t other = fork();
        if (!other) {
            pid_t leader = getppid();
            until_leader_ended(leader);
            prctl(PR_SET_PDEATHSIG, SIGKILL); /* its parent is the thread that lives by now */
            for (;;)
                pause();
        }
        pids[0] = other;
        end_thread(0);
    }
    until_leader_ended(child);
    usleep(200 * 1000);
    frozen();
    int status = status_of(child);
    expect(WIFEXITED(status) && WEXITSTATUS(status) == 43, "status %#x", status);
}

/* Stopped by job control; many threads of which some end, too; one executes another program. */
static void *until_go(void *argument)
{
    wait_go();
    return argument;
}

static void *finisher(void *argument)
{
    pthread_t *threads = argument;
    wait_go();
    for (int i = 0; i < 20; i++)
        pthread_join(threads[i], NULL);
    _exit(44);
}

static void stopped(void)
{
    pid_t child = fork();
    if (!child) {
        static pthread_t threads[20];
        for (int i = 0; i < 20; i++)
            threads[i] = started(until_go, NULL);
        started(finisher, threads);
        end_thread(1);
    }
    until_leader_ended(child);
    kill(child, SIGSTOP);
    int status;
    must(waitpid(child, &status, WUNTRACED) == child && WIFSTOPPED(status));
    frozen();
    expect(waitpid(child, &status, WNOHANG | WUNTRACED) == 0, "it tells of its stop again, or has ended");
    usleep(200 * 1000);
    kill(child, SIGCONT);
    status = status_of(child);
    expect(WIFEXITED(status) && WEXITSTATUS(status) == 44, "status %#x", status);
}

static void *executes(void *argument)
{
    (void)argument;
    wait_go();
    execl("/bin/sh", "sh", "-c", "read -r pid rest </proc/self/stat; [ $pid = $$ ] && [ $$ = $WANTED ] && exit 45", NULL);
    return NULL;
}

static void exec(void)
{
    pid_t child = fork();
    if (!child) {
        char number[16];
        snprintf(number, sizeof number, "%d", getpid());
        setenv("WANTED", number, 1);
        started(until_go, NULL);
        started(executes, NULL);
        end_thread(1);
    }
    until_leader_ended(child);
    frozen();
    int status = status_of(child);
    expect(WIFEXITED(status) && WEXITSTATUS(status) == 45, "status %#x", status);
}

/* Adjustments of semaphores are undone when the last thread has ended. */
static void *adjuster(void *argument)
{
    struct sembuf up = {0, 3, SEM_UNDO};
    must(!semop(*(int *)argument, &up, 1));
    for (;;)
        if (semctl(*(int *)argument, 1, GETVAL) == 1)
            end_thread(0);
        else
            usleep(10000);
    return NULL;
}

static void semaphores(void)
{
    static int set;
    set = semget(IPC_PRIVATE, 2, 0600);
    must(set >= 0);
    pid_t child = fork();
    if (!child) {
        struct sembuf up = {0, 2, SEM_UNDO};
        must(!semop(set, &up, 1));
        started(adjuster, &set);
        end_thread(0);
    }
    until_leader_ended(child);
    for (int i = 0; i < 1000 && semctl(set, 0, GETVAL) != 5; i++)
        usleep(5000);
    frozen();
    expect(semctl(set, 0, GETVAL) == 5, "the semaphore is %d", semctl(set, 0, GETVAL));
    semctl(set, 1, SETVAL, 1);
    int status = status_of(child);
    expect(status == 0, "status %#x", status);
    expect(semctl(set, 0, GETVAL) == 0, "the semaphore is %d afterwards", semctl(set, 0, GETVAL));
    semctl(set, 0, IPC_RMID);
}

/* The program itself, in a pod of its own the first process: it is looked into, and ends by its last thread. */
static void *verifies(void *argument)
{
    (void)argument;
    until_leader_ended(getpid());
    frozen();
    expect(state_of(getpid()) == 'Z', "the leader's state is %c", state_of(getpid()));
    DIR *directory = opendir("/proc/thread-self/fd");
    expect(directory != NULL, "no /proc/thread-self/fd");
    pid_t child = fork();
    if (!child)
        _exit(9);
    int status = status_of(child);
    expect(WIFEXITED(status) && WEXITSTATUS(status) == 9, "status %#x of a child", status);
    if (!failures)
        dprintf(1, "OK\n");
    end_thread(failures != 0);
    return NULL;
}

static void itself(void)
{
    started(verifies, NULL);
    pthread_exit(NULL); /* exit code 0: the leader's */
}

const struct test_case cases[] = {{"exit_code", exit_code},   {"signals", signals},       {"children", children},
                                  {"stopped", stopped},       {"exec", exec},             {"semaphores", semaphores},
                                  {"itself", itself},         {NULL, NULL}};
