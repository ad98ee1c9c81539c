/* Memory honesty: a program that changes its memory in all ways at random and knows what every byte must be.
 *
 * `calls`: an arena of pages is driven by mmap, munmap, mremap, madvise, mprotect, fork and plain writes; a
 * model on the side says for each page whether it is there, and which seed filled it, or that it is zero.
 * Every byte of every page is compared, again and again, until the go-file appears; then a last time.
 * `heap`: malloc, calloc, realloc and free in four threads (run it with another allocator preloaded, too);
 * every block is filled with words derived from its own number, and calloc must give zeros.
 * `heap_processes`: the same in a process and two children.
 *
 * SEED in the environment chooses the run. READY comes after some rounds, so that there is something to lose. */
#include "inpod.h"
#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>

#define PAGE 4096L
enum { PAGES = 6144, ABSENT = 0, ZERO = 1 }; /* a page's state: absent, zero, or the seed it was filled with */

static uint64_t random_state;
static uint64_t random_number(uint64_t *state)
{
    *state ^= *state << 13, *state ^= *state >> 7, *state ^= *state << 17;
    return *state;
}

static uint64_t seed_from_environment(void)
{
    const char *text = getenv("SEED");
    return (text ? strtoull(text, NULL, 10) : 1) * 0x9e3779b97f4a7c15u + 1;
}

static char *arena;
static uint64_t *state; /* shared with nobody; lies outside the arena */
static unsigned char *protection; /* 0: read and write, 1: read only, 2: none */
static uint64_t next_seed = 2;

static void fill_page(long page, uint64_t seed)
{
    uint64_t *words = (uint64_t *)(arena + page * PAGE);
    for (int i = 0; i < PAGE / 8; i++)
        words[i] = seed * 0x9e3779b97f4a7c15u + i;
    state[page] = seed;
}

static int page_holds(long page)
{
    const uint64_t *words = (const uint64_t *)(arena + page * PAGE);
    uint64_t seed = state[page];
    for (int i = 0; i < PAGE / 8; i++)
        if (words[i] != (seed == ZERO ? 0 : seed * 0x9e3779b97f4a7c15u + i)) {
            bad("page %ld word %d: %#lx, seed %lu (%#lx expected)", page, i, words[i], seed,
                seed == ZERO ? 0 : seed * 0x9e3779b97f4a7c15u + i);
            return 0;
        }
    return 1;
}

static void check_all(void)
{
    for (long page = 0; page < PAGES && !failures; page++) {
        if (state[page] == ABSENT)
            continue;
        if (protection[page] == 2)
            mprotect(arena + page * PAGE, PAGE, PROT_READ);
        page_holds(page);
        if (protection[page] == 2)
            mprotect(arena + page * PAGE, PAGE, PROT_NONE);
    }
}

static void set_range(long first, long count, uint64_t to)
{
    for (long page = first; page < first + count; page++)
        state[page] = to, protection[page] = 0;
}

static int all(long first, long count, int present)
{
    for (long page = first; page < first + count; page++)
        if ((state[page] != ABSENT) != present)
            return 0;
    return 1;
}

static long contiguous(long first, long count) /* the number of writable pages from `first` on */
{
    long n = 0;
    while (n < count && state[first + n] != ABSENT && protection[first + n] == 0)
        n++;
    return n;
}

static int one_area(const char *at, long count) /* whether a single mapping holds all of it */
{
    FILE *maps = fopen("/proc/self/maps", "r");
    unsigned long start, end, from = (unsigned long)at, to = from + count * PAGE;
    char rest[512];
    int found = 0;
    must(maps != NULL);
    while (!found && fscanf(maps, "%lx-%lx%511[^\n]\n", &start, &end, rest) >= 2)
        found = start <= from && to <= end;
    fclose(maps);
    return found;
}

