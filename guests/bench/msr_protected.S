# msr_protected - RDMSR and WRMSR that user space answers, in a loop, for measuring their exits
#
# At entry: ECX is how often to go round, and the entry says which loop: read, write, or empty.
# The MSR is one that KVM does not know. The counter is in ESI, since the MSR's number needs ECX.
# Each ends in a write to port 0x11, which says that it is over.
#
# mode: protected
# load: 0x1000
# output: ""

        .equ OVER, 0x11
        .equ UNKNOWN, 0x12345678

        .macro again name               # so often, and then over
        dec     esi
        jnz     \name
        jmp     over
        .endm

start:
empty:
        mov     esi, ecx
empty_again:
        again   empty_again
read:
        mov     esi, ecx
        mov     ecx, UNKNOWN
read_again:
        rdmsr
        again   read_again
write:
        mov     esi, ecx
        mov     ecx, UNKNOWN
write_again:
        wrmsr
        again   write_again
over:
        out     OVER, al
        jmp     over
