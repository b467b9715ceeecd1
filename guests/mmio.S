# mmio - writes and reads 1, 2, 4 and 8 bytes at an address where there is no RAM
#
# Shows memory-mapped I/O. A plain MOV to an address that no memory slot backs leaves the guest;
# KVM decodes the instruction and hands address, size and data to the hypervisor (KVM API,
# KVM_EXIT_MMIO), which asks its devices. For a read it waits for their answer.
#
# No device claims the address unless you attach one: the writes are dropped, the reads give all
# ones as on an empty bus, and kvmpy reports both (with --strict, the first ends the guest). With
# storage there instead,
#     registers = {}
#     @machine.on_mmio(0xd0000000)
#     def storage(offset, size, value):
#         return registers.get(offset, 0) if value is None else registers.update({offset: value})
# the guest reads back what it wrote: 0x11, 0x2211, 0x44332211 and 0x8877665544332211.
#
# At entry: as hello_long. The page tables map the address, although no RAM is there.
#
# mode: long
# load: 0x1000
# output: "1 byte:  0xff\n"
# output: "2 bytes: 0xffff\n"
# output: "4 bytes: 0xffffffff\n"
# output: "8 bytes: 0xffffffffffffffff\n"

        .equ CONSOLE, 0xe9
        .equ DEVICE, 0xd0000000         # in the hole that PCs leave below 4 GiB for devices

start:
        cld
        mov     ebx, DEVICE             # writing EBX clears the upper half of RBX
        mov     rax, 0x8877665544332211
        mov     [rbx], al
        mov     [rbx + 8], ax
        mov     [rbx + 16], eax
        mov     [rbx + 24], rax

        lea     rsi, [rip + one]
        xor     edx, edx
        mov     dl, [rbx]
        call    report
        lea     rsi, [rip + two]
        xor     edx, edx
        mov     dx, [rbx + 8]
        call    report
        lea     rsi, [rip + four]
        mov     edx, [rbx + 16]
        call    report
        lea     rsi, [rip + eight]
        mov     rdx, [rbx + 24]
        call    report

done:
        hlt
        jmp     done

# Print the text at RSI, RDX in hexadecimal, and a newline.
report:
        call    print
        call    print_hex
        mov     al, '\n'
        out     CONSOLE, al
        ret

# Print the text at RSI, which a zero byte ends. Changes AL and RSI.
print:
        lodsb
        test    al, al
        jz      printed
        out     CONSOLE, al
        jmp     print
printed:
        ret

# Print RDX in hexadecimal: first, by calling itself, all digits but the last. Changes RAX and RDX.
print_hex:
        push    rdx
        shr     rdx, 4
        jz      last_digit
        call    print_hex
last_digit:
        pop     rdx
        and     edx, 0xf
        lea     rax, [rip + digits]
        mov     al, [rax + rdx]
        out     CONSOLE, al
        ret

digits: .ascii  "0123456789abcdef"
one:    .asciz  "1 byte:  0x"
two:    .asciz  "2 bytes: 0x"
four:   .asciz  "4 bytes: 0x"
eight:  .asciz  "8 bytes: 0x"
