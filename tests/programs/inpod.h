/* The frame of the self-verifying programs in C; the same as inpod.py.
 *
 *   program CASE     sets the object up, prints READY, waits for the file $PT_DIR/go,
 *                    verifies, prints OK or BAD lines, exits with 0 or 1
 *   program --list   the names of its cases
 */
#ifndef INPOD_H
#define INPOD_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

struct test_case {
    const char *name;
    void (*run)(void);
};
extern const struct test_case cases[];

static volatile int failures;
static char go_file[512];

__attribute__((unused, format(printf, 1, 2))) static void bad(const char *format, ...)
{
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    dprintf(1, "BAD pid %d: %s\n", getpid(), text);
    failures++;
}

#define expect(condition, ...)                                                                     \
    do {                                                                                           \
        if (!(condition))                                                                          \
            bad(__VA_ARGS__);                                                                      \
    } while (0)

/* A step of the set-up that must work, for the rest to mean anything. */
#define must(condition)                                                                            \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            bad("set-up, line %d: %s: %s", __LINE__, #condition, strerror(errno));                 \
            exit(2);                                                                               \
        }                                                                                          \
    } while (0)

__attribute__((unused)) static int go(void)
{
    return access(go_file, F_OK) == 0;
}

__attribute__((unused)) static void say_ready(void)
{
    dprintf(1, "READY\n");
}

__attribute__((unused)) static void wait_go(void)
{
    struct timespec pause = {0, 20 * 1000 * 1000};
    while (!go())
        nanosleep(&pause, NULL);
}

__attribute__((unused)) static void frozen(void)
{
    say_ready();
    wait_go();
}

int main(int argc, char **argv)
{
    const char *directory = getenv("PT_DIR") ? getenv("PT_DIR") : "/var/tmp/podtest";
    const char *name = argc > 1 ? argv[1] : "";
    mkdir(directory, 0755);
    free(malloc(1000)); /* the heap exists from now on: no case sees it appear */
    if (chdir(directory)) {
        perror(directory);
        return 2;
    }
    snprintf(go_file, sizeof go_file, "%s/go", directory);
    for (const struct test_case *one = cases; one->name; one++) {
        if (!strcmp(name, "--list")) {
            puts(one->name);
        } else if (!strcmp(name, one->name)) {
            one->run();
            if (!failures)
                dprintf(1, "OK\n");
            return failures ? 1 : 0;
        }
    }
    return strcmp(name, "--list") ? 2 : 0;
}
#endif
