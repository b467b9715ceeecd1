# guard - exercise 4.2
# mode: long
# variant: ("and     edx, 511", "and     edx, 255", "still leads to")
# variant: ("mov     qword ptr [PT + rdx*8], 0", "nop", "still leads to")
# variant: ("add     eax, 4096", "add     eax, 8192", "before, every address led to itself")
# variant: ("mov     ecx, 512", "mov     ecx, 500", "leads nowhere any more")
# variant: ("invlpg  [rbx]", "mov     qword ptr [rsi], 0", "it ended so: triple fault")
# variant: ("PT | 3", "PT | 1", "have changed")
        .equ PT, 0x10000
        mov     rbx, [0x8000]
        mov     rsi, cr3
        mov     rsi, [rsi]              # the PDPT
        and     rsi, -4096
        mov     rsi, [rsi]              # the PD
        and     rsi, -4096
        mov     edi, PT
        mov     eax, 0x200003
        mov     ecx, 512
fill:
        mov     [rdi], rax
        add     rdi, 8
        add     eax, 4096
        dec     ecx
        jnz     fill
        mov     rdx, rbx
        shr     rdx, 12
        and     edx, 511
        mov     qword ptr [PT + rdx*8], 0
        mov     qword ptr [rsi + 8], PT | 3
        invlpg  [rbx]
        hlt
