# ring3 - enters ring 3 with a TSS of its own, serves its system calls, and stops it
#
# Shows what separates a kernel from its programs: pages for the user and pages for the supervisor;
# IRETQ as the way into ring 3; a gate in the IDT as the way back, on the stack that the TSS names;
# and a privileged instruction that fails in ring 3. (Intel SDM Vol. 3, chapter "Protection"; "Task
# Management in 64-bit Mode"; "64-Bit Mode Stack Frame". AMD APM Vol. 2, "Privilege-Level
# Concept".)
#
# The program's system calls are INT3: EAX = 1 prints the text at RSI, EAX = 2 ends the program,
# with the exit code in EDI. The kernel hands that code to the debug-exit port: the status is
# (code << 1) | 1, as with QEMU's isa-debug-exit device.
#
# At entry: as hello_long. The guest replaces kvmpy's GDT, page tables and stack with its own.
#
# Memory: 0 to 2 MiB     kernel: this image at 0x1000, stacks, page tables; for the supervisor
#         2 MiB to 4 MiB the program and, at the end, its stack; for the user
#
# mode: long
# load: 0x1000
# memory: 16M
# output: "ring 3: a system call prints this\n"
# output: "ring 0: #GP, HLT is not for ring 3\n"
# output: "ring 3: and yet it goes on\n"
# exit: 7

        .equ CONSOLE, 0xe9
        .equ DEBUG_EXIT, 0xf4

        .equ KERNEL_CODE, 0x08          # selectors: offsets into the GDT at the end; those of
        .equ KERNEL_DATA, 0x10          #   ring 3 have 3 as their requested privilege level
        .equ USER_DATA, 0x18 | 3
        .equ USER_CODE, 0x20 | 3
        .equ TSS, 0x28

        .equ KERNEL_GATE, 0x8e00        # present, interrupt gate
        .equ USER_GATE, 0xee00          # the same with DPL 3: INT3 in ring 3 may use it

        .equ PML4, 0x10000
        .equ PDPT, 0x11000
        .equ PD, 0x12000
        .equ KERNEL_STACK, 0x20000      # while the kernel starts
        .equ ENTRY_STACK, 0x30000       # on entry from ring 3
        .equ USER_BASE, 0x200000
        .equ USER_STACK, 0x400000

        .equ PRESENT_WRITABLE, 0x03     # bits of a page-table entry
        .equ USER, 0x04                 # must be set in the entries of all levels
        .equ LARGE_PAGE, 0x80           # a PD entry that maps 2 MiB

        .equ RFLAGS_FIXED, 0x02         # the bit that is always set; interrupts stay off

        .equ CALL_PRINT, 1
        .equ CALL_EXIT, 2

start:
        cld
        lgdt    [rip + gdt_register]
        mov     eax, KERNEL_DATA
        mov     ss, ax
        mov     esp, KERNEL_STACK
        mov     ds, ax
        mov     es, ax
        push    KERNEL_CODE             # a far return loads CS from the new GDT
        lea     rax, [rip + new_segments]
        push    rax
        retfq
new_segments:
        lidt    [rip + idt_register]
        mov     eax, TSS
        ltr     ax                      # marks the TSS busy

        # Two pages of 2 MiB, one to one. The RAM of a new machine is zero, and so is what is not
        # written of the tables: nothing else is present.
        mov     qword ptr [PML4], PDPT | USER | PRESENT_WRITABLE
        mov     qword ptr [PDPT], PD | USER | PRESENT_WRITABLE
        mov     qword ptr [PD], 0 | LARGE_PAGE | PRESENT_WRITABLE
        mov     qword ptr [PD + 8], USER_BASE | LARGE_PAGE | USER | PRESENT_WRITABLE
        mov     eax, PML4
        mov     cr3, rax

        lea     rsi, [rip + program]
        mov     edi, USER_BASE
        mov     ecx, program_end - program
        rep movsb

        push    USER_DATA               # what IRETQ pops: SS,
        push    USER_STACK              #   RSP,
        push    RFLAGS_FIXED            #   RFLAGS,
        push    USER_CODE               #   CS,
        push    USER_BASE               #   RIP
        iretq

# INT3 in ring 3 comes here, on ENTRY_STACK. It is a trap: the saved RIP is that of the next
# instruction. The program expects RAX and RSI to change.
breakpoint:
        cmp     eax, CALL_EXIT
        je      end_program
        call    print
        iretq

end_program:
        mov     eax, edi
        out     DEBUG_EXIT, al
done:
        hlt
        jmp     done

# HLT in ring 3 comes here. It is a fault: the saved RIP is that of the HLT.
general_protection:
        lea     rsi, [rip + protection_text]
        call    print
        add     rsp, 8                  # the error code
        add     qword ptr [rsp], 1      # the saved RIP goes past HLT, one byte
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

protection_text:
        .asciz  "ring 0: #GP, HLT is not for ring 3\n"

# The program is copied to USER_BASE: its addresses are relative to RIP.
program:
        lea     rsi, [rip + call_text]
        mov     eax, CALL_PRINT
        int3
        hlt
        lea     rsi, [rip + end_text]
        mov     eax, CALL_PRINT
        int3
        mov     edi, 3
        mov     eax, CALL_EXIT
        int3
call_text:
        .asciz  "ring 3: a system call prints this\n"
end_text:
        .asciz  "ring 3: and yet it goes on\n"
program_end:

# Descriptors, from the lowest bit: limit 15:0, base 23:0, type and rights, limit 19:16, flags,
# base 31:24.
        .align  8
gdt:
        .quad   0                       # selector 0 is no segment
        .quad   0x00af9b000000ffff      # KERNEL_CODE: 64-bit code, ring 0
        .quad   0x00cf93000000ffff      # KERNEL_DATA: writable, ring 0
        .quad   0x00cff3000000ffff      # USER_DATA: writable, ring 3
        .quad   0x00affb000000ffff      # USER_CODE: 64-bit code, ring 3
        .word   tss_end - tss - 1, tss & 0xffff         # TSS: 16 bytes in long mode
        .byte   (tss >> 16) & 0xff, 0x89, 0, tss >> 24  #   0x89: present, available 64-bit TSS
        .long   0, 0                                    #   base 63:32, reserved
gdt_end:
gdt_register:
        .word   gdt_end - gdt - 1       # limit: the last valid offset
        .quad   gdt                     # base

# A gate, from the lowest bit: offset 15:0, selector, type and rights, offset 63:16, reserved.
        .align  16
idt:
        .space  3 * 16                  # vectors 0 to 2: not present
        .word   breakpoint & 0xffff, KERNEL_CODE, USER_GATE, breakpoint >> 16
        .long   0, 0
        .space  9 * 16                  # vectors 4 to 12
        .word   general_protection & 0xffff, KERNEL_CODE, KERNEL_GATE, general_protection >> 16
        .long   0, 0
idt_end:
idt_register:
        .word   idt_end - idt - 1
        .quad   idt

# In long mode a TSS is no task, but stack pointers for entries from less privileged rings.
        .align  8
tss:
        .long   0                       # reserved
        .quad   ENTRY_STACK             # RSP0
        .quad   0, 0                    # RSP1, RSP2
        .quad   0                       # reserved
        .quad   0, 0, 0, 0, 0, 0, 0     # IST1 to IST7
        .quad   0                       # reserved
        .word   0                       # reserved
        .word   tss_end - tss           # I/O bitmap: beyond the limit, so no port is for ring 3
tss_end:
