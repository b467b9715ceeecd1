# cheat - writes to the frame, and maps nothing
# mode: long
# words: "ends nowhere: the PML4 entry at"
        mov     rdx, [0x8008]
        mov     [0x300000], rdx
        hlt
