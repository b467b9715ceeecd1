# long - exercise 3.2
# mode: protected
# variant: ("mov     r15, [0x8000]", "mov r15d, [0x8000]", "r15 is")
# variant: ("PDPT | 3", "0x10000 | 3", "it ended so: triple fault")
# variant: ("or      eax, 0x20", "nop", "paging for long mode without CR4.PAE")
# variant: ("jmp     0x18:long", "hlt", "it never writes 'L'")
        .equ PML4, 0x20000
        .equ PDPT, 0x21000
        .equ PD, 0x22000
        mov     dword ptr [PML4], PDPT | 3
        mov     dword ptr [PDPT], PD | 3
        mov     dword ptr [PD], 0x83
        lgdt    [gdtr]
        mov     eax, cr4
        or      eax, 0x20
        mov     cr4, eax
        mov     eax, PML4
        mov     cr3, eax
        mov     ecx, 0xc0000080
        rdmsr
        or      eax, 0x100
        wrmsr
        mov     eax, cr0
        or      eax, 0x80000000
        mov     cr0, eax
        jmp     0x18:long
        .code64
long:
        mov     al, 'L'
        out     0xe9, al
        mov     r15, [0x8000]
        hlt
        .align  8
gdt:    .quad   0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00af9b000000ffff
gdtr:   .word   31
        .long   gdt
