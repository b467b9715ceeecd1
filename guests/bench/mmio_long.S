# mmio_long - stores and loads where there is no RAM, in a loop, for measuring their exits
#
# At entry: ECX is how often to go round, EDI the address, and the entry says which loop: write1,
# write2, write4, write8, read1 to read8, or empty, which does all that the others do but the
# access. Each ends in a write to port 0x11, which says that it is over.
#
# mode: long
# load: 0x1000
# output: ""

        .equ OVER, 0x11

start:
empty:
        dec     ecx
        jnz     empty
        jmp     over
write1:
        mov     byte ptr [rdi], al
        dec     ecx
        jnz     write1
        jmp     over
write2:
        mov     word ptr [rdi], ax
        dec     ecx
        jnz     write2
        jmp     over
write4:
        mov     dword ptr [rdi], eax
        dec     ecx
        jnz     write4
        jmp     over
write8:
        mov     qword ptr [rdi], rax
        dec     ecx
        jnz     write8
        jmp     over
read1:
        mov     al, byte ptr [rdi]
        dec     ecx
        jnz     read1
        jmp     over
read2:
        mov     ax, word ptr [rdi]
        dec     ecx
        jnz     read2
        jmp     over
read4:
        mov     eax, dword ptr [rdi]
        dec     ecx
        jnz     read4
        jmp     over
read8:
        mov     rax, qword ptr [rdi]
        dec     ecx
        jnz     read8
over:
        out     OVER, al
        jmp     over
