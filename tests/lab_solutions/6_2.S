# survivor - exercise 6.2
# mode: long
# memory: 16M
# variant: ("mov     al, 14", "mov     al, 13", "not 0xe")
# variant: ("[PD], 0x83", "[PD], 0x87", "the kernel's memory: ")
# variant: ("mov     al, 6", "mov     al, 7", "it ends by writing 0x7 to port 0xf4, not 0x6")
        .equ PML4, 0x10000
        .equ PDPT, 0x11000
        .equ PD, 0x12000
        .equ USER, 0x200000
        cld
        lgdt    [rip + gdt_register]
        lidt    [rip + idt_register]
        mov     esp, 0x20000
        mov     eax, 0x28
        ltr     ax
        mov     qword ptr [PML4], PDPT | 7
        mov     qword ptr [PDPT], PD | 7
        mov     qword ptr [PD], 0x83
        mov     qword ptr [PD + 8], USER | 0x87
        mov     eax, PML4
        mov     cr3, rax
        push    0x1b
        push    0x400000
        push    2
        push    0x23
        push    USER
        iretq
call:
        cmp     eax, 2
        je      end
        mov     al, dil
        out     0xe9, al
        iretq
end:
        mov     al, dil
        out     0xf4, al
fault0:
        mov     al, 0
        out     0xf4, al
fault6:
        mov     al, 6
        out     0xf4, al
fault13:
        mov     al, 13
        out     0xf4, al
fault14:
        mov     al, 14
        out     0xf4, al
        .align  8
gdt:    .quad   0, 0x00af9b000000ffff, 0x00cf93000000ffff
        .quad   0x00cff3000000ffff, 0x00affb000000ffff
        .word   0x67, tss & 0xffff
        .byte   (tss >> 16) & 0xff, 0x89, 0, tss >> 24
        .long   0, 0
gdt_end:
gdt_register:
        .word   gdt_end - gdt - 1
        .quad   gdt
idt_register:
        .word   15 * 16 - 1
        .quad   idt
        .align  8
tss:    .long   0
        .quad   0x30000
        .space  90
        .word   0x68
        .align  16
idt:
        .word   fault0 & 0xffff, 8, 0x8e00, fault0 >> 16
        .long   0, 0
        .space  2 * 16
        .word   call & 0xffff, 8, 0xee00, call >> 16
        .long   0, 0
        .space  2 * 16
        .word   fault6 & 0xffff, 8, 0x8e00, fault6 >> 16
        .long   0, 0
        .space  6 * 16
        .word   fault13 & 0xffff, 8, 0x8e00, fault13 >> 16
        .long   0, 0
        .word   fault14 & 0xffff, 8, 0x8e00, fault14 >> 16
        .long   0, 0
