/* A parent inside of vfork(2), until /tmp/go is there. */

#include <stdio.h>
#include <unistd.h>

int main(void)
{
    puts("READY");
    fflush(stdout);
    if (vfork() == 0) {
        while (access("/tmp/go", F_OK))
            usleep(10000);
        _exit(0);
    }
    puts("parent goes on");
    fflush(stdout);
    pause();
}
