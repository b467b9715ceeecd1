# demand - exercise 5.2
# mode: long
# variant: ("add     qword ptr [rip + pool], 0x1000", "nop", "lead to the same RAM")
# variant: ("pool:   .quad   0x300000", "pool:   .quad   0x80000000", "where no RAM is")
# variant: ("add     rsp, 8", "nop", "it ended so: triple fault")
# variant: ("call    rax", "nop", "it did not come to its end")
        .equ PDPT, 0x11000
        .equ PD, 0x12000
        .equ PT, 0x13000
        lidt    [rip + idt_register]
        mov     rax, cr3
        mov     qword ptr [rax + 2*8], PDPT | 3         # 1 TiB: entry 2 of the PML4
        mov     qword ptr [PDPT], PD | 3
        mov     qword ptr [PD], PT | 3
        mov     eax, 0x9000
        call    rax
        hlt
page_fault:
        push    rax
        push    rbx
        mov     rax, cr2
        shr     rax, 12
        and     eax, 511
        mov     rbx, [rip + pool]
        or      rbx, 3
        mov     [PT + rax*8], rbx
        add     qword ptr [rip + pool], 0x1000
        pop     rbx
        pop     rax
        add     rsp, 8
        iretq
pool:   .quad   0x300000
        .align  16
idt:    .space  14 * 16
        .word   page_fault & 0xffff, 8, 0x8e00, page_fault >> 16
        .long   0, 0
idt_end:
idt_register:
        .word   idt_end - idt - 1
        .quad   idt
