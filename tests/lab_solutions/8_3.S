# clock - exercise 8.3
# mode: long
# variant: ("sub     rax, r8", "mov     eax, 200000000", "by the host's clock that exit took")
# variant: ("sub     rax, r8", "sub     rax, r8; shr rax, 8", "by the host's clock that exit took")
# variant: ("mov     ecx, 64", "mov     ecx, 63", "port 0x10 was written 63 times, not 64")
# variant: ("mov     rax, rbx\n", "xor     eax, eax\n", "rax is 0x0 at the end")
        mov     edi, 0x9000
        mov     rbx, -1
        mov     ecx, 64
next:
        rdtsc
        shl     rdx, 32
        or      rax, rdx
        mov     r8, rax
        out     0x10, al
        rdtsc
        shl     rdx, 32
        or      rax, rdx
        sub     rax, r8
        mov     [rdi], rax
        cmp     rax, rbx
        cmovb   rbx, rax
        add     edi, 8
        dec     ecx
        jnz     next
        mov     rax, rbx
        hlt
