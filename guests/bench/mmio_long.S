# mmio_long - stores and loads where there is no RAM, in a loop, for measuring their exits
#
# At entry: ECX is how often to go round, RSI the address, and the entry says which loop:
# write1 to write8, read1 to read8, or empty, which does all that the others do but the access.
# Each ends in a write to port 0x11, which says that it is over.
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
write1:
        mov     byte ptr [rsi], al
        again   write1
tsc_write1:
        begin
        mov     byte ptr [rsi], al
        done
        again   tsc_write1
write2:
        mov     word ptr [rsi], ax
        again   write2
tsc_write2:
        begin
        mov     word ptr [rsi], ax
        done
        again   tsc_write2
write4:
        mov     dword ptr [rsi], eax
        again   write4
tsc_write4:
        begin
        mov     dword ptr [rsi], eax
        done
        again   tsc_write4
write8:
        mov     qword ptr [rsi], rax
        again   write8
tsc_write8:
        begin
        mov     qword ptr [rsi], rax
        done
        again   tsc_write8
read1:
        mov     al, byte ptr [rsi]
        again   read1
tsc_read1:
        begin
        mov     al, byte ptr [rsi]
        done
        again   tsc_read1
read2:
        mov     ax, word ptr [rsi]
        again   read2
tsc_read2:
        begin
        mov     ax, word ptr [rsi]
        done
        again   tsc_read2
read4:
        mov     eax, dword ptr [rsi]
        again   read4
tsc_read4:
        begin
        mov     eax, dword ptr [rsi]
        done
        again   tsc_read4
read8:
        mov     rax, qword ptr [rsi]
        again   read8
tsc_read8:
        begin
        mov     rax, qword ptr [rsi]
        done
        again   tsc_read8
over:
        out     OVER, al
        jmp     over
