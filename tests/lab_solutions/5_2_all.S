# all - maps all the pages before anybody asks
# mode: long
# words: "and nothing has touched it"
        .equ PDPT, 0x11000
        .equ PD, 0x12000
        .equ PT, 0x13000
        mov     rax, cr3
        mov     qword ptr [rax + 2*8], PDPT | 3
        mov     qword ptr [PDPT], PD | 3
        mov     qword ptr [PD], PT | 3
        mov     edi, PT
        mov     eax, 0x300003
        mov     ecx, 64
next:
        mov     [rdi], rax
        add     edi, 8
        add     eax, 0x1000
        dec     ecx
        jnz     next
        mov     eax, 0x9000
        call    rax
        hlt
