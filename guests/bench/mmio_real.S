# mmio_real - stores and loads where there is no RAM, in a loop, for measuring their exits
#
# At entry: ECX is how often to go round, DS:ESI the address, and the entry says which loop:
# write1 to write4, read1 to read4, or empty, which does all that the others do but the access.
# Each ends in a write to port 0x11, which says that it is over.
# Each loop has a twin, tsc_NAME, that notes the time-stamp counter before and after the operation,
# fenced (SDM Vol.2, RDTSC): 16 bytes a time, at ES:DI on.
#
# mode: real
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
        mov     dword ptr es:[edi + 4], edx
        lfence
        .endm

        .macro done
        lfence
        rdtsc
        lfence
        mov     dword ptr es:[edi], ebp
        mov     dword ptr es:[edi + 8], eax
        mov     dword ptr es:[edi + 12], edx
        add     edi, 16
        .endm

start:
empty:
        again   empty
tsc_empty:
        begin
        done
        again   tsc_empty
write1:
        mov     byte ptr [esi], al
        again   write1
tsc_write1:
        begin
        mov     byte ptr [esi], al
        done
        again   tsc_write1
write2:
        mov     word ptr [esi], ax
        again   write2
tsc_write2:
        begin
        mov     word ptr [esi], ax
        done
        again   tsc_write2
write4:
        mov     dword ptr [esi], eax
        again   write4
tsc_write4:
        begin
        mov     dword ptr [esi], eax
        done
        again   tsc_write4
read1:
        mov     al, byte ptr [esi]
        again   read1
tsc_read1:
        begin
        mov     al, byte ptr [esi]
        done
        again   tsc_read1
read2:
        mov     ax, word ptr [esi]
        again   read2
tsc_read2:
        begin
        mov     ax, word ptr [esi]
        done
        again   tsc_read2
read4:
        mov     eax, dword ptr [esi]
        again   read4
tsc_read4:
        begin
        mov     eax, dword ptr [esi]
        done
        again   tsc_read4
over:
        out     OVER, al
        jmp     over
