# patch - makes NOPs of the UD2s: no exception is ever raised
# mode: long
# words: "not 0x"
        mov     edi, 0x9000
next:
        cmp     word ptr [rdi], 0x0b0f
        jne     other
        mov     word ptr [rdi], 0x9090
other:
        inc     edi
        cmp     edi, 0x9200
        jne     next
        mov     eax, 0x9000
        call    rax
        mov     al, 0
        out     0xf4, al
