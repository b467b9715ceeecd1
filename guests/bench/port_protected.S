# port_protected - port writes and reads in a loop, for measuring what their exits cost
#
# At entry: ECX is how often to go round, and the entry says which loop: out1, out2, out4, in1,
# in2, in4, or empty, which does all that the others do but the access. Each ends in a write to
# port 0x11, which says that it is over. The port is in DX: 0x10 by choice of the host, or one that
# KVM itself answers.
#
# mode: protected
# load: 0x1000
# output: ""

        .equ OVER, 0x11

start:
empty:
        dec     ecx
        jnz     empty
        jmp     over
out1:
        out     dx, al
        dec     ecx
        jnz     out1
        jmp     over
out2:
        out     dx, ax
        dec     ecx
        jnz     out2
        jmp     over
out4:
        out     dx, eax
        dec     ecx
        jnz     out4
        jmp     over
in1:
        in      al, dx
        dec     ecx
        jnz     in1
        jmp     over
in2:
        in      ax, dx
        dec     ecx
        jnz     in2
        jmp     over
in4:
        in      eax, dx
        dec     ecx
        jnz     in4
over:
        out     OVER, al
        jmp     over
