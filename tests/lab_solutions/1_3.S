# string - exercise 1.3
# mode: long
# variant: ("rep outsb", "1: outsb; dec ecx; jnz 1b", "is written by another instruction than REP OUTSB")
# variant: ("[0x8000]", "[0x8000 + 1]", "it prints")
        cld
        mov     esi, 0x9000
        mov     ecx, [0x8000]
        mov     edx, 0xe9
        rep outsb
        hlt
