/* A program of one page, without a library, for the exports that are kept here: counts in memory and in a file.
   gcc -O1 -nostdlib -static -ffreestanding -fno-stack-protector -Wl,--build-id=none -s -o tiny tiny.c */

static long call(long number, long a, long b, long c, long d)
{
    long result;
    register long r10 __asm__("r10") = d;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
    return result;
}

static char count[17] = "0000000000000000\n";

void _start(void)
{
    struct { long seconds, nanoseconds; } rest = {0, 10000000};
    long file = call(2 /* open */, (long)"/count", 0102 /* O_RDWR|O_CREAT */, 0644, 0);
    for (;;) {
        for (int digit = 15; ++count[digit] > '9'; digit--)
            count[digit] = '0';
        call(18 /* pwrite64 */, file, (long)count, sizeof count, 0);
        call(35 /* nanosleep */, (long)&rest, 0, 0, 0);
    }
}
