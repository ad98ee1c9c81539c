/* CPU state: general registers, x87, SSE, AVX and AVX-512 registers, control words, segment bases.
 *
 * The loops hold values in registers across a long spin, so that a freeze falls into it, and look whether
 * each bit is still there. They go round until the go-file appears. */
#include "inpod.h"
#include <cpuid.h>
#include <pthread.h>
#include <sys/syscall.h>

#define SPIN "mov $2000000, %%rcx\n 1: dec %%rcx\n jnz 1b\n"

static void general(void)
{
    say_ready();
    for (uint64_t round = 1; !failures && !go(); round++) {
        uint64_t in[12], out[12];
        for (int i = 0; i < 12; i++)
            in[i] = round * 0x9e3779b97f4a7c15u + i * 0x123456789abcdefu;
        register uint64_t *source asm("r14") = in, *target asm("r15") = out;
        asm volatile("push %%rbp\n"
                     "mov 0(%%r14), %%rax\n mov 8(%%r14), %%rbx\n mov 16(%%r14), %%rdx\n"
                     "mov 24(%%r14), %%rsi\n mov 32(%%r14), %%rdi\n mov 40(%%r14), %%rbp\n"
                     "mov 48(%%r14), %%r8\n mov 56(%%r14), %%r9\n mov 64(%%r14), %%r10\n"
                     "mov 72(%%r14), %%r11\n mov 80(%%r14), %%r12\n mov 88(%%r14), %%r13\n"
                     SPIN
                     "mov %%rax, 0(%%r15)\n mov %%rbx, 8(%%r15)\n mov %%rdx, 16(%%r15)\n"
                     "mov %%rsi, 24(%%r15)\n mov %%rdi, 32(%%r15)\n mov %%rbp, 40(%%r15)\n"
                     "mov %%r8, 48(%%r15)\n mov %%r9, 56(%%r15)\n mov %%r10, 64(%%r15)\n"
                     "mov %%r11, 72(%%r15)\n mov %%r12, 80(%%r15)\n mov %%r13, 88(%%r15)\n"
                     "pop %%rbp\n"
                     : "+r"(source), "+r"(target)
                     :
                     : "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "cc",
                       "memory");
        expect(!memcmp(in, out, sizeof in), "general registers differ in round %lu", round);
    }
}

/* Flags survive: carry, overflow, sign, zero, parity, direction. */
static void flags(void)
{
    say_ready();
    while (!failures && !go()) {
        for (uint64_t bits = 0; bits < 32; bits++) {
            uint64_t wanted = (bits & 1) | (bits & 2 ? 4 : 0) | (bits & 4 ? 0x40 : 0) | (bits & 8 ? 0x80 : 0) |
                              (bits & 16 ? 0xc00 : 0);
            uint64_t got;
            asm volatile("push %1\n popfq\n mov $100000, %%rcx\n 1: lea -1(%%rcx), %%rcx\n jrcxz 2f\n jmp 1b\n"
                         "2: pushfq\n pop %0\n cld\n"
                         : "=r"(got)
                         : "r"(wanted | 0x202)
                         : "rcx", "cc", "memory");
            expect((got & 0xcc5) == wanted, "flags %#lx instead of %#lx", got & 0xcc5, wanted);
        }
    }
}

static void x87(void)
{
    unsigned short control = 0x0a7f, read_back; /* round up, double precision, all exceptions masked */
    long double values[8], got[8];
    say_ready();
    for (int round = 1; !failures && !go(); round++) {
        for (int i = 0; i < 8; i++)
            values[i] = 1.0L / (round + i) * (i % 2 ? -3.14159265358979323846L : 2.71828L);
        asm volatile("fninit\n fldcw %0\n" : : "m"(control));
        for (int i = 7; i >= 0; i--)
            asm volatile("fldt %0" : : "m"(values[i]));
        asm volatile(SPIN : : : "rcx", "cc");
        for (int i = 0; i < 8; i++)
            asm volatile("fstpt %0" : "=m"(got[i]));
        asm volatile("fnstcw %0" : "=m"(read_back));
        for (int i = 0; i < 8; i++)
            expect(!memcmp(&got[i], &values[i], 10), "st(%d) differs in round %d", i, round);
        expect(read_back == control, "x87 control word %#x", read_back);
        asm volatile("fninit");
    }
}

