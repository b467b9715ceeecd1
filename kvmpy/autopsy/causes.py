"""Every cause that an autopsy can name: what it is, what to do about it, and where that is written.

Sections are those of the SDM editions of 2022, as everywhere in kvmpy (see `kvmpy.modes`).
"""

from typing import Final, NamedTuple

__all__ = ["CAUSES", "Cause"]


class Cause(NamedTuple):
    """`summary` in a few words, `advice` in a sentence, `references` to manuals."""

    summary: str
    advice: str
    references: str


_HOST = "the host's KVM; `kvmpy info` says what it runs"

CAUSES: Final[dict[str, Cause]] = {
    # Page tables
    "page-not-present": Cause(
        "an address without a page",
        "map the address at the level named above (bit 0 of its entry), or correct the pointer",
        "SDM Vol.3 4.5, 4.7",
    ),
    "missing-ps": Cause(
        "a page-table entry that was meant to map a large page lacks the PS bit",
        "set bit 7 (PS) in the entry, so that it maps the page itself and is not taken for the "
        "address of another table",
        "SDM Vol.3 4.5, tables 4-16 and 4-18",
    ),
    "reserved-bit": Cause(
        "a page-table entry with a reserved bit set",
        "clear the bit: addresses end at MAXPHYADDR, NX needs EFER.NXE, and a large page's address "
        "is a multiple of its size",
        "SDM Vol.3 4.5, 4.7 (RSVD)",
    ),
    "tables-outside-ram": Cause(
        "page tables at an address without RAM",
        "correct CR3 or the entry that leads there; they hold physical addresses",
        "SDM Vol.3 4.5",
    ),
    "nx": Cause(
        "code in a no-execute page",
        "clear bit 63 in the entries for code at all levels, or jump elsewhere",
        "SDM Vol.3 4.6.1",
    ),
    "write-protected": Cause(
        "a write to a read-only page",
        "set bit 1 (R/W) in the entries of all levels, or do not write there; CR0.WP decides for "
        "ring 0",
        "SDM Vol.3 4.6.1",
    ),
    "supervisor-page": Cause(
        "ring 3 uses a page of the supervisor",
        "set bit 2 (U/S) in the entries of all levels, or keep away from that address; in a guest "
        "of kvmpy's the top of RAM is kvmpy's own",
        "SDM Vol.3 4.6.1",
    ),
    "smep": Cause("ring 0 executes a user page", "clear U/S, or CR4.SMEP", "SDM Vol.3 4.6.1"),
    "smap": Cause(
        "ring 0 uses a user page",
        "use STAC and CLAC around it, or clear CR4.SMAP",
        "SDM Vol.3 4.6.1",
    ),
    # Stack
    "no-stack": Cause(
        "a stack was needed and RSP was never set",
        "load RSP with the end of a mapped area before the first push, call or exception",
        "SDM Vol.1 6.2",
    ),
    "stack-unmapped": Cause(
        "the stack leads to a page that is not mapped",
        "map the pages below RSP, or load RSP with an address that is mapped",
        "SDM Vol.1 6.2, Vol.3 4.7",
    ),
    "stack-in-page-tables": Cause(
        "the stack has grown into the page tables",
        "move the stack or the tables; leave an unmapped page below a stack",
        "SDM Vol.1 6.2, Vol.3 4.5",
    ),
    # Addresses
    "non-canonical": Cause(
        "an address that is not canonical",
        "bits 63 to 47 must be equal (63 to 56 with five levels): sign-extend the address",
        "SDM Vol.1 3.3.7.1",
    ),
    "segment-limit": Cause(
        "an offset beyond the segment's limit",
        "use a segment with a larger limit (G = 1), or a smaller offset",
        "SDM Vol.3 5.3",
    ),
    "no-ram": Cause(
        "the guest jumped to where there is no RAM",
        "look at the last jump, call or return, and at the stack that it returns by",
        "KVM API 4.35 (memory slots)",
    ),
    # Interrupt descriptors
    "no-idt": Cause(
        "an exception without an IDT",
        "load an IDT (LIDT) before anything can raise an exception; or run it with --ring 3, where "
        "kvmpy reports exceptions by name",
        "SDM Vol.3 6.10, 10.8.1",
    ),
    "idt-limit": Cause(
        "an IDT that is too short for the vector",
        "IDTR's limit is the table's size minus one: 16 bytes a gate in long mode, else 8",
        "SDM Vol.3 6.10",
    ),
    "idt-outside-ram": Cause(
        "an IDT at an address without RAM",
        "load IDTR with the table's linear address",
        "SDM Vol.3 6.10",
    ),
    "empty-gate": Cause(
        "an IDT without a gate for the vector", "write a gate for it", "SDM Vol.3 6.11, 6.14.1"
    ),
    "wrong-gate": Cause(
        "an IDT entry that is no gate",
        "the type is 0xE (interrupt gate) or 0xF (trap gate), with P set: 0x8e or 0x8f",
        "SDM Vol.3 6.11, 6.14.1",
    ),
    "gate-not-present": Cause(
        "a gate that is not present",
        "set P, bit 7 of the gate's byte 5: 0x8e",
        "SDM Vol.3 6.11",
    ),
    "gate-selector": Cause(
        "a gate whose code selector is wrong",
        "put the selector of a present code segment in bytes 2 and 3, a 64-bit one in long mode",
        "SDM Vol.3 6.12.1, 6.14",
    ),
    "no-tss": Cause(
        "no TSS to take the handler's stack from",
        "load TR (LTR) with a TSS's descriptor",
        "SDM Vol.3 6.14.4, 8.7",
    ),
    "no-rsp0": Cause(
        "a TSS whose RSP0 was never set",
        "write the end of a kernel stack to the TSS at offset 4 before ring 3 runs",
        "SDM Vol.3 6.14.2, 8.7",
    ),
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
        "each of the operand's size",
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
    "unaligned": Cause(
        "an SSE operand that is not aligned",
        "align it to its size, or use MOVUPS",
        "SDM Vol.2 2.4",
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
        "take a snapshot before the run, so that its end can be replayed",
        "docs/autopsy.md",
    ),
}
"""The causes by key."""