static void one_step(void)
{
    long count = 1 + random_number(&random_state) % (random_number(&random_state) % 8 ? 16 : 512);
    long first = random_number(&random_state) % (PAGES - count);
    char *at = arena + first * PAGE;
    switch (random_number(&random_state) % 12) {
    case 0: /* map fresh memory over whatever is there */
        must(mmap(at, count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at);
        set_range(first, count, ZERO);
        break;
    case 1:
        must(!munmap(at, count * PAGE));
        /* keep the place: nobody else may map here */
        must(mmap(at, count * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at);
        set_range(first, count, ABSENT);
        break;
    case 2: { /* drop content: zeros come back */
        long n = contiguous(first, count);
        if (n) {
            must(!madvise(at, n * PAGE, MADV_DONTNEED));
            set_range(first, n, ZERO);
        }
        break;
    }
    case 3: { /* lazily freed, then written at once, since otherwise both answers are right */
        long n = contiguous(first, count);
        if (n) {
            madvise(at, n * PAGE, MADV_FREE);
            for (long page = first; page < first + n; page++)
                fill_page(page, next_seed++);
        }
        break;
    }
    case 4: { /* move */
        long target = random_number(&random_state) % (PAGES - count);
        if (target + count > first && first + count > target)
            break;
        if (!all(first, count, 1))
            break;
        long n = 1;
        while (n < count && protection[first + n] == protection[first])
            n++;
        if (!one_area(at, n))
            break; /* a failing mremap unmaps its target, and which areas the kernel joins is its own affair */
        must(mremap(at, n * PAGE, n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, arena + target * PAGE) ==
             arena + target * PAGE);
        for (long i = 0; i < n; i++)
            state[target + i] = state[first + i], protection[target + i] = protection[first + i];
        must(mmap(at, n * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at);
        set_range(first, n, ABSENT);
        break;
    }
    case 5: { /* protect some pages, or give them back */
        if (!all(first, count, 1))
            break;
        int kind = random_number(&random_state) % 3;
        must(!mprotect(at, count * PAGE, kind == 0 ? PROT_READ | PROT_WRITE : kind == 1 ? PROT_READ : PROT_NONE));
        memset(protection + first, kind, count);
        break;
    }
    case 6: { /* a child sees the same, changes its copy, and goes */
        if (random_number(&random_state) % 16)
            break;
        pid_t child = fork();
        if (!child) {
            check_all();
            for (long page = first; page < first + count; page++)
                if (state[page] != ABSENT && !protection[page])
                    fill_page(page, 12345);
            check_all();
            _exit(failures != 0);
        }
        int status;
        must(waitpid(child, &status, 0) == child);
        expect(status == 0, "a child saw something else (%#x)", status);
        break;
    }
    case 7: { /* huge pages wanted or not */
        madvise(at, count * PAGE, random_number(&random_state) % 2 ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
        break;
    }
    case 8: /* zero explicitly */
        for (long page = first; page < first + count; page++)
            if (state[page] != ABSENT && !protection[page])
                memset(arena + page * PAGE, 0, PAGE), state[page] = ZERO;
        break;
    default: /* write */
        for (long page = first; page < first + count; page++)
            if (state[page] != ABSENT && !protection[page])
                fill_page(page, next_seed++);
    }
}

static void calls(void)
{
    random_state = seed_from_environment();
    arena = mmap(NULL, PAGES * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    state = mmap(NULL, PAGES * sizeof *state, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    protection = calloc(PAGES, 1);
    must(arena != MAP_FAILED && state != MAP_FAILED && protection);
    for (int round = 0; !failures; round++) {
        for (int step = 0; step < 200 && !failures; step++)
            one_step();
        check_all();
        if (round == 5)
            say_ready();
        if (round > 5 && go())
            break;
    }
    for (int more = 0; more < 20 && !failures; more++) { /* and on, in the new life */
        for (int step = 0; step < 200 && !failures; step++)
            one_step();
        check_all();
    }
}

enum { BLOCKS = 3000 };
struct block {
    uint64_t *words;
    size_t count;
    uint64_t seed;
};

static void fill_block(struct block *block, uint64_t seed, size_t from)
{
    block->seed = seed;
    for (size_t i = from; i < block->count; i++)
        block->words[i] = seed + i * 0x9e3779b97f4a7c15u;
}

static void check_block(const struct block *block)
{
    for (size_t i = 0; i < block->count; i++)
        if (block->words[i] != block->seed + i * 0x9e3779b97f4a7c15u) {
            bad("block of %zu words, word %zu: %#lx", block->count, i, block->words[i]);
            return;
        }
}

static size_t random_size(uint64_t *random)
{
    switch (random_number(random) % 16) {
    case 0:
        return 1 + random_number(random) % 100000; /* up to 800 kB: mapped by itself */
    case 1:
    case 2:
        return 1 + random_number(random) % 4000;
    default:
        return 1 + random_number(random) % 100;
    }
}

static int rounds_done[4];

static void *heap_thread(void *number)
{
    intptr_t self = (intptr_t)number;
    uint64_t random = seed_from_environment() + self * 0x5555555555u + 1;
    struct block *blocks = calloc(BLOCKS, sizeof *blocks);
    must(blocks);
    for (int after = 0; after < 15 && !failures;) {
        for (int step = 0; step < 4000 && !failures; step++) {
            struct block *one = &blocks[random_number(&random) % BLOCKS];
            size_t size = random_size(&random);
            if (!one->words) {
                int zeroed = random_number(&random) % 3 == 0;
                one->words = zeroed ? calloc(size, 8) : malloc(size * 8);
                must(one->words);
                one->count = size;
                for (size_t i = 0; zeroed && i < size; i++)
                    if (one->words[i]) {
                        bad("calloc gave %#lx at word %zu of %zu", one->words[i], i, size);
                        break;
                    }
                fill_block(one, random_number(&random), 0);
            } else {
                check_block(one);
                if (random_number(&random) % 4 == 0) {
                    size_t kept = size < one->count ? size : one->count;
                    one->words = realloc(one->words, size * 8);
                    one->count = size;
                    must(one->words);
                    fill_block(one, one->seed, kept);
                    check_block(one);
                } else {
                    free(one->words);
                    one->words = NULL;
                }
            }
        }
        for (int i = 0; i < BLOCKS && !failures; i++)
            if (blocks[i].words)
                check_block(&blocks[i]);
        __atomic_add_fetch(&rounds_done[self], 1, __ATOMIC_SEQ_CST);
        if (go())
            after++; /* goes on for some rounds in its new life */
    }
    return NULL;
}

static void churn_heap(void)
{
    pthread_t threads[4];
    for (intptr_t i = 0; i < 4; i++)
        must(!pthread_create(&threads[i], NULL, heap_thread, (void *)i));
    for (int i = 0; i < 4; i++)
        while (!failures && __atomic_load_n(&rounds_done[i], __ATOMIC_SEQ_CST) < 3)
            usleep(10000);
    say_ready();
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
}

static void heap(void)
{
    churn_heap();
}

static void heap_processes(void)
{
    pid_t children[2];
    for (int i = 0; i < 2; i++)
        if (!(children[i] = fork())) {
            heap_thread((void *)(intptr_t)i);
            _exit(failures != 0);
        }
    churn_heap();
    for (int i = 0; i < 2; i++) {
        int status;
        must(waitpid(children[i], &status, 0) == children[i]);
        expect(status == 0, "child %d ended with %#x", i, status);
    }
}

const struct test_case cases[] = {{"calls", calls}, {"heap", heap}, {"heap_processes", heap_processes}, {NULL, NULL}};
