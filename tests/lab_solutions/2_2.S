# sum - exercise 2.2
# mode: long
# variant: ("add     rax, rcx", "add rax, rcx; out 0x80, al", "exits: 2, but 1 were expected")
# variant: ("[0x8008]", "[0x8010]", "memory at 0x8008 is 00 00")
        mov     rcx, [0x8000]
        xor     eax, eax
next:
        test    rcx, rcx
        jz      done
        add     rax, rcx
        dec     rcx
        jmp     next
done:
        mov     [0x8008], rax
        hlt
