"""Classic mistakes of guests: each a few instructions, and what an autopsy has to find."""

from typing import NamedTuple

__all__ = ["MISTAKES", "Mistake"]

# pd: the address of the page directory for the first GiB, in rbx. kvmpy maps 2 MiB pages, so that
# entry 2 is that of 0x400000. flush: have the processor look at the tables anew.
PRELUDE = """
.macro pd
    mov rbx, cr3
    mov rbx, [rbx]
    and rbx, -4096
    mov rbx, [rbx]
    and rbx, -4096
.endm
.macro flush
    mov rcx, cr3
    mov cr3, rcx
.endm
"""

# gate: an interrupt gate for \\handler, at rdi; idt: load IDTR with room for so many gates.
GATES = """
    mov rdi, 0x8000 + 6 * 16
    lea rax, [rip + handler]
    mov [rdi], ax
    mov word ptr [rdi + 2], 8
    mov word ptr [rdi + 4], 0x8e00
    shr rax, 16
    mov [rdi + 6], ax
    shr rax, 16
    mov [rdi + 8], eax
"""
HANDLER = """
handler:
    hlt
"""

# A page-table hierarchy of the guest's own for protected mode: PML4 0x8000, PDPT 0x9000, PD 0xa000.
TABLES32 = """
    mov dword ptr [0x8000], 0x9003
    mov dword ptr [0x9000], 0xa003
    mov dword ptr [0xa000], {pd}
    mov eax, 0x8000
    mov cr3, eax
"""
PAE = """
    mov eax, cr4
    or eax, 0x20
    mov cr4, eax
"""
LME = """
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
"""
PG = """
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    nop
    hlt
"""


# A GDT of the guest's own whose descriptor 0x18 is a 16-bit code segment, and a jump there.
CODE16 = """
    lgdt [gdtr]
    jmp 0x18:there
gdtr: .word 31
    .long gdt
gdt: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00009b000000ffff
.code16
there: {}
"""


class Mistake(NamedTuple):
    """A guest, the cause that is to be found, and the vector of its first exception."""

    name: str
    cause: str
    vector: int | None
    source: str
    mode: str = "long"
    ring: int = 0


