# paging - builds page tables of its own: one page at two addresses, and a page without rights
#
# Shows a walk's four levels, made by hand: PML4, PDPT, PD and PT. Two linear addresses lead to the
# same page of RAM, so that what is written at one is read at the other. A third leads to a page
# that may only be read; with CR0.WP set that holds for ring 0 too, and the write is a #PF. Its
# handler prints the error code, and from then on the page is writable. (Intel SDM Vol. 3, chapter
# "Paging", "4-Level Paging" and "Access Rights"; AMD APM Vol. 2, "Long-Mode Page Translation".)
#
# Look at it afterwards with machine.view.map() and machine.view.walk(address): the processor has
# set the accessed and dirty bits of what was used.
#
# At entry: as hello_long. The guest replaces kvmpy's page tables, stack, IDT and GDT with its own:
# what kvmpy keeps at the top of RAM is not mapped any more, and the processor reads the GDT each
# time that it enters a handler.
#
# Linear: 0 to 2 MiB     this image at 0x1000, the tables, the stack: one page of 2 MiB
#         FIRST, SECOND  both lead to FRAME
#         GUARDED        leads to FRAME + 0x1000, read-only and not to be executed
#
# mode: long
# load: 0x1000
# memory: 16M
# output: "written at 0x40000000, read at 0x40001000: hello\n"
# output: "#PF, error code 0x3, CR2 0x40002008\n"
# output: "written after all\n"

        .equ CONSOLE, 0xe9
        .equ CODE64, 0x08               # the 64-bit code segment in the GDT below
        .equ INTERRUPT_GATE, 0x8e00

        .equ PML4, 0x10000
        .equ PDPT, 0x11000
        .equ PD_LOW, 0x12000            # for the GiB from 0 on
        .equ PD_HIGH, 0x13000           # for the GiB from FIRST on
        .equ PT, 0x14000
        .equ STACK, 0x20000
        .equ FRAME, 0x300000            # where the pages are in RAM: beyond the 2 MiB that are
                                        #   mapped one to one, so only FIRST and so on lead there
        .equ FIRST, 0x40000000          # 1 GiB: PML4 entry 0, PDPT entry 1, PD entry 0, PT entry 0
        .equ SECOND, 0x40001000         #                                                PT entry 1
        .equ GUARDED, 0x40002000        #                                                PT entry 2

        .equ PRESENT, 0x01              # bits of an entry, at every level
        .equ WRITABLE, 0x02
        .equ LARGE_PAGE, 0x80           # in a PD entry: it maps 2 MiB itself
        .equ NO_EXECUTE, 1 << 63        # EFER.NXE is set, or this bit would be reserved

start:
        cld
        lgdt    [rip + gdt_register]    # the same at the same selectors: CS and SS stay as they are
        lidt    [rip + idt_register]
        mov     esp, STACK              # kvmpy's will not be mapped

        # A new machine's RAM is zero: what is not written of a table is not present.
        mov     qword ptr [PML4], PDPT | WRITABLE | PRESENT
        mov     qword ptr [PDPT], PD_LOW | WRITABLE | PRESENT
        mov     qword ptr [PDPT + 8], PD_HIGH | WRITABLE | PRESENT
        mov     qword ptr [PD_LOW], 0 | LARGE_PAGE | WRITABLE | PRESENT
        mov     qword ptr [PD_HIGH], PT | WRITABLE | PRESENT
        mov     qword ptr [PT], FRAME | WRITABLE | PRESENT
        mov     qword ptr [PT + 8], FRAME | WRITABLE | PRESENT
        mov     rax, (FRAME + 0x1000) | NO_EXECUTE | PRESENT
        mov     [PT + 16], rax
        mov     eax, PML4
        mov     cr3, rax

        mov     rax, 0x006f6c6c6568     # "hello" and a zero byte
        mov     edi, FIRST
        mov     [rdi], rax
        lea     rsi, [rip + alias_text]
        call    print
        mov     esi, SECOND
        call    print
        mov     al, '\n'
        out     CONSOLE, al

        mov     edi, GUARDED + 8
        mov     byte ptr [rdi], '!'     # #PF, and once more after the handler
        lea     rsi, [rip + after_text]
        call    print
done:
        hlt
        jmp     done

# A fault: IRETQ goes back to the instruction that failed, and it is tried again.
page_fault:
        lea     rsi, [rip + fault_text]
        call    print
        pop     rax                     # the error code: P and W, 3
        add     al, '0'
        out     CONSOLE, al
        lea     rsi, [rip + address_text]
        call    print
        mov     rdx, cr2
        call    print_hex
        mov     al, '\n'
        out     CONSOLE, al
        or      qword ptr [PT + 16], WRITABLE
        mov     rax, cr2
        invlpg  [rax]                   # the old entry may be in the TLB
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
alias_text:     .asciz  "written at 0x40000000, read at 0x40001000: "
fault_text:     .asciz  "#PF, error code 0x"
address_text:   .asciz  ", CR2 0x"
after_text:     .asciz  "written after all\n"

        .align  8
gdt:
        .quad   0                       # selector 0 is no segment
        .quad   0x00af9b000000ffff      # CODE64: 64-bit code, ring 0
        .quad   0x00cf93000000ffff      # 0x10: writable data, ring 0
gdt_end:
gdt_register:
        .word   gdt_end - gdt - 1
        .quad   gdt

        .align  16
idt:
        .space  14 * 16                 # vectors 0 to 13: not present
        .word   page_fault & 0xffff, CODE64, INTERRUPT_GATE, page_fault >> 16
        .long   0, 0
idt_end:
idt_register:
        .word   idt_end - idt - 1
        .quad   idt
