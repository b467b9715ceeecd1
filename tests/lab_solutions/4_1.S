# own_page - exercise 4.1
# mode: long
# memory: 16M
# variant: ("or      rcx, [no_execute]", "nop", "it may be executed (bit 63")
# variant: ("mov     [rbx], rdx", "mov     [FRAME], rdx", "the page's D bit (bit 6) is clear")
# variant: ("FRAME | 3", "FRAME | 1", "it may not be written (bit 1")
# variant: ("shr     rax, 12", "shr     rax, 13", "the walk of")
# variant: ("mov     cr3, rax", "nop", "it ended so: triple fault")
        .equ FRAME, 0x300000
        .equ PML4, 0x10000
        .equ PDPT, 0x11000
        .equ PD, 0x12000
        .equ PT, 0x13000
        mov     rbx, [0x8000]
        # What runs now stays where it is: the entry of kvmpy's PML4 for address 0.
        mov     rax, cr3
        mov     rax, [rax]
        mov     [PML4], rax

        mov     rax, rbx
        shr     rax, 39
        and     eax, 511
        mov     qword ptr [PML4 + rax*8], PDPT | 3
        mov     rax, rbx
        shr     rax, 30
        and     eax, 511
        mov     qword ptr [PDPT + rax*8], PD | 3
        mov     rax, rbx
        shr     rax, 21
        and     eax, 511
        mov     qword ptr [PD + rax*8], PT | 3
        mov     rax, rbx
        shr     rax, 12
        and     eax, 511
        mov     ecx, FRAME | 3
        or      rcx, [no_execute]
        mov     [PT + rax*8], rcx

        mov     eax, PML4
        mov     cr3, rax
        mov     rdx, [0x8008]
        mov     [rbx], rdx
        hlt
        .align  8
no_execute:
        .quad   1 << 63
