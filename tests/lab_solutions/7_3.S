# louder - exercise 7.3
# mode: long
# variant: ("jz      receive", "nop; nop", "it reads port 0x3f8 without having seen DR")
# variant: ("ja      send", "jae     send", "it prints")
# variant: ("jb      send", "jbe     send", "it prints")
# variant: ("cmp     bl, 'z'", "cmp bl, 0x7f", "it prints")
receive:
        mov     dx, 0x3fd
        in      al, dx
        test    al, 1
        jz      receive
        mov     dx, 0x3f8
        in      al, dx
        mov     bl, al
        cmp     bl, 'a'
        jb      send
        cmp     bl, 'z'
        ja      send
        sub     bl, 32
send:
        mov     dx, 0x3fd
        in      al, dx
        test    al, 0x20
        jz      send
        mov     dx, 0x3f8
        mov     al, bl
        out     dx, al
        cmp     bl, '\n'
        jne     receive
        hlt
