# protected - exercise 3.1
# mode: real
# variant: ("mode: real", "mode: protected", "it starts in protected mode, ring 0, not in real mode")
# variant: ("jmp     8:protected", "nop", "it writes 'P' in protected mode, 16-bit code, not in protected mode, 32-bit code")
        cli
        mov     al, 'R'
        out     0xe9, al
        lgdt    [gdtr]
        mov     eax, cr0
        or      al, 1
        mov     cr0, eax
        jmp     8:protected
        .code32
protected:
        mov     al, 'P'
        out     0xe9, al
        hlt
        .align  8
gdt:    .quad   0, 0x00cf9b000000ffff
gdtr:   .word   15
        .long   gdt