static void sse(void)
{
    unsigned int control = 0x7fa0, read_back; /* truncate, sticky bits set, flush to zero */
    uint64_t in[16][2], out[16][2];
    say_ready();
    for (uint64_t round = 1; !failures && !go(); round++) {
        for (int i = 0; i < 16; i++)
            in[i][0] = round * 0x9e3779b97f4a7c15u + i, in[i][1] = ~in[i][0] * 3;
        asm volatile("ldmxcsr %0" : : "m"(control));
#define EACH(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7) do(8) do(9) do(10) do(11) do(12) do(13) do(14) do(15)
#define LOAD(n) "movdqu " #n "*16(%0), %%xmm" #n "\n"
#define STORE(n) "movdqu %%xmm" #n ", " #n "*16(%1)\n"
        asm volatile(EACH(LOAD) SPIN EACH(STORE)
                     :
                     : "r"(in), "r"(out)
                     : "rcx", "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
                       "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
        asm volatile("stmxcsr %0" : "=m"(read_back));
        expect(!memcmp(in, out, sizeof in), "xmm registers differ in round %lu", round);
        expect(read_back == control, "MXCSR %#x", read_back);
    }
}

__attribute__((target("avx2"))) static void avx_round(uint64_t round)
{
    uint64_t in[16][4], out[16][4];
    for (int i = 0; i < 64; i++)
        in[i / 4][i % 4] = (round + i) * 0x9e3779b97f4a7c15u;
#define LOAD_Y(n) "vmovdqu " #n "*32(%0), %%ymm" #n "\n"
#define STORE_Y(n) "vmovdqu %%ymm" #n ", " #n "*32(%1)\n"
    asm volatile(EACH(LOAD_Y) SPIN EACH(STORE_Y)
                 :
                 : "r"(in), "r"(out)
                 : "rcx", "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
                   "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
    expect(!memcmp(in, out, sizeof in), "ymm registers differ in round %lu", round);
}

static void avx(void)
{
    say_ready();
    if (!__builtin_cpu_supports("avx2"))
        wait_go();
    for (uint64_t round = 1; !failures && !go(); round++)
        avx_round(round);
}

__attribute__((target("avx512f,avx512bw"))) static void avx512_round(uint64_t round)
{
    uint64_t in[32][8], out[32][8], masks[8], masks_out[8];
    for (int i = 0; i < 256; i++)
        in[i / 8][i % 8] = (round + i) * 0x9e3779b97f4a7c15u;
    for (int i = 0; i < 8; i++)
        masks[i] = (round + i) * 0xc2b2ae3d27d4eb4fu;
#define LOAD_Z(n) "vmovdqu64 " #n "*64(%0), %%zmm" #n "\n"
#define STORE_Z(n) "vmovdqu64 %%zmm" #n ", " #n "*64(%1)\n"
#define HIGH(do) do(16) do(17) do(18) do(19) do(20) do(21) do(22) do(23) do(24) do(25) do(26) do(27) do(28) do(29) do(30) do(31)
#define LOAD_K(n) "kmovq " #n "*8(%2), %%k" #n "\n"
#define STORE_K(n) "kmovq %%k" #n ", " #n "*8(%3)\n"
#define MASKS(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7)
    asm volatile(EACH(LOAD_Z) HIGH(LOAD_Z) MASKS(LOAD_K) SPIN EACH(STORE_Z) HIGH(STORE_Z) MASKS(STORE_K)
                 :
                 : "r"(in), "r"(out), "r"(masks), "r"(masks_out)
                 : "rcx", "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
                   "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20",
                   "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31",
                   "k1", "k2", "k3", "k4", "k5", "k6", "k7");
    expect(!memcmp(in, out, sizeof in), "zmm registers differ in round %lu", round);
    expect(!memcmp(masks, masks_out, sizeof masks), "mask registers differ in round %lu", round);
}

/* A processor without AVX-512 has nothing to lose: the case then only waits. */
static void avx512(void)
{
    say_ready();
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw"))
        wait_go();
    for (uint64_t round = 1; !failures && !go(); round++)
        avx512_round(round);
}

/* A busy floating-point sum that must come out to the last bit. */
static void arithmetic(void)
{
    say_ready();
    double wanted = 0;
    for (int turn = 0; !failures && (turn < 3 || !go()); turn++) {
        volatile double seed = 1.0;
        double sum = 0, x = seed;
        long double precise = 0;
        for (int i = 1; i < 20000000; i++) {
            x = x * 1.0000001 + 1.0 / i;
            sum += x;
            precise += 1.0L / i;
        }
        if (!turn)
            wanted = sum + (double)precise;
        expect(sum + (double)precise == wanted, "sum %.17g instead of %.17g", sum + (double)precise, wanted);
    }
}

#define ARCH_SET_GS 0x1001
#define ARCH_GET_FS 0x1003
#define ARCH_GET_GS 0x1004

static uint64_t gs_area[4] = {0x1111, 0x2222, 0x3333, 0x4444};
static __thread uint64_t thread_local_value;

static void *segment_thread(void *argument)
{
    static uint64_t own_gs[4] = {5, 6, 7, 8};
    uint64_t fs = 0, gs = 0, fs_after = 0, value = 0;
    thread_local_value = (uintptr_t)argument;
    syscall(SYS_arch_prctl, ARCH_SET_GS, own_gs);
    syscall(SYS_arch_prctl, ARCH_GET_FS, &fs);
    wait_go();
    syscall(SYS_arch_prctl, ARCH_GET_FS, &fs_after);
    syscall(SYS_arch_prctl, ARCH_GET_GS, &gs);
    asm volatile("mov %%gs:8, %0" : "=r"(value));
    expect(fs == fs_after && gs == (uint64_t)own_gs && value == 6, "thread: fs %#lx %#lx gs %#lx", fs, fs_after, gs);
    expect(thread_local_value == (uintptr_t)argument, "thread-local value");
    return NULL;
}

static void segments(void)
{
    uint64_t fs = 0, gs = 0, fs_after = 0, value = 0;
    pthread_t thread;
    must(!pthread_create(&thread, NULL, segment_thread, (void *)77));
    syscall(SYS_arch_prctl, ARCH_SET_GS, gs_area);
    syscall(SYS_arch_prctl, ARCH_GET_FS, &fs);
    frozen();
    syscall(SYS_arch_prctl, ARCH_GET_FS, &fs_after);
    syscall(SYS_arch_prctl, ARCH_GET_GS, &gs);
    asm volatile("mov %%gs:16, %0" : "=r"(value));
    expect(fs == fs_after, "fs base %#lx instead of %#lx", fs_after, fs);
    expect(gs == (uint64_t)gs_area && value == 0x3333, "gs base %#lx instead of %p", gs, (void *)gs_area);
    pthread_join(thread, NULL);
}

const struct test_case cases[] = {{"general", general}, {"flags", flags},           {"x87", x87},
                                  {"sse", sse},         {"avx", avx},               {"avx512", avx512},
                                  {"segments", segments}, {"arithmetic", arithmetic}, {NULL, NULL}};
