# lives - exercise 9.2
# mode: long
# variant: ("0x8e01", "0x8e00", "it ended so: triple fault")
# variant: ("mov     al, 14", "mov     al, 8", "it ends by writing 0x8 to port 0xf4, not 0xe")
# variant: ("[rsp + 32]", "[rsp + 24]", "memory at 0xa000 is")
# variant: ("ltr     ax", "nop", "it ended so: triple fault")
        lgdt    [rip + gdt_register]
        lidt    [rip + idt_register]
        mov     eax, 0x18
        ltr     ax
        mov     eax, 0x9000
        jmp     rax
double_fault:
        mov     rax, [rsp + 32]         # error code, RIP, CS, RFLAGS, RSP
        mov     [0xa000], rax
        mov     al, 8
        out     0xf4, al
page_fault:
        mov     al, 14
        out     0xf4, al
        .align  8
gdt:    .quad   0, 0x00af9b000000ffff, 0x00cf93000000ffff
        .word   0x67, tss & 0xffff
        .byte   (tss >> 16) & 0xff, 0x89, 0, tss >> 24
        .long   0, 0
gdt_end:
gdt_register:
        .word   gdt_end - gdt - 1
        .quad   gdt
        .align  16
idt:    .space  8 * 16
        .word   double_fault & 0xffff, 8, 0x8e01, double_fault >> 16
        .long   0, 0
        .space  5 * 16
        .word   page_fault & 0xffff, 8, 0x8e00, page_fault >> 16
        .long   0, 0
idt_end:
idt_register:
        .word   idt_end - idt - 1
        .quad   idt
        .align  8
tss:    .space  0x24
        .quad   0x20000                 # IST1
        .space  0x3a
        .word   0x68
