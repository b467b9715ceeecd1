# hello_protected - prints a line from 32-bit protected mode
#
# Shows the mode that 32-bit systems run in. A segment register holds a selector, the place of a
# descriptor in the GDT; the descriptor gives base, limit and rights. (Intel SDM Vol. 3, chapter
# "Protected-Mode Memory Management", "Basic Flat Model".)
#
# At entry: CR0.PE is set and paging is off, so a linear address is a physical one. The segments
# are flat: base 0, limit 4 GiB. CS is a 32-bit code segment of ring 0. ESP is an empty stack.
# The IDT is empty, so an exception would end in a triple fault.
#
# Compare hello_real: the loop is the same, SI has become ESI. See boot_sector for a guest that
# comes to protected mode by itself.
#
# mode: protected
# load: 0x1000
# output: "Hello from protected mode\n"

        .equ CONSOLE, 0xe9

start:
        mov     esi, offset message
        cld                             # LODSB is to go upwards
next:
        lodsb                           # AL = the byte at DS:ESI; ESI = ESI + 1
        test    al, al
        jz      done                    # a zero byte ends the text
        out     CONSOLE, al
        jmp     next
done:
        hlt
        jmp     done                    # on a real machine, an NMI ends a HLT

message:
        .asciz  "Hello from protected mode\n"
