# kernel_protected - instructions whose exits KVM answers itself, in a loop, for measuring them
#
# At entry: ECX is how often to go round, and the entry says which loop: cpuid, rdmsr, wrmsr,
# tsc_deadline, write_cr0, write_cr3, vmcall, vmmcall, or empty. Each ends in a write to
# port 0x11, which says that it is over. The counter is in ESI, since CPUID and the number of the
# MSR need ECX. What is written is what was there, so nothing changes; the deadline is far away.
# Each loop has a twin, tsc_NAME, that notes the time-stamp counter before and after the operation,
# fenced (SDM Vol.2, RDTSC): 16 bytes a time, at EDI on.
#
# mode: protected
# load: 0x1000
# output: ""

        .equ OVER, 0x11
        .equ MISC_ENABLE, 0x1a0         # an MSR that KVM never lets a guest have to itself
        .equ TSC_DEADLINE, 0x6e0
        .equ YEARS, 0x7fffffff          # the high half of a count that is far away

        .macro again name               # so often, and then over
        dec     esi
        jnz     \name
        jmp     over
        .endm

        .macro begin                    # EBP is the low half of when it began
        lfence
        rdtsc
        mov     ebp, eax
        mov     dword ptr [edi + 4], edx
        lfence
        .endm

        .macro done
        lfence
        rdtsc
        lfence
        mov     dword ptr [edi], ebp
        mov     dword ptr [edi + 8], eax
        mov     dword ptr [edi + 12], edx
        add     edi, 16
        .endm

start:
empty:
        mov     esi, ecx
empty_again:
        again   empty_again
tsc_empty:
        mov     esi, ecx
tsc_empty_again:
        begin
        done
        again   tsc_empty_again
cpuid:
        mov     esi, ecx
cpuid_again:
        xor     eax, eax
        cpuid
        again   cpuid_again
tsc_cpuid:
        mov     esi, ecx
tsc_cpuid_again:
        begin
        xor     eax, eax
        cpuid
        done
        again   tsc_cpuid_again
rdmsr:
        mov     esi, ecx
        mov     ecx, MISC_ENABLE
rdmsr_again:
        rdmsr
        again   rdmsr_again
tsc_rdmsr:
        mov     esi, ecx
        mov     ecx, MISC_ENABLE
tsc_rdmsr_again:
        begin
        rdmsr
        done
        again   tsc_rdmsr_again
wrmsr:
        mov     esi, ecx
        mov     ecx, MISC_ENABLE
        rdmsr
        mov     ebx, eax
        mov     dword ptr [high], edx
wrmsr_again:
        mov     eax, ebx
        mov     edx, dword ptr [high]
        wrmsr
        again   wrmsr_again
tsc_wrmsr:
        mov     esi, ecx
        mov     ecx, MISC_ENABLE
        rdmsr
        mov     ebx, eax
        mov     dword ptr [high], edx
tsc_wrmsr_again:
        begin
        mov     eax, ebx
        mov     edx, dword ptr [high]
        wrmsr
        done
        again   tsc_wrmsr_again
tsc_deadline:
        mov     esi, ecx
        mov     ecx, TSC_DEADLINE
        xor     ebx, ebx
tsc_deadline_again:
        mov     eax, ebx
        mov     edx, YEARS
        wrmsr
        again   tsc_deadline_again
tsc_tsc_deadline:
        mov     esi, ecx
        mov     ecx, TSC_DEADLINE
        xor     ebx, ebx
tsc_tsc_deadline_again:
        begin
        mov     eax, ebx
        mov     edx, YEARS
        wrmsr
        done
        again   tsc_tsc_deadline_again
write_cr0:
        mov     esi, ecx
        mov     ebx, cr0
write_cr0_again:
        mov     cr0, ebx
        again   write_cr0_again
tsc_write_cr0:
        mov     esi, ecx
        mov     ebx, cr0
tsc_write_cr0_again:
        begin
        mov     cr0, ebx
        done
        again   tsc_write_cr0_again
write_cr3:
        mov     esi, ecx
        mov     ebx, cr3
write_cr3_again:
        mov     cr3, ebx
        again   write_cr3_again
tsc_write_cr3:
        mov     esi, ecx
        mov     ebx, cr3
tsc_write_cr3_again:
        begin
        mov     cr3, ebx
        done
        again   tsc_write_cr3_again
vmcall:
        mov     esi, ecx
vmcall_again:
        xor     eax, eax
        vmcall
        again   vmcall_again
tsc_vmcall:
        mov     esi, ecx
tsc_vmcall_again:
        begin
        xor     eax, eax
        vmcall
        done
        again   tsc_vmcall_again
vmmcall:
        mov     esi, ecx
vmmcall_again:
        xor     eax, eax
        vmmcall
        again   vmmcall_again
tsc_vmmcall:
        mov     esi, ecx
tsc_vmmcall_again:
        begin
        xor     eax, eax
        vmmcall
        done
        again   tsc_vmmcall_again
over:
        out     OVER, al
        jmp     over
high:
        .long 0
