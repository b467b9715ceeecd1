# hello_long - prints a line from 64-bit long mode
#
# Shows the mode that 64-bit systems run in. Segments have no base and no limit here; paging, which
# cannot be switched off, does their work. (Intel SDM Vol. 3, "Initializing IA-32e Mode"; AMD APM
# Vol. 2, chapter "Processor Initialization and Long Mode Activation".)
#
# At entry: EFER.LMA and CR0.PG are set, and kvmpy's page tables map the first 4 GiB one to one,
# for ring 0 only. CS is a 64-bit code segment. RSP is an empty stack. The IDT is empty, so an
# exception would end in a triple fault.
#
# Compare hello_protected: new is [rip + message], an address counted from the instruction after
# it, so that the code runs wherever it is loaded.
#
# mode: long
# load: 0x1000
# output: "Hello from long mode\n"

        .equ CONSOLE, 0xe9

start:
        lea     rsi, [rip + message]
        cld                             # LODSB is to go upwards
next:
        lodsb                           # AL = the byte at RSI; RSI = RSI + 1
        test    al, al
        jz      done                    # a zero byte ends the text
        out     CONSOLE, al
        jmp     next
done:
        hlt
        jmp     done                    # on a real machine, an NMI ends a HLT

message:
        .asciz  "Hello from long mode\n"
