/* Mappings of every kind: what is in them, what is beside them, how they behave when used further.
 *
 * Each case makes its mappings, is frozen, and then compares contents, the lines of /proc/self/maps that are
 * its own, and what madvise, mremap, mprotect, fork and growth do to them. */
#include "inpod.h"
#include <signal.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/shm.h>
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#define PAGE 4096L
#define MB (1L << 20)

static char *map(size_t size, int protection, int flags, int fd, off_t offset)
{
    char *area = mmap(NULL, size, protection, flags, fd, offset);
    must(area != MAP_FAILED);
    return area;
}

static char *anonymous(size_t size)
{
    return map(size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

/* Content that says where it belongs: word i of an area with this seed. */
static void fill(char *area, size_t size, uint64_t seed)
{
    for (size_t i = 0; i < size / 8; i++)
        ((uint64_t *)area)[i] = (seed + i) * 0x9e3779b97f4a7c15u;
}

static void check(const char *what, const char *area, size_t size, uint64_t seed)
{
    for (size_t i = 0; i < size / 8; i++)
        if (((const uint64_t *)area)[i] != (seed + i) * 0x9e3779b97f4a7c15u) {
            bad("%s: word %zu of %zu is %#lx", what, i, size / 8, ((const uint64_t *)area)[i]);
            return;
        }
}

static void check_zero(const char *what, const char *area, size_t size)
{
    for (size_t i = 0; i < size; i++)
        if (area[i]) {
            bad("%s: byte %zu of %zu is %#x, not zero", what, i, size, (unsigned char)area[i]);
            return;
        }
}

/* The lines of /proc/self/maps, without device and inode numbers, which differ from life to life. */
static char *read_maps(void)
{
    static char text[1 << 18], kept[2][1 << 18];
    static int turn;
    char *into = kept[turn++ % 2];
    int fd = open("/proc/self/maps", O_RDONLY);
    long length = 0, got;
    while ((got = read(fd, text + length, sizeof text - 1 - length)) > 0)
        length += got;
    close(fd);
    text[length] = 0;
    length = 0;
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
        char range[64], bits[8], offset[32], name[256] = "";
        sscanf(line, "%63s %7s %31s %*s %*s %255[^\n]", range, bits, offset, name);
        length += sprintf(into + length, "%s %s %s %s\n", range, bits, offset, name);
    }
    return into;
}

static void compare_maps(const char *before, const char *after)
{
    if (!strcmp(before, after))
        return;
    char line_before[512], line_after[512];
    while (*before && *after) {
        sscanf(before, "%511[^\n]", line_before);
        sscanf(after, "%511[^\n]", line_after);
        if (strcmp(line_before, line_after)) {
            bad("/proc/self/maps: \"%s\" instead of \"%s\"", line_after, line_before);
            return;
        }
        before += strlen(line_before) + 1, after += strlen(line_after) + 1;
    }
    bad("/proc/self/maps: lines missing or too many: \"%.300s\" instead of \"%.300s\"", after, before);
}

static char *vm_flags(const void *address)
{
    static char text[2][512];
    static int turn;
    char *found = text[turn++ % 2], line[512];
    FILE *smaps = fopen("/proc/self/smaps", "r");
    unsigned long start, end;
    int inside = 0;
    found[0] = 0;
    while (fgets(line, sizeof line, smaps)) {
        if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
            inside = start <= (unsigned long)address && (unsigned long)address < end;
        if (inside && !strncmp(line, "VmFlags:", 8))
            strcpy(found, line);
    }
    fclose(smaps);
    /* sd, uw and um are bookkeeping: soft-dirty and userfaultfd */
    for (char *flag = found; (flag = strstr(flag, " ")) && flag[1]; flag++)
        if (!strncmp(flag, " sd", 3) || !strncmp(flag, " uw", 3) || !strncmp(flag, " um", 3))
            memmove(flag, flag + 3, strlen(flag + 3) + 1), flag--;
    return found;
}

static void private_anonymous(void)
{
    char *full = anonymous(4 * MB), *half = anonymous(4 * MB), *empty = anonymous(64 * MB);
    fill(full, 4 * MB, 1);
    for (int i = 0; i < 1024; i += 2)
        fill(half + i * PAGE, PAGE, i);
    volatile char sum = 0;
    for (long at = 0; at < MB; at += PAGE)
        sum += empty[at]; /* read only: the zero page */
    char *before = read_maps();
    frozen();
    compare_maps(before, read_maps());
    check("full", full, 4 * MB, 1);
    for (int i = 0; i < 1024; i++)
        if (i % 2)
            check_zero("half: untouched page", half + i * PAGE, PAGE);
        else
            check("half: page", half + i * PAGE, PAGE, i);
    check_zero("empty", empty, 64 * MB);
}

static void dont_need(void)
{
    char *area = anonymous(8 * MB);
    fill(area, 8 * MB, 2);
    madvise(area + MB, MB, MADV_DONTNEED);
    frozen();
    check_zero("dropped before", area + MB, MB);
    check("kept", area, MB, 2);
    check("kept behind", area + 2 * MB, 6 * MB, 2 + 2 * MB / 8);
    must(!madvise(area + 3 * MB, MB, MADV_DONTNEED));
    check_zero("dropped after", area + 3 * MB, MB);
    must(!madvise(area, 8 * MB, MADV_DONTNEED));
    check_zero("all dropped", area, 8 * MB);
    fill(area, 8 * MB, 3);
    check("written again", area, 8 * MB, 3);
}

static void lazy_free(void)
{
    char *area = anonymous(8 * MB);
    fill(area, 8 * MB, 4);
    must(!madvise(area, MB, MADV_FREE));
    frozen();
    for (long at = 0; at < MB; at += PAGE) { /* either still there or zero, page by page */
        if (*(uint64_t *)(area + at))
            check("lazily freed page", area + at, PAGE, 4 + at / 8);
        else
            check_zero("lazily freed page", area + at, PAGE);
    }
    check("kept", area + MB, 7 * MB, 4 + MB / 8);
    must(!madvise(area + 4 * MB, MB, MADV_FREE));
    fill(area + 4 * MB, MB, 5);
    check("written after being freed", area + 4 * MB, MB, 5);
}

static void remapped(void)
{
    char *area = anonymous(4 * MB), *target = anonymous(16 * MB), *later = anonymous(2 * MB);
    fill(area, 4 * MB, 6);
    fill(later, 2 * MB, 7);
    char *moved = mremap(area, 4 * MB, 8 * MB, MREMAP_MAYMOVE | MREMAP_FIXED, target + 4 * MB);
    must(moved == target + 4 * MB);
    frozen();
    check("moved", moved, 4 * MB, 6);
    check_zero("grown", moved + 4 * MB, 4 * MB);
    char *grown = mremap(later, 2 * MB, 32 * MB, MREMAP_MAYMOVE);
    must(grown != MAP_FAILED);
    check("moved after", grown, 2 * MB, 7);
    check_zero("grown after", grown + 2 * MB, 30 * MB);
    char *again = mremap(moved, 8 * MB, 6 * MB, 0);
    must(again == moved);
    again = mremap(moved, 6 * MB, 24 * MB, MREMAP_MAYMOVE);
    must(again != MAP_FAILED);
    check("grown twice", again, 4 * MB, 6);
    check_zero("grown twice, tail", again + 4 * MB, 20 * MB);
#ifdef MREMAP_DONTUNMAP
    char *emptied = mremap(again, MB, MB, MREMAP_MAYMOVE | MREMAP_DONTUNMAP);
    if (emptied != MAP_FAILED) {
        check("taken out", emptied, MB, 6);
        check_zero("left empty", again, MB);
    }
#endif
}

static void unmapped_and_mapped_anew(void)
{
    char *area = anonymous(16 * MB);
    fill(area, 16 * MB, 8);
    munmap(area + 4 * MB, MB);
    frozen();
    munmap(area, 4 * MB);
    char *fresh = mmap(area, 5 * MB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    must(fresh == area);
    check_zero("mapped anew", fresh, 5 * MB);
    check("kept", area + 5 * MB, 11 * MB, 8 + 5 * MB / 8);
    fresh = mmap(area + 8 * MB, MB, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    check_zero("mapped over", fresh, MB);
}

static void shared_anonymous(void)
{
    char *area = map(8 * MB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    char *part = map(4 * MB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    fill(area, 4 * MB, 9);
    fill(part, 4 * MB, 10);
    munmap(part, MB); /* the rest begins in the middle of the object */
    pid_t child = fork();
    if (!child) {
        mprotect(part + 2 * MB, MB, PROT_READ);
        wait_go();
        check("child: shared", area, 4 * MB, 9);
        fill(area + 6 * MB, MB, 11);
        _exit(failures != 0);
    }
    frozen();
    int status;
    waitpid(child, &status, 0);
    expect(status == 0, "child ended with %#x", status);
    check("shared", area, 4 * MB, 9);
    check_zero("never written", area + 4 * MB, 2 * MB);
    check("written by the child", area + 6 * MB, MB, 11);
    check("the rest of a part", part + MB, 3 * MB, 10 + MB / 8);
    must(!madvise(area, MB, MADV_DONTNEED)); /* shared: the content stays */
    check("shared, after DONTNEED", area, MB, 9);
    must(!madvise(area, MB, MADV_REMOVE)); /* and this makes a hole */
    check_zero("hole", area, MB);
}

static void file_private(void)
{
    int fd = open("private", O_RDWR | O_CREAT, 0644);
    static char block[8 * MB];
    fill(block, sizeof block, 12);
    must(write(fd, block, sizeof block) == sizeof block);
    char *area = map(8 * MB, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    char *tail = map(2 * MB, PROT_READ, MAP_PRIVATE, fd, 6 * MB);
    char *beyond = map(4 * MB, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 7 * MB); /* three quarters past the end */
    close(fd);
    fill(area + 2 * MB, MB, 13);
    fill(area + 3 * MB, PAGE, 14);
    char *before = read_maps();
    frozen();
    compare_maps(before, read_maps());
    check("clean", area, 2 * MB, 12);
    check("written", area + 2 * MB, MB, 13);
    check("one page", area + 3 * MB, PAGE, 14);
    check("clean tail", tail, 2 * MB, 12 + 6 * MB / 8);
    check("before the end", beyond, MB, 12 + 7 * MB / 8);
    must(!madvise(area + 2 * MB, MB, MADV_DONTNEED)); /* a file mapping: the file's content comes back */
    check("dropped to the file", area + 2 * MB, MB, 12 + 2 * MB / 8);
    fd = open("private", O_RDWR);
    must(pwrite(fd, "changed!", 8, 0) == 8);
    expect(!memcmp(area, "changed!", 8), "a clean page does not follow the file");
    fill(block, PAGE, 15);
    must(pwrite(fd, block, PAGE, 3 * MB) == PAGE);
    check("a written page stays", area + 3 * MB, PAGE, 14);
}

static void file_shared(void)
{
    int fd = open("shared", O_RDWR | O_CREAT, 0644);
    must(!ftruncate(fd, 8 * MB));
    char *area = map(8 * MB, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    char *second = map(MB, PROT_READ, MAP_SHARED, fd, 4 * MB);
    fill(area, 8 * MB, 16);
    pid_t child = fork();
    if (!child) {
        wait_go();
        fill(area + 4 * MB, MB, 17);
        _exit(0);
    }
    char *before = read_maps();
    frozen();
    compare_maps(before, read_maps());
    waitpid(child, NULL, 0);
    check("through the second mapping", second, MB, 17);
    check("the rest", area, 4 * MB, 16);
    static char block[8 * MB];
    int again = open("shared", O_RDONLY);
    must(read(again, block, sizeof block) == sizeof block);
    expect(!memcmp(block, area, sizeof block), "the file and the mapping differ");
}

/* System V shared memory, attached whole, read-only, and with holes, other rights and other things in between. */
static void attached_segments(void)
{
    int id = shmget(IPC_PRIVATE, 8 * MB, IPC_CREAT | 0600);
    must(id >= 0);
    char *whole = shmat(id, NULL, 0), *parts = shmat(id, NULL, 0);
    const char *reading = shmat(id, NULL, SHM_RDONLY);
    must(whole != (void *)-1 && parts != (void *)-1 && reading != (void *)-1);
    fill(whole, 8 * MB, 60);
    must(!munmap(parts, MB));
    must(!munmap(parts + 3 * MB, MB));
    must(mmap(parts + 3 * MB, MB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED);
    fill(parts + 3 * MB, MB, 61);
    must(!mprotect(parts + 5 * MB, MB, PROT_READ));
    must(!munmap(parts + 7 * MB + 4096, MB - 4096));
    int named = open("/SYSV00000000", O_RDWR | O_CREAT, 0600); /* only called as segments are in /proc/PID/maps */
    must(!ftruncate(named, MB));
    char *file = map(MB, PROT_READ | PROT_WRITE, MAP_SHARED, named, 0);
    fill(file, MB, 62);
    struct shmid_ds before, after;
    must(!shmctl(id, IPC_STAT, &before));
    pid_t child = fork();
    if (!child) {
        wait_go();
        fill(whole + 2 * MB, MB, 63);
        _exit(0);
    }
    char *maps = read_maps();
    frozen();
    compare_maps(maps, read_maps());
    waitpid(child, NULL, 0);
    must(!shmctl(id, IPC_STAT, &after));
    expect(after.shm_nattch == before.shm_nattch, "%lu attachments instead of %lu", (unsigned long)after.shm_nattch,
           (unsigned long)before.shm_nattch);
    fill(whole + 4 * MB, MB, 64);
    check("a part, by the child", parts + 2 * MB, MB, 63);
    check("a part, by the other mapping", parts + 4 * MB, MB, 64);
    check("a page of the last part", parts + 7 * MB, 4096, 60 + 7 * (MB / 8));
    check("what lies in between", parts + 3 * MB, MB, 61);
    check("a file with such a name", file, MB, 62);
    expect(!memcmp(reading, whole, 8 * MB), "the attachment for reading differs");
    must(!mprotect(parts + 5 * MB, MB, PROT_READ | PROT_WRITE));
    fill(parts + 5 * MB, MB, 65);
    check("a part that was read-only", (char *)reading + 5 * MB, MB, 65);
    expect(mprotect((char *)reading, MB, PROT_READ | PROT_WRITE) && errno == EACCES, "attached for reading");
    must(!shmdt(parts));
    must(!msync(parts + 3 * MB, MB, MS_ASYNC));
    expect(msync(parts + 2 * MB, MB, MS_ASYNC) && errno == ENOMEM, "shmdt has left a part");
    must(!unlink("/SYSV00000000"));
    must(!shmctl(id, IPC_RMID, NULL));
}

static void file_deleted(void)
{
    int fd = open("deleted", O_RDWR | O_CREAT, 0644);
    must(!ftruncate(fd, 4 * MB));
    char *shared = map(4 * MB, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    char *private = map(4 * MB, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    fill(shared, 4 * MB, 18);
    fill(private + MB, MB, 19);
    close(fd);
    unlink("deleted");
    pid_t child = fork();
    if (!child) {
        wait_go();
        fill(shared, MB, 20);
        fill(private, MB, 21); /* its own */
        _exit(0);
    }
    frozen();
    waitpid(child, NULL, 0);
    check("shared, by the child", shared, MB, 20);
    check("shared, the rest", shared + MB, 3 * MB, 18 + MB / 8);
    check("private, clean, sees it", private, MB, 20);
    check("private, written", private + MB, MB, 19);
    check("private, clean", private + 2 * MB, 2 * MB, 18 + 2 * MB / 8);
    expect(access("deleted", F_OK), "the file has a name again");
}

static void memory_file(void)
{
    int fd = memfd_create("mapped", 0);
    must(!ftruncate(fd, 4 * MB));
    char *shared = map(4 * MB, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    char *private = map(2 * MB, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, MB);
    fill(shared, 4 * MB, 22);
    fill(private, PAGE, 23);
    frozen();
    check("shared", shared, 4 * MB, 22);
    check("private, written", private, PAGE, 23);
    check("private, clean", private + PAGE, 2 * MB - PAGE, 22 + (MB + PAGE) / 8);
    must(pwrite(fd, "through the descriptor!!", 24, 0) == 24);
    expect(!memcmp(shared, "through the descriptor", 22), "descriptor and mapping are two files");
    must(!ftruncate(fd, 8 * MB));
    char *more = map(4 * MB, PROT_READ, MAP_SHARED, fd, 4 * MB);
    check_zero("grown", more, 4 * MB);
}

static sigjmp_buf escape;
static void on_fault(int number)
{
    siglongjmp(escape, number);
}

static int fault(volatile char *address, int writing)
{
    int number = sigsetjmp(escape, 1);
    if (!number) {
        if (writing)
            *address = 1;
        else
            (void)*address;
    }
    return number;
}

static void protections(void)
{
    char *area = anonymous(16 * PAGE);
    fill(area, 16 * PAGE, 24);
    int kinds[] = {PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_EXEC, PROT_EXEC, PROT_WRITE};
    for (int i = 0; i < 6; i++)
        must(!mprotect(area + 2 * i * PAGE, PAGE, kinds[i]));
    signal(SIGSEGV, on_fault);
    signal(SIGBUS, on_fault);
    char *before = read_maps();
    frozen();
    compare_maps(before, read_maps());
    for (int i = 0; i < 6; i++) {
        expect((fault(area + 2 * i * PAGE, 1) != 0) == !(kinds[i] & PROT_WRITE), "writing, protection %d", kinds[i]);
        must(!mprotect(area + 2 * i * PAGE, PAGE, PROT_READ | PROT_WRITE));
        check("protected page", area + 2 * i * PAGE + 8, PAGE - 8, 24 + 2 * i * PAGE / 8 + 1);
    }
}

static void past_the_end(void)
{
    int fd = open("short", O_RDWR | O_CREAT, 0644);
    must(!ftruncate(fd, 2 * PAGE));
    char *area = map(4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    area[0] = 'x';
    signal(SIGBUS, on_fault);
    frozen();
    expect(area[0] == 'x', "content");
    expect(fault(area + 3 * PAGE, 0) == SIGBUS, "reading past the end of the file gave no SIGBUS");
    must(!ftruncate(fd, 4 * PAGE));
    expect(fault(area + 3 * PAGE, 1) == 0, "writing after the file grew");
}

static void growing_stack(void)
{
    char *area = mmap(NULL, 64 * MB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    munmap(area, 64 * MB);
    char *low = mmap(area + 60 * MB, MB, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED, -1, 0);
    must(low == area + 60 * MB);
    fill(low, MB, 25);
    signal(SIGSEGV, on_fault);
    frozen();
    check("content", low, MB, 25);
    for (long below = PAGE; below <= 16 * PAGE; below += PAGE)
        expect(fault(low - below, 1) == 0, "it does not grow any more, %ld bytes below", below);
    expect(strstr(vm_flags(low), " gd"), "flags: %s", vm_flags(low));
}

static int recurse(int depth)
{
    volatile char frame[8192];
    frame[0] = depth;
    return depth ? recurse(depth - 1) + (frame[0] != (char)depth) : 0;
}

static void main_stack(void)
{
    char text[] = "on the stack";
    frozen();
    expect(!strcmp(text, "on the stack"), "content");
    expect(recurse(700) == 0, "recursion"); /* 5.6 MB deeper: the stack grows on its own */
}

static void program_break(void)
{
    char *low = sbrk(4 * MB);
    must(low != (void *)-1);
    fill(low, 4 * MB, 26);
    char *top = sbrk(0);
    frozen();
    expect(sbrk(0) == top, "brk %p instead of %p", sbrk(0), (void *)top);
    check("heap", low, 4 * MB, 26);
    char *more = sbrk(8 * MB);
    must(more == top);
    check_zero("grown", more, 8 * MB);
    fill(more, 8 * MB, 27);
    must(sbrk(-10 * MB) != (void *)-1);
    must(sbrk(10 * MB) != (void *)-1);
    check_zero("shrunk and grown", low + 2 * MB, 10 * MB);
    check("below", low, 2 * MB, 26);
    char *block = malloc(100000);
    must(block);
    free(block);
}

static void advice(void)
{
    char *area = anonymous(64 * MB);
    char *aligned = (char *)(((uintptr_t)area + 4 * MB - 1) & ~(4 * MB - 1));
    int kinds[] = {MADV_DONTFORK, MADV_DONTDUMP, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_WIPEONFORK, MADV_SEQUENTIAL,
                   MADV_RANDOM,   MADV_MERGEABLE};
    enum { KINDS = sizeof kinds / sizeof *kinds };
    char flags[KINDS][512];
    for (int i = 0; i < KINDS; i++) {
        fill(aligned + i * 4 * MB, 2 * MB, 30 + i);
        madvise(aligned + i * 4 * MB, 2 * MB, kinds[i]);
    }
    mlock2(aligned + 40 * MB, PAGE, MLOCK_ONFAULT);
    for (int i = 0; i < KINDS; i++)
        strcpy(flags[i], vm_flags(aligned + i * 4 * MB));
    frozen();
    for (int i = 0; i < KINDS; i++) {
        char *now = vm_flags(aligned + i * 4 * MB);
        expect(!strcmp(now, flags[i]), "advice %d: %s instead of %s", kinds[i], now, flags[i]);
        check("content", aligned + i * 4 * MB, 2 * MB, 30 + i);
    }
    pid_t child = fork();
    if (!child) {
        check_zero("wiped on fork", aligned + 4 * 4 * MB, 2 * MB);
        signal(SIGSEGV, on_fault);
        expect(fault(aligned, 0) == SIGSEGV, "a child has what was not to be forked");
        _exit(failures != 0);
    }
    int status;
    waitpid(child, &status, 0);
    expect(status == 0, "child ended with %#x", status);
}

static void locked(void)
{
    char *area = anonymous(32 * PAGE);
    must(!mlock(area, 16 * PAGE));
    fill(area, 32 * PAGE, 40);
    char *before = strdup(vm_flags(area));
    frozen();
    expect(!strcmp(vm_flags(area), before), "flags: %s instead of %s", vm_flags(area), before);
    check("content", area, 32 * PAGE, 40);
}

/* Also what has no pages: without rights, behind a file's end; and what is mapped later. */
static void all_locked(int flags, const char *wanted)
{
    char *hole = mmap(NULL, 8 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *read_only = anonymous(8 * PAGE);
    fill(read_only, 8 * PAGE, 42);
    must(!mprotect(read_only, 8 * PAGE, PROT_READ));
    FILE *file = tmpfile();
    must(file && !ftruncate(fileno(file), PAGE));
    char *longer = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fileno(file), 0);
    must(hole != MAP_FAILED && longer != MAP_FAILED);
    longer[7] = 'x';
    /* fails for want of pages, having locked the mappings nevertheless */
    int one = flags & MCL_ONFAULT ? MLOCK_ONFAULT : 0;
    mlock2(hole, 8 * PAGE, one), mlock2(read_only, 8 * PAGE, one), mlock2(longer, 4 * PAGE, one);
    must(!mlockall(flags));
    char *area = anonymous(16 * PAGE);
    fill(area, 8 * PAGE, 43);
    char *places[] = {hole, read_only, longer, area, (char *)all_locked};
    char *before[5];
    for (int i = 0; i < 5; i++)
        before[i] = strdup(vm_flags(places[i]));
    expect(strstr(before[3], wanted) != NULL, "flags at first: %s", before[3]);
    frozen();
    for (int i = 0; i < 5; i++)
        expect(!strcmp(vm_flags(places[i]), before[i]), "%d: flags %s instead of %s", i, vm_flags(places[i]), before[i]);
    check("content", read_only, 8 * PAGE, 42);
    check("content of what was locked from the first", area, 8 * PAGE, 43);
    expect(longer[7] == 'x', "content of the file's mapping");
    char *later = anonymous(4 * PAGE);
    expect(strstr(vm_flags(later), wanted) != NULL, "flags of what is mapped later: %s", vm_flags(later));
}

static void locked_all(void)
{
    all_locked(MCL_FUTURE, " lo");
}

static void locked_on_fault(void)
{
    all_locked(MCL_FUTURE | MCL_ONFAULT, " lf");
}

static void copy_on_write(void)
{
    char *area = anonymous(16 * MB);
    fill(area, 16 * MB, 50);
    pid_t children[3];
    for (int i = 0; i < 3; i++)
        if (!(children[i] = fork())) {
            fill(area + i * 4 * MB, MB, 60 + i);
            wait_go();
            for (int other = 0; other < 4; other++)
                check("child", area + other * 4 * MB, MB, other == i ? 60 + i : 50 + other * 4 * MB / 8);
            fill(area, 16 * MB, 70 + i);
            check("child, all its own", area, 16 * MB, 70 + i);
            _exit(failures != 0);
        }
    usleep(100 * 1000);
    frozen();
    for (int i = 0; i < 3; i++) {
        int status;
        waitpid(children[i], &status, 0);
        expect(status == 0, "child %d ended with %#x", i, status);
    }
    check("parent", area, 16 * MB, 50);
}

static void code_pages(void)
{
    unsigned char code[] = {0xb8, 42, 0, 0, 0, 0xc3}; /* mov $42, %eax; ret */
    char *area = anonymous(PAGE);
    memcpy(area, code, sizeof code);
    must(!mprotect(area, PAGE, PROT_READ | PROT_EXEC));
    int (*volatile function)(void) = (int (*)(void))area;
    must(function() == 42);
    frozen();
    expect(function() == 42, "generated code");
    struct timespec now;
    must(!clock_gettime(CLOCK_MONOTONIC, &now)); /* through the vdso, at the address libc remembers */
    expect(getauxval(AT_SYSINFO_EHDR) && !memcmp((void *)getauxval(AT_SYSINFO_EHDR), "\177ELF", 4), "vdso");
}

static void many_areas(void)
{
    enum { COUNT = 2000 };
    char *area = mmap(NULL, COUNT * 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(area != MAP_FAILED);
    for (int i = 0; i < COUNT; i++) {
        must(!mprotect(area + 2 * i * PAGE, PAGE, PROT_READ | PROT_WRITE));
        fill(area + 2 * i * PAGE, PAGE, i);
    }
    char *before = read_maps();
    frozen();
    compare_maps(before, read_maps());
    for (int i = 0; i < COUNT; i++)
        check("page", area + 2 * i * PAGE, PAGE, i);
}

static void high_and_low(void)
{
    char *low = mmap((void *)0x10000, 16 * PAGE, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    must(low == (void *)0x10000);
    fill(low, 16 * PAGE, 80);
    char *large = mmap(NULL, 200L << 30, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    must(large != MAP_FAILED);
    fill(large + (100L << 30), MB, 81);
    frozen();
    check("low", low, 16 * PAGE, 80);
    check("in the middle of 200 GB", large + (100L << 30), MB, 81);
    check_zero("beside it", large + (150L << 30), MB);
}

static void writing_all_the_time(void)
{
    char *area = anonymous(32 * MB);
    uint64_t *words = (uint64_t *)area;
    say_ready();
    /* Two passes in turn: every word must be as the pass before left it. */
    for (uint64_t pass = 1; !failures; pass++) {
        for (size_t i = 0; i < 32 * MB / 8; i++) {
            if (words[i] != (pass - 1) * (i | 1)) {
                bad("pass %lu: word %zu is %#lx", pass, i, words[i]);
                break;
            }
            words[i] = pass * (i | 1);
        }
        if (go())
            break;
    }
}

const struct test_case cases[] = {{"private_anonymous", private_anonymous},
                                  {"dont_need", dont_need},
                                  {"lazy_free", lazy_free},
                                  {"remapped", remapped},
                                  {"unmapped_and_mapped_anew", unmapped_and_mapped_anew},
                                  {"shared_anonymous", shared_anonymous},
                                  {"file_private", file_private},
                                  {"file_shared", file_shared},
                                  {"file_deleted", file_deleted},
                                  {"attached_segments", attached_segments},
                                  {"memory_file", memory_file},
                                  {"protections", protections},
                                  {"past_the_end", past_the_end},
                                  {"growing_stack", growing_stack},
                                  {"main_stack", main_stack},
                                  {"program_break", program_break},
                                  {"advice", advice},
                                  {"locked", locked},
                                  {"locked_all", locked_all},
                                  {"locked_on_fault", locked_on_fault},
                                  {"copy_on_write", copy_on_write},
                                  {"code_pages", code_pages},
                                  {"many_areas", many_areas},
                                  {"high_and_low", high_and_low},
                                  {"writing_all_the_time", writing_all_the_time},
                                  {NULL, NULL}};
