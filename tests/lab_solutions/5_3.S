# letters - exercise 5.3
# mode: long
# variant: ("sti", "nop", "times the guest asked and could not take an interrupt")
# variant: ("in      al, 0x11", "in      al, 0x11; in al, 0x11", "times when no byte was there")
# variant: ("out     0xe9, al", "nop", "prints nothing")
# variant: ("out     0x10, al", "out     0x10, al; nop; out 0x10, al", "they part at byte")
        lea     rdi, [rip + idt]
        mov     eax, [0x8000]
        shl     eax, 4
        add     rdi, rax
        mov     eax, offset letter
        mov     [rdi], ax
        mov     word ptr [rdi + 2], 8
        mov     word ptr [rdi + 4], 0x8e00
        lidt    [rip + idt_register]
        sti
        nop
next:
        mov     ebx, 1
        out     0x10, al
wait:
        cmp     ebx, 1
        je      wait
        test    bl, bl
        jz      done
        mov     al, bl
        out     0xe9, al
        jmp     next
done:
        hlt
letter:
        push    rax
        xor     ebx, ebx
        in      al, 0x11
        mov     bl, al
        pop     rax
        iretq
        .align  16
idt:    .space  256 * 16
idt_end:
idt_register:
        .word   idt_end - idt - 1
        .quad   idt
