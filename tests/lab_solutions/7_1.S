# sensor - exercise 7.1
# mode: long
# variant: ("jz      wait", "nop; nop", "before the status says ready")
# variant: ("out     0xe9, al", "inc al; out 0xe9, al", "they part at byte 0")
wait:
        mov     dx, 0x301
        in      al, dx
        test    al, 1
        jz      wait
        dec     edx
        in      al, dx
        test    al, al
        jz      done
        out     0xe9, al
        jmp     wait
done:
        hlt
