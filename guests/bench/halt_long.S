# halt_long - HLT in a loop, for measuring what its exit costs
#
# At entry: ECX is how often to go round, and the entry says which loop: halt, or empty, which does
# all that the other does but HLT. Each ends in a write to port 0x11, which says that it is over.
#
# mode: long
# load: 0x1000
# output: ""

        .equ OVER, 0x11

        .macro again name               # so often, and then over
        dec     ecx
        jnz     \name
        jmp     over
        .endm

start:
empty:
        again   empty
halt:
        hlt
        again   halt
over:
        out     OVER, al
        jmp     over
