# doorbell - exercise 8.2
# mode: long
# variant: ("mul     rax", "mul     eax", "when the bell rang, result 0 was")
# variant: ("jnz     next", "out     0x10, al; jnz next", "port writes: 2, but 1 were expected")
# variant: ("out     0x10, al", "nop", "the doorbell, port 0x10, was not rung")
        mov     ecx, [0x8000]
        mov     esi, 0x8004
        mov     edi, 0x9000
next:
        mov     eax, [rsi]
        mul     rax
        mov     [rdi], rax
        add     esi, 4
        add     edi, 8
        dec     ecx
        jnz     next
        out     0x10, al
        hlt
