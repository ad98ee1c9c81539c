/* What a debugger has in its hands. */
#include <unistd.h>

volatile long total;

__attribute__((noinline)) static void step(long n)
{
    total += n;
}

int main(void)
{
    for (long n = 1;; n++) {
        step(n);
        usleep(1000);
    }
}
