# kernel_protected - instructions whose exits KVM answers itself, in a loop, for measuring them
#
# At entry: ECX is how often to go round, and the entry says which loop: cpuid, rdmsr, wrmsr,
# write_cr0, write_cr3, vmcall, vmmcall, or empty. Each ends in a write to port 0x11, which says that it is
# over. The counter is in ESI, since CPUID and the MSR's number need ECX. What is written is what
# was there, so nothing changes.
#
# mode: protected
# load: 0x1000
# output: ""

        .equ OVER, 0x11
        .equ MISC_ENABLE, 0x1a0         # an MSR that KVM never lets a guest have to itself

start:
empty:
        mov     esi, ecx
empty_again:
        dec     esi
        jnz     empty_again
        jmp     over
cpuid:
        mov     esi, ecx
cpuid_again:
        xor     eax, eax
        cpuid
        dec     esi
        jnz     cpuid_again
        jmp     over
rdmsr:
        mov     esi, ecx
        mov     ecx, MISC_ENABLE
rdmsr_again:
        rdmsr
        dec     esi
        jnz     rdmsr_again
        jmp     over
wrmsr:
        mov     esi, ecx
        mov     ecx, MISC_ENABLE
        rdmsr
wrmsr_again:
        wrmsr
        dec     esi
        jnz     wrmsr_again
        jmp     over
write_cr0:
        mov     esi, ecx
        mov     eax, cr0
write_cr0_again:
        mov     cr0, eax
        dec     esi
        jnz     write_cr0_again
        jmp     over
write_cr3:
        mov     esi, ecx
        mov     eax, cr3
write_cr3_again:
        mov     cr3, eax
        dec     esi
        jnz     write_cr3_again
        jmp     over
vmcall:
        mov     esi, ecx
vmcall_again:
        xor     eax, eax
        vmcall
        dec     esi
        jnz     vmcall_again
        jmp     over
vmmcall:
        mov     esi, ecx
vmmcall_again:
        xor     eax, eax
        vmmcall
        dec     esi
        jnz     vmmcall_again
over:
        out     OVER, al
        jmp     over
