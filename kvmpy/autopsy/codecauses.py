"""Causes in what code does: segments, control registers, instructions; and in the host.

Sections are those of the SDM editions of 2022, as everywhere in kvmpy (see `kvmpy.modes`).
"""

from typing import Final

from kvmpy.autopsy.cause import Cause

__all__ = ["CODE"]

_HOST = "the host's KVM; `kvmpy info` says what it runs"

CODE: Final[dict[str, Cause]] = {
    # Segments
    "null-selector": Cause(
        "a null selector", "load the selector of a descriptor", "SDM Vol.3 3.4.2, 5.4.1"
    ),
    "gdt-limit": Cause(
        "a selector beyond the GDT's limit",
        "a selector is index * 8; GDTR's limit is the table's size minus one",
        "SDM Vol.3 3.4.2, 3.5.1",
    ),
    "ldt-limit": Cause(
        "a selector beyond the LDT's limit, or without an LDT",
        "bit 2 of a selector means the LDT: clear it, or load LDTR",
        "SDM Vol.3 3.4.2, 3.5.1",
    ),
    "not-code": Cause(
        "a far transfer to what is no code segment",
        "use the selector of a code segment (type bit 3 and S set)",
        "SDM Vol.3 5.8.1, table 3-1",
    ),
    "not-present-segment": Cause(
        "a descriptor that is not present", "set P, bit 47 of the descriptor", "SDM Vol.3 3.4.5"
    ),
    "descriptor-bits": Cause(
        "a code descriptor with both L and D set",
        "64-bit code has L = 1 and D = 0",
        "SDM Vol.3 5.2.1",
    ),
    "segment-rights": Cause(
        "a segment that does not allow the access",
        "data that is written, and stacks, need a writable data segment (type bit 1)",
        "SDM Vol.3 5.5, 5.7",
    ),
    "wrong-ring": Cause(
        "privilege levels that do not match",
        "DPL, RPL and the current ring must agree for code and stack",
        "SDM Vol.3 5.5 to 5.8",
    ),
    "wrong-code-size": Cause(
        "the code runs in a segment of another size than it was assembled for",
        "set L (bit 53) and clear D (bit 54) for 64-bit code, set D for 32-bit code",
        "SDM Vol.3 3.4.5, 5.2.1",
    ),
    "bad-frame": Cause(
        "a return with a frame that is not what the instruction pops",
        "push in the opposite order: for RETF CS, then RIP; for IRETQ SS, RSP, RFLAGS, CS, RIP, "
        "each of the operand's size; and take an exception's error code off before IRET",
        "SDM Vol.2 RET, IRET; Vol.3 6.14.3",
    ),
    "bad-stack-segment": Cause(
        "IRET to a stack segment that cannot be loaded",
        "give SS the selector of writable data whose DPL and RPL are those of the code; null is "
        "for 64-bit code in ring 0 only",
        "SDM Vol.2 IRET, Vol.3 6.14.3",
    ),
    "tss-busy": Cause(
        "LTR of a TSS that is busy already",
        "clear bit 1 of the descriptor's type (0xB to 0x9), or leave TR as it is",
        "SDM Vol.2 LTR, Vol.3 8.2.2",
    ),
    "wrong-descriptor": Cause(
        "LTR or LLDT of a descriptor of another type",
        "LTR takes an available TSS (type 9) in the GDT, LLDT an LDT (type 2)",
        "SDM Vol.2 LTR, LLDT",
    ),
    "nested-task": Cause("IRET with NT set", "clear RFLAGS.NT", "SDM Vol.2 IRET"),
    # Control registers and MSRs
    "pg-without-pae": Cause(
        "paging for long mode without CR4.PAE",
        "set CR4.PAE, then CR3, then EFER.LME, and CR0.PG last",
        "SDM Vol.3 4.1.1, 10.8.5",
    ),
    "pg-without-lme": Cause(
        "paging for long mode without EFER.LME",
        "set EFER.LME (MSR 0xc0000080, bit 8) before CR0.PG",
        "SDM Vol.3 4.4.1, 10.8.5",
    ),
    "pg-without-pe": Cause("paging in real mode", "set CR0.PE as well", "SDM Vol.3 2.5"),
    "pg-in-64-bit-segment": Cause(
        "paging switched on in a segment with L set",
        "switch it on in a 32-bit segment, and far jump to the 64-bit one then",
        "SDM Vol.2 MOV CR, Vol.3 10.8.5",
    ),
    "pg-cleared-in-64-bit": Cause(
        "paging switched off in 64-bit code",
        "go to a 32-bit segment first",
        "SDM Vol.3 10.8.5.4",
    ),
    "pae-cleared": Cause(
        "CR4.PAE cleared in long mode", "leave long mode first", "SDM Vol.3 10.8.5"
    ),
    "lme-with-paging": Cause(
        "EFER.LME changed while paging is on",
        "change EFER.LME while CR0.PG is clear",
        "SDM Vol.3 10.8.5",
    ),
    "reserved-control-bit": Cause(
        "a reserved bit of a control register",
        "write the bits that the processor has (CPUID)",
        "SDM Vol.3 2.5",
    ),
    "bad-msr": Cause(
        "an MSR, or a value of one, that the processor does not have",
        "look the number up, and ask CPUID before using it",
        "SDM Vol.4 2.1, Vol.2 WRMSR",
    ),
    "host-lacks-paging": Cause(
        "this host's KVM has no 32-bit paging",
        "go to long mode directly: set EFER.LME before CR0.PG",
        _HOST,
    ),
    # Instructions
    "trap": Cause(
        "an exception that the guest asked for", "handle it, or remove it", "SDM Vol.3 6.4"
    ),
    "invalid-opcode": Cause(
        "bytes that are no instruction",
        "look at how the guest came there; the code may be data, or for another mode",
        "SDM Vol.2 2.1, Vol.3 6.15 (#UD)",
    ),
    "divide-error": Cause(
        "a division by zero, or with a quotient that is too large",
        "check the divisor, and clear or sign-extend RDX (CDQ, CQO) before it",
        "SDM Vol.2 DIV, IDIV",
    ),
    "privileged": Cause(
        "an instruction that ring 3 may not use",
        "do it in ring 0; under --ring 3, end with the debug-exit port instead of HLT",
        "SDM Vol.3 5.9",
    ),
    "port-closed": Cause(
        "a port that ring 3 may not use",
        "clear the port's bit in the TSS's I/O bitmap, within TR's limit, or raise IOPL",
        "SDM Vol.1 19.5",
    ),
    "sse-disabled": Cause(
        "SSE that was not enabled",
        "set CR4.OSFXSR (bit 9) and clear CR0.EM (bit 2)",
        "SDM Vol.3 10.5.3, 13.1",
    ),
    "avx-disabled": Cause(
        "AVX that was not enabled",
        "set CR4.OSXSAVE, then XCR0 bits 1 and 2 by XSETBV",
        "SDM Vol.3 13.1, Vol.1 14.3",
    ),
    "fpu-disabled": Cause(
        "x87, MMX or SSE that was not enabled",
        "clear CR0.EM and CR0.TS (CLTS)",
        "SDM Vol.3 2.5, 10.2",
    ),
    "floating-point": Cause(
        "an error of x87 or SSE arithmetic that is not masked",
        "mask it, or look at the operands: a division by zero, a signalling NaN, an overflow",
        "SDM Vol.1 8.5, 11.5",
    ),
    "not-enabled": Cause(
        "an instruction that was not enabled",
        "set the bit or the register that is named, if CPUID has the feature",
        "SDM Vol.2 XSETBV, XSAVE, SYSCALL, SYSRET, SYSENTER, RDFSBASE",
    ),
    "bad-counter": Cause(
        "a performance counter that the processor does not have",
        "ask CPUID leaf 0xa how many there are; a virtual processor may have none",
        "SDM Vol.2 RDPMC, CPUID",
    ),
    "unaligned": Cause(
        "an operand that is not aligned",
        "align it to what is named above; SSE and AVX also have MOVUPS and VMOVUPS",
        "SDM Vol.1 14.9, Vol.2 2.4, CMPXCHG16B, FXSAVE, XSAVE",
    ),
    "executing-zeros": Cause(
        "the guest executes memory of zeros",
        "look at the last jump, call or return: its target was never loaded",
        "SDM Vol.2 ADD (00 /r)",
    ),
    "fell-off-code": Cause(
        "the guest ran past the end of its code",
        "end it with HLT, a jump, or an exit (debug-exit port 0xf4)",
        "SDM Vol.2 ADD (00 /r)",
    ),
    # The host
    "emulator-lacks": Cause(
        "the host's KVM cannot emulate the instruction",
        "use another instruction, or run the code in 64-bit ring 3, which is native",
        _HOST,
    ),
    "delivery-exit": Cause(
        "an exit while an event was being delivered",
        "keep IDT, GDT, TSS and stacks in RAM, not where devices are",
        "KVM API 5 (KVM_EXIT_INTERNAL_ERROR)",
    ),
    "bad-entry-state": Cause(
        "a register state that the processor refuses to enter",
        "correct the registers that are named",
        "SDM Vol.3 27.3.1",
    ),
    "unknown": Cause(
        "what the state does not tell",
        "look at what came before; if the instruction was refused, at its #UD and #GP conditions",
        "SDM Vol.2 (the instruction's exceptions), docs/autopsy.md",
    ),
}
"""Those of code and of the host, by key."""
