# eight - exercise 8.1
# mode: long
# variant: ("mov     ecx, 8\n", "mov     ecx, 7\n", "the device got 56 bytes; the one at 56")
# variant: ("mov     [rdi], rax", "mov [rdi], eax; shr rax, 32; mov [rdi + 4], eax", "MMIO writes: 16, but 8 were expected")
# variant: ("hlt", "out 0x80, al; hlt", "exits: 10, but 9 were expected")
        mov     esi, 0x8000
        mov     edi, 0xd0000000
        mov     ecx, 8
next:
        mov     rax, [rsi]
        mov     [rdi], rax
        add     rsi, 8
        add     rdi, 8
        dec     ecx
        jnz     next
        hlt
