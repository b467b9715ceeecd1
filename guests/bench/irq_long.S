# irq_long - interrupt handlers that answer by a port write, for measuring the way to them
#
# The entry says how the guest waits: running (a loop that does nothing), halted (HLT), ready (a
# loop of writes to port 0x10, so that the host knows where it is). The handlers count at [COUNT]
# and write to port 0x12: that of vector 0x41 does no more, that of 0x40 ends the interrupt at the
# local APIC, and that of 0x42 notes the time-stamp counter first.
# ipi and init send such an interrupt, or INIT and SIPI, to the local APIC of ID 1, note the
# time-stamp counter before that, and write to port 0x10; each time again.
# empty is a loop of nothing, ECX times, which ends in a write to port 0x11.
#
# mode: long
# load: 0x1000
# output: ""

        .equ READY, 0x10
        .equ OVER, 0x11
        .equ DONE, 0x12
        .equ SENT_AT, 0x40000
        .equ CAME_AT, 0x40008
        .equ COUNT, 0x40010
        .equ CODE64, 0x08
        .equ INTERRUPT_GATE, 0x8e00
        .equ EOI, 0xfee000b0            # the local APIC's registers, SDM Vol.3 10.4.1
        .equ ICR_LOW, 0xfee00300
        .equ ICR_HIGH, 0xfee00310
        .equ TO_ONE, 1 << 24
        .equ FIXED, 0x4042              # asserted, vector 0x42; SDM Vol.3 10.6.1
        .equ INIT, 0x4500
        .equ SIPI, 0x4608               # to start at 0x8000

        .macro now place                # the time-stamp counter, fenced; changes EAX and EDX
        lfence
        rdtsc
        lfence
        mov     dword ptr [\place], eax
        mov     dword ptr [\place + 4], edx
        .endm

start:
empty:
        dec     ecx
        jnz     empty
over:
        out     OVER, al
        jmp     over

running:
        lidt    [rip + idt_register]
        sti
running_again:
        jmp     running_again

halted:
        lidt    [rip + idt_register]
        sti
halted_again:
        hlt
        jmp     halted_again

ready:
        lidt    [rip + idt_register]
        sti
ready_again:
        out     READY, al
        jmp     ready_again

ipi:
        mov     ebx, ICR_HIGH
        mov     ecx, ICR_LOW
        mov     dword ptr [rbx], TO_ONE
        now     SENT_AT
        mov     dword ptr [rcx], FIXED
        out     READY, al
        jmp     ipi

init:
        mov     ebx, ICR_HIGH
        mov     ecx, ICR_LOW
        mov     dword ptr [rbx], TO_ONE
        now     SENT_AT
        mov     dword ptr [rcx], INIT
        mov     dword ptr [rcx], SIPI
        out     READY, al
        jmp     init

at_apic:
        inc     dword ptr [COUNT]
        out     DONE, al
        mov     ebp, EOI
        mov     dword ptr [rbp], 0
        iretq

plain:
        inc     dword ptr [COUNT]
        out     DONE, al
        iretq

stamped:
        now     CAME_AT
        inc     dword ptr [COUNT]
        out     DONE, al
        mov     ebp, EOI
        mov     dword ptr [rbp], 0
        iretq

        .align  16
idt:
        .space  0x40 * 16
        .word   at_apic & 0xffff, CODE64, INTERRUPT_GATE, at_apic >> 16
        .long   0, 0
        .word   plain & 0xffff, CODE64, INTERRUPT_GATE, plain >> 16
        .long   0, 0
        .word   stamped & 0xffff, CODE64, INTERRUPT_GATE, stamped >> 16
        .long   0, 0
idt_end:
idt_register:
        .word   idt_end - idt - 1
        .quad   idt
