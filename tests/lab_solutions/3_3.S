# back - exercise 3.3
# mode: long
# variant: ("and     eax, 0xfffffeff", "nop", "still set at the end: EFER.LME")
# variant: ("and     eax, 0x7fffffff", "nop", "it never writes '3'")
        mov     al, '6'
        out     0xe9, al
        lgdt    [gdtr]
        jmp     far [there]
        .code32
compatible:
        mov     eax, 0x10
        mov     ss, ax
        mov     ds, ax
        mov     al, '4'
        out     0xe9, al
        mov     eax, cr0
        and     eax, 0x7fffffff
        mov     cr0, eax
        mov     ecx, 0xc0000080
        rdmsr
        and     eax, 0xfffffeff
        wrmsr
        mov     al, '3'
        out     0xe9, al
        hlt
        .align  8
there:  .long   compatible
        .word   8
gdt:    .quad   0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdtr:   .word   23
        .quad   gdt
