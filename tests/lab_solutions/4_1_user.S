# user - a page that ring 3 could use as well
# mode: long
# words: "ring 3 may use it (bit 2"
        .equ PDPT, 0x11000
        mov     rbx, [0x8000]
        mov     rdi, cr3
        mov     ebp, 0x300000
        mov     edx, PDPT
        mov     cl, 39
next:
        mov     rax, rbx
        shr     rax, cl
        and     eax, 511
        mov     esi, edx
        add     edx, 0x1000
        cmp     cl, 12
        cmove   esi, ebp
        or      esi, 7
        mov     [rdi + rax*8], rsi
        and     esi, 0xfffff000
        mov     edi, esi
        sub     cl, 9
        cmp     cl, 3
        jne     next
        mov     rdx, [0x8008]
        mov     [rbx], rdx
        hlt
