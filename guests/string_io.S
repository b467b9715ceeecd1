# string_io - moves whole strings between memory and ports with REP OUTSB and REP INSB
#
# Shows string I/O: one instruction, repeated ECX times by the processor, moves bytes from DS:ESI
# to the port in DX (OUTS) or from that port to ES:EDI (INS). KVM may hand several of them over in
# one exit (KVM API, KVM_EXIT_IO, `count`). Disk drivers read sectors this way. (Intel SDM Vol. 2,
# INS and OUTS.)
#
# To have something to receive without a sender, the guest switches the 16550A serial port to
# loopback: what it sends comes back to its receiver FIFO, which holds 16 bytes. (National
# Semiconductor PC16550D data sheet, "Modem Control Register", bit 4.)
#
# At entry: as hello_protected. DS and ES are flat.
#
# mode: protected
# load: 0x1000
# output: "One instruction wrote this line.\n"
# output: "Sixteen letters\n"

        .equ CONSOLE, 0xe9
        .equ SERIAL_DATA, 0x3f8
        .equ FIFO_CONTROL, 0x3fa
        .equ MODEM_CONTROL, 0x3fc
        .equ LINE_STATUS, 0x3fd

        .equ FIFOS_ON_AND_CLEARED, 0x07 # FIFO control
        .equ LOOPBACK, 0x10             # modem control
        .equ ALL_SENT, 0x40             # line status: FIFO and shift register are empty

start:
        cld                             # string instructions are to go upwards
        mov     esi, offset line
        mov     ecx, line_end - line
        mov     dx, CONSOLE
        rep outsb

        mov     dx, FIFO_CONTROL
        mov     al, FIFOS_ON_AND_CLEARED
        out     dx, al
        mov     dx, MODEM_CONTROL
        mov     al, LOOPBACK
        out     dx, al

        mov     esi, offset letters
        mov     ecx, 16
        mov     dx, SERIAL_DATA
        rep outsb                       # as many as the transmitter FIFO holds
        mov     dx, LINE_STATUS
sending:
        in      al, dx
        test    al, ALL_SENT
        jz      sending                 # a real port takes its time for each bit

        mov     edi, offset buffer
        mov     ecx, 16
        mov     dx, SERIAL_DATA
        rep insb

        mov     dx, MODEM_CONTROL
        xor     eax, eax
        out     dx, al                  # loopback off
        mov     esi, offset buffer
        mov     ecx, 16
        mov     dx, CONSOLE
        rep outsb
done:
        hlt
        jmp     done

line:
        .ascii  "One instruction wrote this line.\n"
line_end:
letters:
        .ascii  "Sixteen letters\n"
buffer:
        .space  16
