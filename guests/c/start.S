/*
 * The first instructions of a C guest (GNU as). kvmpy has set RSP to the top of a stack and
 * entered long mode; main() takes it from here.
 *
 * If main() returns 0 the machine is switched off (status 0); any other value goes to the
 * debug-exit port. Both work in ring 0 and in ring 3.
 */
        .section .text.start, "ax"
        .globl  _start
_start:
        xorl    %ebp, %ebp              /* the outermost frame, for debuggers */
        andq    $-16, %rsp              /* the psABI's alignment at a call */
        call    main
        testl   %eax, %eax
        jz      power_off
again:
        movw    $0xf4, %dx              /* isa-debug-exit */
        outl    %eax, %dx
        jmp     again                   /* where no such device is */
power_off:
        movw    $0x604, %dx
        movw    $0x2000, %ax
        outw    %ax, %dx
        jmp     power_off

/*
 * GCC calls these four for loops and structures even in a freestanding program.
 */
        .text
        .globl  memcpy, memmove, memset, memcmp
memcpy:
        movq    %rdi, %rax
        movq    %rdx, %rcx
        rep movsb
        ret

memmove:
        movq    %rdi, %rax
        movq    %rdx, %rcx
        movq    %rdi, %r8
        subq    %rsi, %r8
        cmpq    %rdx, %r8               /* does the target begin inside of the source? */
        jb      backwards
        rep movsb
        ret
backwards:
        leaq    -1(%rdi,%rdx), %rdi
        leaq    -1(%rsi,%rdx), %rsi
        std
        rep movsb
        cld
        ret

memset:
        movq    %rdi, %r8
        movl    %esi, %eax
        movq    %rdx, %rcx
        rep stosb
        movq    %r8, %rax
        ret

memcmp:
        xorl    %eax, %eax
        movq    %rdx, %rcx
        testq   %rcx, %rcx
        jz      equal
        repe cmpsb
        jz      equal
        movzbl  -1(%rdi), %ecx
        movzbl  -1(%rsi), %eax
        subl    %ecx, %eax
equal:
        ret

        .section .note.GNU-stack, "", @progbits
