# undefined - exercise 5.1
# mode: long
# variant: ("add     qword ptr [rsp], 2", "mov     esi, 1; add     qword ptr [rsp], 2", "changes registers of the code that it interrupts: rsi")
# variant: ("add     qword ptr [rsp], 2", "mov     al, 1; add     qword ptr [rsp], 2", "changes registers of the code that it interrupts: rax")
# variant: (".space  6 * 16", ".space  5 * 16", "it ended so: triple fault")
# variant: ("iretq", "hlt", "it should end by writing 0x1 to port 0xf4")
# variant: ("add     qword ptr [rsp], 2", "nop", "it did not end: after 1 s it was stopped")
# variant: ("call    rax", "mov     byte ptr [rip + count], 1", "the code that the grader put there did not come to its end")
        lidt    [rip + idt_register]
        mov     eax, 0x9000
        call    rax
        mov     al, [rip + count]
        out     0xf4, al
undefined:
        add     byte ptr [rip + count], 1
        add     qword ptr [rsp], 2
        iretq
count:  .byte   0
        .align  16
idt:    .space  6 * 16
        .word   undefined & 0xffff, 8, 0x8e00, undefined >> 16
        .long   0, 0
idt_end:
idt_register:
        .word   idt_end - idt - 1
        .quad   idt
