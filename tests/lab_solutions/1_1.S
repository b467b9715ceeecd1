# first - exercise 1.1
# mode: long
# variant: ("hlt", "out 0xf4, al", "it ended so: the guest wrote to the debug-exit device")
# variant: ("first", "First", "they part at byte 0")
        lea     rsi, [rip + text]
        cld
next:
        lodsb
        test    al, al
        jz      done
        out     0xe9, al
        jmp     next
done:
        hlt
        jmp     done
text:   .asciz  "first\n"
