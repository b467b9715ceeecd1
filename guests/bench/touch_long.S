# touch_long - one store into each page of a range, for measuring what the first touch costs
#
# At entry: ECX is how many pages to touch, RDI the first of them, and the entry says which loop:
# touch, or empty, which does all that the other does but the access. Each ends in a write to port
# 0x11, which says that it is over.
#
# mode: long
# load: 0x1000
# output: ""

        .equ OVER, 0x11
        .equ PAGE, 4096

start:
empty:
        add     rdi, PAGE
        dec     ecx
        jnz     empty
        jmp     over
touch:
        mov     byte ptr [rdi], al
        add     rdi, PAGE
        dec     ecx
        jnz     touch
over:
        out     OVER, al
        jmp     over
