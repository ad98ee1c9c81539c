/* Tables in common: processes that share memory, descriptors, directories, signal actions or adjustments of semaphores
 * with the one that made them (clone(2)), and threads that have descriptors or directories for themselves. */
#include "inpod.h"
#include <linux/sched.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sem.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#define STACK (256 * 1024)

/* What tasks tell each other, in memory that all of them have. */
static struct {
    volatile int step, done, value;
    volatile pid_t pids[4];
} *board;

static void new_board(void)
{
    board = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    must(board != MAP_FAILED);
}

static pid_t made(int (*body)(void *), void *argument, int flags)
{
    char *stack = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(stack != MAP_FAILED);
    pid_t pid = clone(body, stack + STACK, flags, argument);
    must(pid > 0);
    return pid;
}

static void until(volatile int *place, int value)
{
    while (*place < value)
        usleep(2000);
}

static void reaped(pid_t pid)
{
    int status = -1;
    expect(waitpid(pid, &status, __WALL) == pid && status == 0, "child %d: status %#x", pid, status);
}

static volatile int private_value;
static void handler(int number)
{
    private_value += number;
}

/* A child that has everything in common: each does something, and the other sees it. */
static int changes_all(void *unused)
{
    (void)unused;
    board->done = 1;
    until(&board->step, 1);
    private_value = 4711;
    mkdir("elsewhere", 0755);
    int moved = chdir("elsewhere");
    umask(0137);
    int fd = open("file", O_RDWR | O_CREAT | O_TRUNC, 0600);
    int told = write(fd, "hello", 5) == 5;
    signal(SIGUSR2, handler);
    board->value = fd;
    board->done = 2;
    until(&board->step, 2);
    _exit(!(moved == 0 && told && fcntl(fd, F_GETFD) < 0 && private_value == 4712));
}

static void everything(void)
{
    new_board();
    private_value = 1;
    pid_t pid = made(changes_all, NULL, CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_SYSVSEM | SIGCHLD);
    until(&board->done, 1);
    frozen();
    board->step = 1;
    until(&board->done, 2);
    char text[16] = "", place[512];
    struct sigaction action;
    expect(private_value == 4711, "the value in memory is %d", private_value);
    expect(getcwd(place, sizeof place) && strstr(place, "/elsewhere"), "the directory is %s", place);
    expect(umask(022) == 0137, "the umask is another");
    expect(pread(board->value, text, 5, 0) == 5 && !strcmp(text, "hello"), "descriptor %d gave '%s'", board->value, text);
    expect(!sigaction(SIGUSR2, NULL, &action) && action.sa_handler == handler, "the signal action is another");
    close(board->value);
    private_value++;
    board->step = 2;
    reaped(pid);
}

/* Three generations: the child shares with the parent what the grandchild doesn't, and the other way round. */
static int grandchild(void *unused)
{
    (void)unused;
    board->done = 2;
    until(&board->step, 1);
    private_value = 7; /* of the child's memory */
    close(77);         /* its own */
    int wrong = chdir("deeper") != 0;
    board->done = 3;
    _exit(wrong);
}

static int middle(void *unused)
{
    (void)unused;
    private_value = 5;
    pid_t pid = made(grandchild, NULL, CLONE_VM | CLONE_FS | SIGCHLD);
    until(&board->done, 2);
    until(&board->step, 1);
    int status = -1;
    int ended = waitpid(pid, &status, 0) == pid && status == 0;
    char place[512];
    int seen = private_value == 7 && fcntl(77, F_GETFD) >= 0 && getcwd(place, sizeof place) && strstr(place, "/deeper");
    close(77); /* the parent's, too */
    _exit(!(ended && seen));
}

static void generations(void)
{
    new_board();
    private_value = 1;
    mkdir("deeper", 0755);
    must(dup2(1, 77) == 77);
    pid_t pid = made(middle, NULL, CLONE_FILES | CLONE_FS | SIGCHLD);
    until(&board->done, 2);
    frozen();
    expect(fcntl(77, F_GETFD) >= 0, "descriptor 77 is gone");
    board->step = 1;
    reaped(pid);
    char place[512];
    expect(private_value == 1, "the value in memory is %d", private_value);
    expect(fcntl(77, F_GETFD) < 0, "descriptor 77 is still there");
    expect(getcwd(place, sizeof place) && strstr(place, "/deeper"), "the directory is %s", place);
}

/* Several children over one memory, with descriptors and handlers of their own, locks among them, at full speed. */
static volatile struct {
    long count;
    char pad[4096 - sizeof(long)];
} counts[3];

