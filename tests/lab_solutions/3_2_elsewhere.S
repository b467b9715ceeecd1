# elsewhere - its page tables map one page to another one
# mode: protected
# words: "the page tables map 0x8000 to 0x9000, not one to one"
        .equ PML4, 0x20000
        .equ PDPT, 0x21000
        .equ PD, 0x22000
        .equ PT, 0x23000
        mov     dword ptr [PML4], PDPT | 3
        mov     dword ptr [PDPT], PD | 3
        mov     dword ptr [PD], PT | 3
        mov     edi, PT
        mov     eax, 3
        cld
next:
        stosd
        mov     dword ptr [edi], 0
        add     edi, 4
        add     eax, 4096
        cmp     eax, 0x200000
        jb      next
        mov     dword ptr [PT + 8*8], 0x9003
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
