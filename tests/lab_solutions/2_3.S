# vendor - exercise 2.3
# mode: long
# variant: ("mov     eax, ecx", "mov eax, ebx", "they part at byte 8")
# variant: ("cpuid", "mov ebx, 0x756e6547; mov edx, 0x49656e69; mov ecx, 0x6c65746e", "it prints 'GenuineIntel', not")
        xor     eax, eax
        cpuid
        mov     eax, ebx
        call    print
        mov     eax, edx
        call    print
        mov     eax, ecx
        call    print
        hlt
print:
        mov     esi, 4
next:
        out     0xe9, al
        shr     eax, 8
        dec     esi
        jnz     next
        ret
