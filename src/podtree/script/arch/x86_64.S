# The stub that a traced task runs to act on itself (x86_64).
#
# It is written into bytes that nothing else executes: the unused tail of the task's
# vdso while the task is a program of its own, the engine's arena while it is restored.
# It never touches the stack, the FPU or fs/gs, so those need no saving; if the tracer
# dies at any instruction, the code falls through to `restore`, which puts back the 16
# general registers, the flags, the signal mask and the program counter from the save
# area, and the task goes on with its own work.
#
# r15 -> table: +0 number of entries, +8 done flag, +16 struct timespec (how long to wait
# for the tracer at the end), +64 entries of 64 bytes: number, six arguments, result.
# The tracer writes the save area (offsets in stub.py) before the first instruction runs.

        .text
        .globl  run, one, restore
run:
        movq    (%r15), %r14
        leaq    64(%r15), %r13
1:      testq   %r14, %r14
        jz      2f
        movq    (%r13), %rax
        movq    8(%r13), %rdi
        movq    16(%r13), %rsi
        movq    24(%r13), %rdx
        movq    32(%r13), %r10
        movq    40(%r13), %r8
        movq    48(%r13), %r9
        syscall
        movq    %rax, 56(%r13)
        addq    $64, %r13
        decq    %r14
        jmp     1b
2:      movq    $1, 8(%r15)
        xorl    %edi, %edi              # ppoll(NULL, 0, &timespec, NULL): the tracer
        xorl    %esi, %esi              # interrupts it at once; without a tracer it ends
        leaq    16(%r15), %rdx          # by itself and the task restores itself
        xorl    %r10d, %r10d
        xorl    %r8d, %r8d
        movl    $271, %eax
one:    syscall                         # single remote calls enter here
restore:
        movq    save+8*16(%rip), %rsp
        cld
        cmpb    $0, save+8*19(%rip)     # the direction flag
        je      3f
        std
3:      movl    $2, %edi                # rt_sigprocmask(SIG_SETMASK, &mask, NULL, 8)
        leaq    save+8*17(%rip), %rsi
        movl    $0, %edx
        movl    $8, %r10d
        movl    $14, %eax
        syscall
        movl    save+8*18(%rip), %eax   # al: overflow flag, ah: the low byte of the flags
        addb    $0x7f, %al
        sahf
        movq    save+8*0(%rip), %r15
        movq    save+8*1(%rip), %r14
        movq    save+8*2(%rip), %r13
        movq    save+8*3(%rip), %r12
        movq    save+8*4(%rip), %rbp
        movq    save+8*5(%rip), %rbx
        movq    save+8*6(%rip), %r11
        movq    save+8*7(%rip), %r10
        movq    save+8*8(%rip), %r9
        movq    save+8*9(%rip), %r8
        movq    save+8*10(%rip), %rax
        movq    save+8*11(%rip), %rcx
        movq    save+8*12(%rip), %rdx
        movq    save+8*13(%rip), %rsi
        movq    save+8*14(%rip), %rdi
        jmp     *save+8*15(%rip)
        .balign 64
save:   .skip   160
