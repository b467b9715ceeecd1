# string_long - REP OUTSB and REP INSB in a loop, for measuring what their exits cost
#
# At entry: EBX is how often to go round, ESI the end of the bytes to write, EBP where to read to,
# DX the port, and the entry says which loop: outs, ins, or empty. Each round is one REP instruction
# of 16 bytes. Each ends in a write to port 0x11, which says that it is over.
#
# mode: long
# load: 0x1000
# output: ""

        .equ OVER, 0x11
        .equ BYTES, 16

        .macro again name               # so often, and then over
        dec     ebx
        jnz     \name
        jmp     over
        .endm

start:
empty:
        mov     ecx, BYTES
        again   empty
outs:
        mov     ecx, BYTES
        sub     rsi, BYTES              # where the last round began
        rep outsb
        again   outs
ins:
        mov     ecx, BYTES
        mov     rdi, rbp
        rep insb
        again   ins
over:
        out     OVER, al
        jmp     over
