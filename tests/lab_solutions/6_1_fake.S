# fake - runs the program in ring 0
# mode: long
# words: "the program ran in ring 0"
        mov     esp, 0x400000
        mov     eax, 0x200000
        jmp     rax