MISTAKES = (
    Mistake("no-idt", "no-idt", 6, "nop; ud2"),
    Mistake(
        "idt-limit",
        "idt-limit",
        6,
        GATES + "lidt [idtr]; ud2; idtr: .word 6 * 16 - 1; .quad 0x8000" + HANDLER,
    ),
    Mistake(
        "wrong-gate",
        "wrong-gate",
        6,
        GATES.replace("0x8e00", "0x8000")
        + "lidt [idtr]; ud2; idtr: .word 0xfff; .quad 0x8000"
        + HANDLER,
    ),
    Mistake(
        "gate-not-present",
        "gate-not-present",
        6,
        GATES.replace("0x8e00", "0x0e00")
        + "lidt [idtr]; ud2; idtr: .word 0xfff; .quad 0x8000"
        + HANDLER,
    ),
    Mistake(
        "gate-selector",
        "gate-selector",
        6,
        GATES.replace("], 8\n", "], 0x58\n")
        + "lidt [idtr]; ud2; idtr: .word 0xfff; .quad 0x8000"
        + HANDLER,
    ),
    Mistake(
        "gate-ist",
        "no-ist",
        6,
        GATES.replace("0x8e00", "0x8e03")
        + "lidt [idtr]; ud2; idtr: .word 0xfff; .quad 0x8000"
        + HANDLER,
    ),
    Mistake("no-stack", "no-stack", 14, "xor esp, esp; push rax; hlt"),
    Mistake("no-stack-call", "no-stack", 14, "xor esp, esp; call x; x: hlt"),
    Mistake("stack-unmapped", "stack-unmapped", 14, "mov rsp, 0x8000000000; push rax; hlt"),
    Mistake(
        "pg-without-pae",
        "pg-without-pae",
        13,
        TABLES32.format(pd="0x83") + LME + PG,
        "protected",
    ),
    Mistake(
        "pg-without-lme",
        "pg-without-lme",
        13,
        TABLES32.format(pd="0x83") + PAE + PG,
        "protected",
    ),
    Mistake(
        "lme-with-paging",
        "lme-with-paging",
        13,
        "mov ecx, 0xc0000080; rdmsr; and eax, 0xfffffeff; wrmsr; hlt",
    ),
    Mistake(
        "missing-ps",
        "missing-ps",
        14,
        TABLES32.format(pd="0x03") + PAE + LME + PG,
        "protected",
    ),
    Mistake(
        "pml4-not-present", "page-not-present", 14, "mov rax, 0x8000000000; mov rbx, [rax]; hlt"
    ),
    Mistake(
        "pdpt-not-present", "page-not-present", 14, "mov rax, 0x200000000; mov rbx, [rax]; hlt"
    ),
    Mistake(
        "pd-not-present",
        "page-not-present",
        14,
        "pd; mov qword ptr [rbx + 16], 0; flush; mov rax, 0x400000; mov [rax], rbx; hlt",
    ),
    Mistake(
        "pt-not-present",
        "page-not-present",
        14,
        "pd; mov qword ptr [0x8000], 0x400003; mov qword ptr [rbx + 16], 0x8003; flush; "
        "mov rax, 0x400000; mov rcx, [rax]; add rax, 0x1000; mov [rax], rcx; hlt",
    ),
    Mistake(
        "reserved-bit",
        "reserved-bit",
        14,
        "pd; mov rax, 0x8000000000000; or [rbx + 16], rax; flush; mov rax, [0x400000]; hlt",
    ),
    Mistake(
        "nx",
        "nx",
        14,
        "mov byte ptr [0x400000], 0xf4; pd; mov rax, 0x8000000000000000; or [rbx + 16], rax; "
        "flush; mov rax, 0x400000; jmp rax",
    ),
    Mistake(
        "write-protected",
        "write-protected",
        14,
        "pd; and qword ptr [rbx + 16], -3; flush; mov rax, 0x400000; mov rcx, [rax]; "
        "mov [rax], rcx; hlt",
    ),
    Mistake("supervisor-page", "supervisor-page", 14, "mov rax, [0xfff000]; hlt", ring=3),
    Mistake("non-canonical-rip", "non-canonical", 13, "mov rax, 0x800000000000; jmp rax"),
    Mistake("non-canonical-rsp", "non-canonical", 12, "mov rsp, 0x800000001000; push rax; hlt"),
    Mistake(
        "non-canonical-data", "non-canonical", 13, "mov rax, 0x800000000000; mov rbx, [rax]; hlt"
    ),
    Mistake("ret-smashed", "bad-return", 13, "mov rax, 0x4141414141414141; push rax; ret"),
    Mistake(
        "fs-base",
        "non-canonical",
        13,
        "mov ecx, 0xc0000100; xor eax, eax; mov edx, 0x40000000; wrmsr; hlt",
    ),
    Mistake("far-null", "null-selector", 13, "jmp far [x]; x: .long 0x2000; .word 0"),
    Mistake("far-data", "not-code", 13, "jmp far [x]; x: .long 0x2000; .word 0x10"),
    Mistake("far-beyond", "gdt-limit", 13, "jmp far [x]; x: .long 0x2000; .word 0x1238"),
    Mistake(
        "far-absent",
        "not-present-segment",
        11,
        "lgdt [gdtr]; jmp far [x]; x: .long 0x2000; .word 8; gdtr: .word 15; .quad gdt; "
        "gdt: .quad 0, 0x00201a0000000000",
    ),
    # Read as 16-bit code this is dec ax; mov ax, 0x1122; ud2.
    Mistake(
        "wrong-code-size",
        "wrong-code-size",
        6,
        "lgdt [gdtr]; push 8; lea rax, [rip + x]; push rax; lretq; x: mov rax, 0x90900b0f1122; "
        "hlt; gdtr: .word 15; .quad gdt; gdt: .quad 0, 0x00009a000000ffff",
    ),
    Mistake("code16-that-is-meant", "no-idt", 6, CODE16.format("mov ax, 16; ud2"), "protected"),
    Mistake(
        "code16-that-is-meant-gdt",
        "gdt-limit",
        13,
        CODE16.format("mov ax, 0x28; mov ds, ax; hlt"),
        "protected",
    ),
    # Written as 32-bit code, so that it executes the upper half of 0x28.
    Mistake(
        "code16-by-mistake",
        "wrong-code-size",
        13,
        CODE16.replace(".code16", "").format("mov eax, 0x28; mov ds, eax; mov esp, 0x9000; ud2"),
        "protected",
    ),
    Mistake("lretq-frame", "bad-frame", 13, "lea rax, [rip + x]; push rax; push 8; lretq; x: hlt"),
    Mistake(
        "iretq-ss",
        "bad-stack-segment",
        13,
        "lea rax, [rip + x]; push 0x1230; push 0x9000; push 2; push 8; push rax; iretq; x: hlt",
    ),
    Mistake("tss-busy", "tss-busy", 13, "str ax; ltr ax; hlt"),
    Mistake("msr", "bad-msr", 13, "mov ecx, 0x12345; xor eax, eax; xor edx, edx; wrmsr; hlt"),
    Mistake("msr-read", "bad-msr", 13, "mov ecx, 0x12345; rdmsr; hlt"),
    Mistake("cr4-bit", "reserved-control-bit", 13, "mov rax, cr4; bts rax, 15; mov cr4, rax; hlt"),
    Mistake("dr7", "reserved-control-bit", 13, "mov rax, 0x100000000; mov dr7, rax; hlt"),
    Mistake("xsetbv", "not-enabled", 6, "xor ecx, ecx; xsetbv; hlt"),
    Mistake("syscall", "not-enabled", 6, "syscall; hlt"),
    Mistake("rdpmc", "bad-counter", 13, "mov ecx, 0x1234; rdpmc; hlt"),
    Mistake("efer-bit", "bad-msr", 13, "mov ecx, 0xc0000080; rdmsr; or eax, 2; wrmsr; hlt"),
    Mistake("fell-off", "fell-off-code", 14, "mov rax, 0x8000000000; nop"),
    Mistake("zeros", "executing-zeros", 14, "mov rax, 0x8000000000; mov rbx, 0x123400; jmp rbx"),
    Mistake(
        "sse",
        "sse-disabled",
        6,
        "mov rax, cr4; and rax, -513; mov cr4, rax; movups xmm0, [0x2000]; hlt",
    ),
    Mistake(
        "stack-in-page-tables",
        "stack-in-page-tables",
        14,
        "mov rax, 0x9003; mov [0x8000], rax; mov rax, 0xa003; mov [0x9000], rax; "
        "mov qword ptr [0xa000], 0xb003; mov edi, 0xb000; mov eax, 3; mov ecx, 16; "
        "y: mov [rdi], rax; add rdi, 8; add eax, 0x1000; dec ecx; jnz y; "
        "mov eax, 0x8000; mov cr3, rax; mov esp, 0xc000; "
        "mov rcx, rax; xor eax, eax; x: push rax; mov cr3, rcx; jmp x",
    ),
    # kvmpy's own tables begin where the stack that it gives ends: nothing was pushed into them.
    Mistake(
        "pml4-cleared",
        "page-not-present",
        14,
        "mov rax, cr3; mov qword ptr [rax], 0; mov cr3, rax; hlt",
    ),
    Mistake(
        "wild-rbp", "page-not-present", 14, "mov rbp, 0xffff900000000000; mov rax, [rbp+16]; hlt"
    ),
    Mistake("leave", "page-not-present", 14, "mov rbp, 0xffff900000000000; leave; hlt"),
    Mistake("wild-index", "page-not-present", 14, "mov rax, 0x900000000; mov rbx, [rsp+rax]; hlt"),
    Mistake("rsp-operand", "stack-unmapped", 14, "mov rsp, 0x8000000000; mov rax, [rsp+8]; hlt"),
    Mistake("wild-rbp-ss", "non-canonical", 12, "mov rbp, 0x800000000000; mov rax, [rbp]; hlt"),
    Mistake("cmpxchg16b", "unaligned", 13, "mov edx, 0x5008; cmpxchg16b [rdx]; hlt"),
    Mistake("divide", "divide-error", 0, "xor ecx, ecx; div ecx; hlt"),
    Mistake("emulator", "emulator-lacks", None, "addps xmm0, xmm1; hlt"),
    Mistake("nowhere", "no-ram", None, "mov rax, 0xc0000000; jmp rax"),
    Mistake(
        "no-rsp0",
        "no-rsp0",
        6,
        GATES
        + """
        lgdt [gdtr]; lidt [idtr]
        mov ax, 0x28; ltr ax
        pd; or qword ptr [rbx], 4
        mov rax, cr3; or qword ptr [rax], 4; mov rax, [rax]; and rax, -4096; or qword ptr [rax], 4
        flush
        push 0x1b; push 0x9000; push 2; push 0x23; lea rax, [rip + user]; push rax; iretq
        user: ud2
        handler: hlt
        idtr: .word 0xfff; .quad 0x8000
        gdtr: .word 8 * 8 - 1; .quad gdt
        .align 8
        gdt: .quad 0, 0x00209b0000000000, 0x00cf93000000ffff, 0x00cff3000000ffff, 0x0020fb0000000000
        .quad 0x0000890070000067, 0, 0
        """.replace("handler: hlt", "").replace("0x28; ltr", "0x28; ltr")
        + HANDLER,
    ),
    Mistake("empty-gate", "empty-gate", 6, "lidt [x]; ud2; x: .word 0xfff; .quad 0x8000"),
    Mistake("privileged", "privileged", 13, "hlt", ring=3),
    Mistake("unaligned", "unaligned", 13, "movaps xmm0, [0x2008]; hlt", ring=3),
    Mistake(
        "null-ds", "null-selector", 13, "xor eax, eax; mov ds, ax; mov ax, [0x2000]", "protected"
    ),
    Mistake("null-ss", "null-selector", 13, "xor eax, eax; mov ss, ax; hlt", "protected"),
    Mistake("ds-beyond", "gdt-limit", 13, "mov eax, 0x88; mov ds, ax; hlt"),
    Mistake(
        "clear-pg",
        "pg-cleared-in-64-bit",
        13,
        "mov rax, cr0; btr rax, 31; mov cr0, rax; hlt",
    ),
    Mistake("clear-pae", "pae-cleared", 13, "mov rax, cr4; btr rax, 5; mov cr4, rax; hlt"),
    # Not 1 << 47: bases may have 57 bits wherever the processor has five levels, in use or not.
    Mistake("idtr-base", "non-canonical", 13, f"lidt [x]; x: .word 0xfff; .quad {1 << 62}"),
    Mistake("quotient", "divide-error", 0, "mov edx, 5; mov ecx, 2; div ecx; hlt"),
    Mistake("ret-to-nowhere", "no-ram", None, "mov rax, 0xd0000000; push rax; ret"),
)
