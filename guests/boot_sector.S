# boot_sector - takes itself from real mode through protected mode to long mode, in 512 bytes
#
# Shows what an operating system's first instructions do: a GDT of its own, CR0.PE and a far jump
# into 32-bit code; then page tables of its own, CR4.PAE, CR3, EFER.LME, CR0.PG and a far jump
# into 64-bit code. (Intel SDM Vol. 3, chapter "Processor Management and Initialization",
# "Switching to Protected Mode" and "Initializing IA-32e Mode".)
#
# At entry: real mode at 0x7c00, where a PC's firmware puts the first sector of a disk. Nothing
# else is taken for granted. The last two bytes, 55 AA, tell the firmware that it is a boot sector.
#
# Memory: 0x1000 PML4   0x2000 PDPT   0x3000 PD   ... 0x7c00 stack, growing down; the sector above
#
# mode: real
# load: 0x7c00
# memory: 1M
# output: "Real mode\n"
# output: "Protected mode\n"
# output: "Long mode\n"

        .equ CONSOLE, 0xe9

        .equ CODE32, 0x08               # selectors: offsets into the GDT at the end
        .equ DATA, 0x10
        .equ CODE64, 0x18

        .equ CR0_PE, 1 << 0             # protection enable
        .equ CR0_PG, 1 << 31            # paging
        .equ CR4_PAE, 1 << 5            # page-table entries of 64 bits
        .equ EFER, 0xc0000080           # the number of this MSR
        .equ EFER_LME, 1 << 8           # long mode enable

        .equ PML4, 0x1000               # each maps 512 times as much as the one after it
        .equ PDPT, 0x2000
        .equ PD, 0x3000
        .equ TABLE_DWORDS, 3 * 4096 / 4
        .equ PRESENT_WRITABLE, 0x3      # bits of a page-table entry
        .equ LARGE_PAGE, 0x80           # this PD entry maps 2 MiB, there is no fourth table

        .code16
start:
        jmp     0:real                  # some firmware comes as 07c0:0000, which is here too
real:
        cli                             # no interrupts: there will be no IDT for them
        cld
        xor     ax, ax
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     sp, 0x7c00
        mov     si, offset real_text
        call    print

        lgdt    [gdt_register]
        mov     eax, cr0
        or      eax, CR0_PE
        mov     cr0, eax
        jmp     CODE32:protected        # loads CS, and with it the code size

        .code32
protected:
        mov     ax, DATA                # the other segment registers still have their real-mode
        mov     ds, ax                  #   bases and limits
        mov     es, ax
        mov     ss, ax
        mov     esp, 0x7c00
        mov     esi, offset protected_text
        call    print

        mov     edi, PML4               # three empty tables ...
        mov     ecx, TABLE_DWORDS
        xor     eax, eax
        rep stosd
        mov     dword ptr [PML4], PDPT | PRESENT_WRITABLE       # ... and one entry in each
        mov     dword ptr [PDPT], PD | PRESENT_WRITABLE
        mov     dword ptr [PD], 0 | LARGE_PAGE | PRESENT_WRITABLE       # 0 to 2 MiB, one to one

        mov     eax, cr4
        or      eax, CR4_PAE
        mov     cr4, eax
        mov     eax, PML4
        mov     cr3, eax
        mov     ecx, EFER
        rdmsr                           # EDX:EAX = the MSR that ECX names
        or      eax, EFER_LME
        wrmsr
        mov     eax, cr0
        or      eax, CR0_PG             # long mode is active from here on, still with 32-bit code
        mov     cr0, eax
        jmp     CODE64:long             # a code segment with the L bit: 64-bit code

        .code64
long:
        mov     rsp, 0x7c00             # the upper half of RSP was undefined
        lea     rsi, [rip + long_text]
        call    print
done:
        hlt
        jmp     done

# Print the text at SI, ESI or RSI. The bytes of this routine mean the same in all three modes:
# LODSB and RET take the width of the mode's registers and stack.
print:
        lodsb
        test    al, al
        jz      printed
        out     CONSOLE, al
        jmp     print
printed:
        ret

real_text:
        .asciz  "Real mode\n"
protected_text:
        .asciz  "Protected mode\n"
long_text:
        .asciz  "Long mode\n"

# Descriptors, from the lowest bit: limit 15:0, base 23:0, type and rights, limit 19:16, flags,
# base 31:24.
        .align  8
gdt:
        .quad   0                       # selector 0 is no segment
        .quad   0x00cf9b000000ffff      # CODE32: base 0, limit 4 GiB, 32-bit code, ring 0
        .quad   0x00cf93000000ffff      # DATA: base 0, limit 4 GiB, writable, ring 0
        .quad   0x00af9b000000ffff      # CODE64: the same with the L bit instead of D
gdt_end:
gdt_register:
        .word   gdt_end - gdt - 1       # limit: the last valid offset
        .long   gdt                     # base

        .org    510
        .byte   0x55, 0xaa