static int counts_on(void *argument)
{
    long which = (long)argument;
    int fd = open("locked", O_RDWR | O_CREAT, 0600);
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = which, .l_len = 1};
    if (fd < 0 || fcntl(fd, F_SETLK, &lock))
        _exit(2);
    signal(SIGUSR1, handler);
    board->pids[which] = fd;
    while (!board->step)
        counts[which].count++;
    lock.l_start = (which + 1) % 3;
    int wrong = fcntl(fd, F_GETLK, &lock) || lock.l_type != F_WRLCK;
    __sync_fetch_and_add(&board->done, 1);
    until(&board->step, 2);
    _exit(wrong);
}

static void busy(void)
{
    pid_t pids[3];
    new_board();
    for (long i = 0; i < 3; i++)
        pids[i] = made(counts_on, (void *)i, CLONE_VM | SIGCHLD);
    for (int i = 0; i < 3; i++)
        until(&board->pids[i], 1);
    say_ready();
    long before[3] = {0};
    while (!go()) {
        for (int i = 0; i < 3; i++) {
            expect(counts[i].count >= before[i], "count %d went back from %ld to %ld", i, before[i], counts[i].count);
            before[i] = counts[i].count;
        }
        usleep(5000);
    }
    board->step = 1;
    until(&board->done, 3);
    board->step = 2;
    for (int i = 0; i < 3; i++)
        reaped(pids[i]);
    struct sigaction action;
    expect(!sigaction(SIGUSR1, NULL, &action) && action.sa_handler == SIG_DFL, "a child's signal action is the parent's");
}

/* Sharers that execute a program, or end, when they go on; their parent keeps what it has. */
static int executes(void *unused)
{
    (void)unused;
    board->done = 1;
    until(&board->step, 1);
    execl("/bin/sh", "sh", "-c", "[ -e /proc/self/fd/78 ] && [ ! -e /proc/self/fd/79 ] && exit 0", NULL);
    _exit(9);
}

static void exec(void)
{
    new_board();
    must(dup2(1, 78) == 78 && dup3(1, 79, O_CLOEXEC) == 79);
    pid_t pid = made(executes, NULL, CLONE_VM | CLONE_FILES | CLONE_FS | CLONE_SIGHAND | SIGCHLD);
    until(&board->done, 1);
    frozen();
    board->step = 1;
    reaped(pid);
    expect(fcntl(79, F_GETFD) >= 0, "descriptor 79 is gone from the parent");
}

/* Adjustments in common are made when the last has ended; a thread's own when that ends. */
static int adjusts(void *set)
{
    struct sembuf up = {0, 2, SEM_UNDO};
    must(!semop(*(int *)set, &up, 1));
    board->done = 1;
    until(&board->step, 1);
    _exit(0);
}

static int adjusts_alone(void *set)
{
    struct sembuf up = {1, 5, SEM_UNDO};
    must(!semop(*(int *)set, &up, 1));
    board->value = 1;
    until(&board->step, 1);
    syscall(SYS_exit, 0);
    return 0;
}

static void semaphores(void)
{
    int set = semget(IPC_PRIVATE, 2, 0600);
    must(set >= 0);
    new_board();
    pid_t starter = fork();
    if (!starter) {
        struct sembuf up = {0, 1, SEM_UNDO};
        must(!semop(set, &up, 1));
        made(adjusts_alone, &set, CLONE_VM | CLONE_SIGHAND | CLONE_THREAD | CLONE_FILES | CLONE_FS);
        pid_t pid = made(adjusts, &set, CLONE_SYSVSEM | SIGCHLD);
        until(&board->step, 1);
        int status;
        waitpid(pid, &status, 0);
        until(&board->step, 2);
        _exit(status != 0);
    }
    until(&board->done, 1);
    until(&board->value, 1);
    frozen();
    expect(semctl(set, 0, GETVAL) == 3 && semctl(set, 1, GETVAL) == 5, "the semaphores are %d and %d",
           semctl(set, 0, GETVAL), semctl(set, 1, GETVAL));
    board->step = 1;
    for (int i = 0; i < 1000 && semctl(set, 1, GETVAL); i++)
        usleep(5000);
    expect(semctl(set, 1, GETVAL) == 0, "the thread's semaphore is %d", semctl(set, 1, GETVAL));
    usleep(100 * 1000);
    expect(semctl(set, 0, GETVAL) == 3, "the semaphore is %d when one of two has ended", semctl(set, 0, GETVAL));
    board->step = 2;
    reaped(starter);
    expect(semctl(set, 0, GETVAL) == 0, "the semaphore is %d in the end", semctl(set, 0, GETVAL));
    semctl(set, 0, IPC_RMID);
}

/* Threads with directories and descriptors for themselves. */
static void *wanders(void *unused)
{
    (void)unused;
    must(!unshare(CLONE_FS));
    mkdir("threads", 0755);
    must(!chdir("threads"));
    umask(0111);
    board->done = 1;
    until(&board->step, 1);
    char place[512];
    int right = getcwd(place, sizeof place) && strstr(place, "/threads") && umask(0) == 0111;
    return (void *)(intptr_t)(right ? 1 : 0);
}

static void own_directories(void)
{
    new_board();
    umask(027);
    char before[512], after[512];
    must(getcwd(before, sizeof before) != NULL);
    pthread_t thread;
    must(!pthread_create(&thread, NULL, wanders, NULL));
    until(&board->done, 1);
    frozen();
    expect(getcwd(after, sizeof after) && !strcmp(before, after), "the directory is %s", after);
    board->step = 1;
    void *right = NULL;
    pthread_join(thread, &right);
    expect(right, "the thread is elsewhere");
    expect(umask(022) == 027, "the umask is another");
}

static int pipes[2], common;
static void *has_descriptors(void *unused)
{
    (void)unused;
    must(!unshare(CLONE_FILES));
    int alone = open("alone", O_RDWR | O_CREAT | O_TRUNC, 0600);
    must(alone >= 0 && dup2(alone, 500) == 500 && !close(alone) && write(500, "0123456789", 10) == 10);
    must(lseek(500, 4, SEEK_SET) == 4 && !flock(500, LOCK_EX));
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 3, .l_len = 4};
    must(!fcntl(500, F_SETLK, &lock));
    sigset_t usr1;
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    int watch = epoll_create1(0), told = signalfd(-1, &usr1, 0);
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = 99};
    must(!epoll_ctl(watch, EPOLL_CTL_ADD, told, &event));
    fcntl(500, F_SETOWN, getpid());
    must(!close(pipes[1])); /* stays open in the others */
    board->done = 1;
    until(&board->step, 1);
    char text[8] = "";
    int right = fcntl(pipes[1], F_GETFD) < 0 && read(500, text, 3) == 3 && !strcmp(text, "456");
    syscall(SYS_tgkill, getpid(), gettid(), SIGUSR1);
    right &= epoll_wait(watch, &event, 1, 5000) == 1 && event.data.u64 == 99;
    right &= fcntl(500, F_GETOWN) == getpid() && fcntl(common, F_GETFD) >= 0 && lseek(common, 0, SEEK_CUR) == 6;
    board->done = 2;
    until(&board->step, 2);
    return (void *)(intptr_t)right;
}

static void own_descriptors(void)
{
    new_board();
    sigset_t usr1;
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    sigprocmask(SIG_BLOCK, &usr1, NULL);
    common = open("common", O_RDWR | O_CREAT | O_TRUNC, 0600);
    must(common >= 0 && write(common, "common", 6) == 6 && !pipe(pipes));
    pthread_t thread;
    must(!pthread_create(&thread, NULL, has_descriptors, NULL));
    until(&board->done, 1);
    frozen();
    expect(fcntl(500, F_GETFD) < 0, "the thread's descriptor is open in the process");
    expect(write(pipes[1], "x", 1) == 1, "the pipe's end is closed");
    board->step = 1;
    until(&board->done, 2);
    int file = open("alone", O_RDWR);
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 0};
    expect(!fcntl(file, F_GETLK, &lock) && lock.l_type == F_WRLCK && lock.l_start == 3 && lock.l_len == 4,
           "the thread's lock is %d at %ld of %ld", lock.l_type, (long)lock.l_start, (long)lock.l_len);
    expect(flock(file, LOCK_EX | LOCK_NB) < 0, "the thread's file isn't locked");
    board->step = 2;
    void *right = NULL;
    pthread_join(thread, &right);
    expect(right, "the thread's descriptors aren't what they were");
}

/* Shared with one that isn't the parent: refused. */
static int makes_sibling(void *unused)
{
    (void)unused;
    pid_t sibling = syscall(SYS_clone, CLONE_FILES | CLONE_PARENT | SIGCHLD, 0, 0, 0, 0);
    if (sibling)
        board->pids[1] = sibling;
    wait_go();
    _exit(0);
}

static void siblings(void)
{
    new_board();
    pid_t pid = made(makes_sibling, NULL, SIGCHLD);
    while (!board->pids[1])
        usleep(1000);
    frozen();
    reaped(pid);
    waitpid(board->pids[1], NULL, 0);
}

const struct test_case cases[] = {{"everything", everything},
                                  {"generations", generations},
                                  {"busy", busy},
                                  {"exec", exec},
                                  {"semaphores", semaphores},
                                  {"own_directories", own_directories},
                                  {"own_descriptors", own_descriptors},
                                  {"siblings", siblings},
                                  {NULL, NULL}};
