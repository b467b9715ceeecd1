# primes - counts the primes below a million in ring 3, where guest code runs natively
#
# Shows that a virtual machine computes at the processor's own speed: no instruction of the sieve
# needs the hypervisor, so that its millions of steps take milliseconds. It is the sieve of
# Eratosthenes: cross out the multiples of each prime, and count what is left.
#
# At entry: 64-bit code in ring 3. kvmpy's page tables open all memory below its own area to the
# user, and the TSS's I/O permission bitmap opens all ports (Intel SDM Vol. 1, "I/O Permission Bit
# Map"). An exception would be reported by kvmpy as the guest's end. RSP is an empty stack.
#
# HLT is for ring 0, so the guest ends by power-off: 0x2000 to port 0x604, as under QEMU.
#
# Memory: 1 MiB upwards, a byte for each number: 0 for a prime, 1 for a composite number
#
# mode: long
# ring: 3
# load: 0x1000
# memory: 4M
# output: "78498 primes below 1000000\n"

        .equ CONSOLE, 0xe9
        .equ POWER, 0x604
        .equ POWER_OFF, 0x2000

        .equ LIMIT, 1000000
        .equ COMPOSITE, 0x100000

start:
        cld
        mov     edi, COMPOSITE
        mov     ecx, LIMIT
        xor     eax, eax
        rep stosb                       # no number is crossed out yet

        mov     edi, COMPOSITE
        xor     ebx, ebx                # RBX = the primes counted
        mov     ecx, 2                  # RCX = the number looked at
number:
        cmp     byte ptr [rdi + rcx], 0
        jne     next_number
        inc     rbx                     # not crossed out: a prime
        mov     rax, rcx
        imul    rax, rcx                # smaller multiples have a smaller factor as well
multiple:
        cmp     rax, LIMIT
        jae     next_number
        mov     byte ptr [rdi + rax], 1
        add     rax, rcx
        jmp     multiple
next_number:
        inc     rcx
        cmp     rcx, LIMIT
        jb      number

        mov     rax, rbx
        call    print_number
        lea     rsi, [rip + text]
        call    print
        mov     eax, LIMIT
        call    print_number
        mov     al, '\n'
        out     CONSOLE, al
        mov     dx, POWER
        mov     ax, POWER_OFF
        out     dx, ax
done:
        jmp     done                    # where nothing listens at that port

# Print the text at RSI, which a zero byte ends. Changes AL and RSI.
print:
        lodsb
        test    al, al
        jz      printed
        out     CONSOLE, al
        jmp     print
printed:
        ret

# Print RAX in decimal: first, by calling itself, all digits but the last. Changes RAX, RCX and RDX.
print_number:
        xor     edx, edx
        mov     ecx, 10
        div     rcx                     # RAX = the other digits, RDX = the last
        push    rdx
        test    rax, rax
        jz      last_digit
        call    print_number
last_digit:
        pop     rax
        add     al, '0'
        out     CONSOLE, al
        ret

text:   .asciz  " primes below "
