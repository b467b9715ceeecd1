# string - the right letters, in fewer exits than the exercise wants
# mode: long
# words: "were expected"
        lea     rsi, [rip + text]
        mov     ecx, 5
        mov     edx, 0xe9
        cld
        rep outsb
        mov     al, '\n'
        out     0xe9, al
        out     0x80, al
        hlt
text:   .ascii  "first"
