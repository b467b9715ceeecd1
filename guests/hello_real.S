# hello_real - prints a line from 16-bit real mode
#
# Shows the mode in which every x86 processor starts after a reset: 16-bit registers and offsets,
# no paging, no protection. The address of a byte is segment * 16 + offset. (Intel SDM Vol. 3,
# chapter "8086 Emulation", "Real-Address Mode"; AMD APM Vol. 2, "Real Mode".)
#
# At entry: CS, DS and ES are 0, so that an offset is the address itself. IP is 0x7c00, where a
# PC's firmware loads a boot sector. SS:SP is an empty stack. Interrupts are off.
#
# A byte written to port 0xe9, the debug console that Bochs and QEMU also have, is printed. OUT
# leaves the guest for the hypervisor at each byte, and so does HLT, which ends the guest.
#
# mode: real
# load: 0x7c00
# output: "Hello from real mode\n"

        .equ CONSOLE, 0xe9

start:
        mov     si, offset message
        cld                             # LODSB is to go upwards
next:
        lodsb                           # AL = the byte at DS:SI; SI = SI + 1
        test    al, al
        jz      done                    # a zero byte ends the text
        out     CONSOLE, al
        jmp     next
done:
        hlt
        jmp     done                    # on a real machine, an NMI ends a HLT

message:
        .asciz  "Hello from real mode\n"
