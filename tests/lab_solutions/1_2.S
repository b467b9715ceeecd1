# dots - exercise 1.2
# mode: long
# variant: ("mov     eax, ebx", "xor     eax, eax", "with 1 at 0x8000: it ends by writing 0x0 to port 0xf4, not 0x1")
        mov     ecx, [0x8000]
        mov     ebx, ecx
        mov     al, '.'
        jecxz   done
next:
        out     0xe9, al
        dec     ecx
        jnz     next
done:
        mov     eax, ebx
        out     0xf4, eax
