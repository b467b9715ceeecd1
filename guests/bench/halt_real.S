# halt_real - HLT in a loop, for measuring what its exit costs
#
# At entry: the entry says which loop: halt, or empty, which goes round ECX times without HLT. The
# host ends the first; the second ends in a write to port 0x11, which says that it is over.
#
# mode: real
# load: 0x1000
# output: ""

        .equ OVER, 0x11

start:
halt:
        hlt
        jmp     halt
empty:
        dec     ecx
        jnz     empty
over:
        out     OVER, al
        jmp     over
