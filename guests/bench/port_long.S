# port_long - port writes and reads in a loop, for measuring what their exits cost
#
# At entry: ECX is how often to go round, and the entry says which loop: out1, out2, out4, in1,
# in2, in4, or empty, which does all that the others do but the access. Each ends in a write to
# port 0x11, which says that it is over. The port is in DX and ESI: 0x10 by choice of the host, or
# one that KVM itself answers.
# Each loop has a twin, tsc_NAME, that notes the time-stamp counter before and after the operation,
# fenced (SDM Vol.2, RDTSC): 16 bytes a time, at RDI on.
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

        .macro begin                    # EBP is the low half of when it began
        lfence
        rdtsc
        mov     ebp, eax
        mov     dword ptr [rdi + 4], edx
        mov     edx, esi                # the port
        lfence
        .endm

        .macro done
        lfence
        rdtsc
        lfence
        mov     dword ptr [rdi], ebp
        mov     dword ptr [rdi + 8], eax
        mov     dword ptr [rdi + 12], edx
        add     rdi, 16
        .endm

start:
empty:
        again   empty
tsc_empty:
        begin
        done
        again   tsc_empty
out1:
        out     dx, al
        again   out1
tsc_out1:
        begin
        out     dx, al
        done
        again   tsc_out1
out2:
        out     dx, ax
        again   out2
tsc_out2:
        begin
        out     dx, ax
        done
        again   tsc_out2
out4:
        out     dx, eax
        again   out4
tsc_out4:
        begin
        out     dx, eax
        done
        again   tsc_out4
in1:
        in      al, dx
        again   in1
tsc_in1:
        begin
        in      al, dx
        done
        again   tsc_in1
in2:
        in      ax, dx
        again   in2
tsc_in2:
        begin
        in      ax, dx
        done
        again   tsc_in2
in4:
        in      eax, dx
        again   in4
tsc_in4:
        begin
        in      eax, dx
        done
        again   tsc_in4
over:
        out     OVER, al
        jmp     over
