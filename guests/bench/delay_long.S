# delay_long - waits for a time that the host knows, for checking the host's clock against it
#
# At entry: RSI is how many ticks of the time-stamp counter to wait. Then it writes to port 0x11,
# which says that it is over. empty is a loop of nothing, ECX times, with the same end.
#
# mode: long
# load: 0x1000
# output: ""

        .equ OVER, 0x11

        .macro now register             # the time-stamp counter; changes RAX and RDX
        rdtsc
        shl     rdx, 32
        or      rax, rdx
        mov     \register, rax
        .endm

start:
wait:
        now     rbx
        add     rbx, rsi                # when it is over
again:
        now     rcx
        cmp     rcx, rbx
        jb      again
        jmp     over
empty:
        dec     ecx
        jnz     empty
over:
        out     OVER, al
        jmp     over
