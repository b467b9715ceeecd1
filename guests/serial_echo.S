# serial_echo - sends back what comes in at the serial port, up to the end of the line
#
# Shows programmed I/O with a real device, the 16550A UART that a PC has at port 0x3f8 (COM1):
# setting it up, and polling its line status register, for a byte received and for room to send.
# (National Semiconductor PC16550D data sheet, section "Registers".)
#
# Under `kvmpy run` the port receives standard input, and what it sends goes to standard output.
# The guest ends at a newline or at EOT (Ctrl-D); until then it polls, even if no input comes.
#
# At entry: as hello_long.
#
# mode: long
# load: 0x1000
# input: "Hello, serial port\n"
# output: "Hello, serial port\n"

        .equ DATA, 0x3f8                # receiver buffer (read), transmitter holding (write);
                                        #   low byte of the divisor while DLAB is set
        .equ INTERRUPT_ENABLE, 0x3f9    # high byte of the divisor while DLAB is set
        .equ FIFO_CONTROL, 0x3fa
        .equ LINE_CONTROL, 0x3fb
        .equ LINE_STATUS, 0x3fd

        .equ DLAB, 0x80                 # line control: the first two ports are the divisor
        .equ EIGHT_BITS, 0x03           # line control: 8 bits, no parity, 1 stop bit
        .equ FIFOS_ON, 0x01             # FIFO control
        .equ DATA_READY, 0x01           # line status: a byte has come in
        .equ THR_EMPTY, 0x20            # line status: a byte can be sent

        .equ EOT, 0x04

start:
        mov     dx, LINE_CONTROL        # a port above 0xff has to be in DX
        mov     al, DLAB
        out     dx, al
        mov     dx, DATA
        mov     al, 1                   # divisor 1: 115200 baud
        out     dx, al
        mov     dx, INTERRUPT_ENABLE
        xor     eax, eax
        out     dx, al                  # high byte of the divisor
        mov     dx, LINE_CONTROL
        mov     al, EIGHT_BITS
        out     dx, al                  # and DLAB is clear again
        mov     dx, INTERRUPT_ENABLE
        xor     eax, eax
        out     dx, al                  # no interrupts: this guest polls
        mov     dx, FIFO_CONTROL
        mov     al, FIFOS_ON
        out     dx, al

receive:
        mov     dx, LINE_STATUS
        in      al, dx
        test    al, DATA_READY
        jz      receive
        mov     dx, DATA
        in      al, dx
        cmp     al, EOT
        je      done
        mov     bl, al                  # AL is needed for the line status

send:
        mov     dx, LINE_STATUS
        in      al, dx
        test    al, THR_EMPTY
        jz      send
        mov     dx, DATA
        mov     al, bl
        out     dx, al
        cmp     al, '\n'
        jne     receive

done:
        hlt
        jmp     done
