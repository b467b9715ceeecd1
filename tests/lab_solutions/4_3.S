# walker - exercise 4.3
# mode: long
# variant: ("mov     cl, 39", "mov     cl, 30", "RAX is")
# variant: ("bt      rax, 7", "bt      rax, 63", "RAX is")
# variant: ("mov     rax, -1", "xor     eax, eax", "the walk comes to all ones, for it leads nowhere")
        mov     rbx, [0x8000]
        mov     rsi, [0x8008]
        mov     rdi, [rip + address_mask]
        mov     cl, 39
level:
        mov     rax, rbx
        shr     rax, cl
        and     eax, 511
        and     rsi, rdi
        mov     rax, [rsi + rax*8]
        test    al, 1
        jz      nowhere
        mov     rsi, rax
        cmp     cl, 12
        je      page
        cmp     cl, 39                  # a PML4 entry maps no page
        je      table
        bt      rax, 7
        jc      page
table:
        sub     cl, 9
        jmp     level
page:
        mov     edx, 1
        shl     rdx, cl
        dec     rdx                     # the offset's bits
        and     rax, rdi
        mov     rsi, rdx
        not     rsi
        and     rax, rsi
        and     rbx, rdx
        or      rax, rbx
        hlt
nowhere:
        mov     rax, -1
        hlt
        .align  8
address_mask:
        .quad   0x000ffffffffff000
