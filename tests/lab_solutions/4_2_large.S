# large - takes the whole large page away
# mode: long
# words: "leads nowhere any more"
        mov     rsi, cr3
        mov     rsi, [rsi]
        and     rsi, -4096
        mov     rsi, [rsi]
        and     rsi, -4096
        mov     qword ptr [rsi + 8], 0
        hlt
