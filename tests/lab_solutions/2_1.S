# squares - exercise 2.1
# mode: long
# variant: ("imul    eax, eax", "nop", "it writes 0x3 to port 0x61, not 0x9")
# variant: ("jz      done", "nop; nop", "it did not end")
next:
        in      eax, 0x60
        test    eax, eax
        jz      done
        imul    eax, eax
        out     0x61, eax
        jmp     next
done:
        hlt
