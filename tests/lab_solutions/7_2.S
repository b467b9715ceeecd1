# queue - exercise 7.2
# mode: long
# variant: ("add     eax, [rbx + 4]", "add rax, [rbx + 4]", "to address 0xd0000008, not 0x6")
# variant: ("mov     ecx, [rbx]", "mov ecx, [rbx]; mov ecx, [rbx]", "MMIO reads: 5, but 4 were expected")
        mov     ebx, 0xd0000000
        xor     eax, eax
        mov     ecx, [rbx]
        jecxz   done
next:
        add     eax, [rbx + 4]
        dec     ecx
        jnz     next
done:
        mov     [rbx + 8], eax
        hlt
