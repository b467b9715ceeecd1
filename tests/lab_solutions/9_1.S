# order - exercise 9.1
# mode: long
# variant: ("0x0e00", "0x8e00", "it ended so: the guest executed HLT")
# variant: ("0x0e00", "0x0000", "a #NP by the gate of #PF was ordered")
# variant: ("mov     [rax], al", "mov     al, [rax]", "a #PF by a write was ordered")
# variant: ("mov     rax, [0x8000]", "mov     rax, 0x700000000000", "the write goes to 0x700000000000, not to")
# variant: ("mov     [rax], al", "ud2", "it begins with #UD")
        lidt    [rip + idt_register]
        mov     rax, [0x8000]
        mov     [rax], al
handler:
        hlt
        .align  16
idt:    .space  14 * 16
        .word   handler & 0xffff, 8, 0x0e00, handler >> 16
        .long   0, 0
idt_end:
idt_register:
        .word   idt_end - idt - 1
        .quad   idt
