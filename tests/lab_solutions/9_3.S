# mended - exercise 9.3
# mode: long
# memory: 16M
# variant: ("lgdt    [rip + gdt_register]", "nop", "it ended so: triple fault")
# variant: ("mov     cr3, rax", "nop", "CR3 is still that of kvmpy's tables")
# variant: ("[0x12000], 0x83", "[0x12000], 0x83; mov qword ptr [0x12008], 0x200083", "2 MiB are enough")
# variant: ("jmp     rax", "ud2", "memory at 0xa000 is 00 00")
        lgdt    [rip + gdt_register]
        lidt    [rip + idt_register]
        mov     esp, 0x20000
        mov     qword ptr [0x10000], 0x11003
        mov     qword ptr [0x11000], 0x12003
        mov     qword ptr [0x12000], 0x83
        mov     eax, 0x10000
        mov     cr3, rax
        mov     eax, 0x9000
        jmp     rax
handler:
        cld
        lea     rsi, [rip + text]
        mov     ecx, 7
next:
        lodsb
        out     0xe9, al
        dec     ecx
        jnz     next
        hlt
text:   .ascii  "mended\n"
        .align  8
gdt:    .quad   0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_end:
gdt_register:
        .word   gdt_end - gdt - 1
        .quad   gdt
        .align  16
idt:    .space  6 * 16
        .word   handler & 0xffff, 8, 0x8e00, handler >> 16
        .long   0, 0
idt_end:
idt_register:
        .word   idt_end - idt - 1
        .quad   idt
