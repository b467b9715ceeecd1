# exceptions - handles #DE, #GP and #PF in long mode, and goes on after each
#
# Shows an IDT: 16-byte gates through which the processor enters a handler, the stack frame that
# it pushes, the error code that some exceptions have, and IRETQ. (Intel SDM Vol. 3, chapter
# "Interrupt and Exception Handling", "64-Bit Mode IDT" and "64-Bit Mode Stack Frame".)
#
# All three are faults: the saved RIP is that of the instruction that failed, so that it could be
# tried again. This guest wants to go on after it instead: before each it leaves in RBX the address
# to go on at, and the handlers put that into the saved RIP.
#
# At entry: as hello_long. The GDT is kvmpy's, the IDT is empty.
#
# mode: long
# load: 0x1000
# output: "#DE divide error\n"
# output: "#GP general protection, error code 0xfff8\n"
# output: "#PF page fault, error code 0x2, CR2 0x123456789000\n"
# output: "Still running\n"

        .equ CONSOLE, 0xe9
        .equ CODE64, 0x08               # the 64-bit code segment in kvmpy's GDT
        .equ BAD_SELECTOR, 0xfff8       # far beyond the GDT's limit
        .equ BAD_ADDRESS, 0x123456789000        # mapped by no page table
        .equ INTERRUPT_GATE, 0x8e00     # present, for ring 0, type 14: enters with RFLAGS.IF clear

start:
        cld
        lidt    [rip + idt_register]

        lea     rbx, [rip + after_divide]
        mov     eax, 1
        xor     edx, edx
        xor     ecx, ecx
        div     ecx                     # #DE: division by zero
after_divide:
        lea     rbx, [rip + after_selector]
        mov     eax, BAD_SELECTOR
        mov     es, ax                  # #GP, and the error code is the selector
after_selector:
        lea     rbx, [rip + after_write]
        mov     rax, BAD_ADDRESS
        mov     [rax], al               # #PF: a write (error code bit 1), page not present (bit 0)
after_write:
        lea     rsi, [rip + end_text]
        call    print
done:
        hlt
        jmp     done

# The processor enters a handler with this on the stack:
#     RSP + 40  SS
#     RSP + 32  RSP
#     RSP + 24  RFLAGS
#     RSP + 16  CS
#     RSP + 8   RIP
#     RSP + 0   error code; #DE has none, and all the others are 8 bytes lower
# A handler of a real system saves all registers. Here the code above keeps nothing in them.

divide_error:
        lea     rsi, [rip + divide_text]
        call    print
        mov     [rsp], rbx              # the saved RIP
        iretq

general_protection:
        lea     rsi, [rip + protection_text]
        call    print
        pop     rdx                     # the error code: IRETQ expects RIP on top of the stack
        call    print_hex
        mov     al, '\n'
        out     CONSOLE, al
        mov     [rsp], rbx
        iretq

page_fault:
        lea     rsi, [rip + page_text]
        call    print
        pop     rdx
        call    print_hex
        lea     rsi, [rip + address_text]
        call    print
        mov     rdx, cr2                # the linear address that was accessed
        call    print_hex
        mov     al, '\n'
        out     CONSOLE, al
        mov     [rsp], rbx
        iretq

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

digits:         .ascii  "0123456789abcdef"
divide_text:    .asciz  "#DE divide error\n"
protection_text: .asciz "#GP general protection, error code 0x"
page_text:      .asciz  "#PF page fault, error code 0x"
address_text:   .asciz  ", CR2 0x"
end_text:       .asciz  "Still running\n"

# A gate, from the lowest bit: offset 15:0, selector, type and rights, offset 63:16, reserved.
# A gate of zeros is not present; an exception that meets one ends in a triple fault here.
        .align  16
idt:
        .word   divide_error & 0xffff, CODE64, INTERRUPT_GATE, divide_error >> 16
        .long   0, 0
        .space  12 * 16                 # vectors 1 to 12
        .word   general_protection & 0xffff, CODE64, INTERRUPT_GATE, general_protection >> 16
        .long   0, 0
        .word   page_fault & 0xffff, CODE64, INTERRUPT_GATE, page_fault >> 16
        .long   0, 0
idt_end:
idt_register:
        .word   idt_end - idt - 1       # limit: the last valid offset
        .quad   idt                     # base
