"""Causes in addresses: page tables, stacks, what is not RAM, gates and the TSS.

Sections are those of the SDM editions of 2022, as everywhere in kvmpy (see `kvmpy.modes`).
"""

from typing import Final

from kvmpy.autopsy.cause import Cause

__all__ = ["MEMORY"]

MEMORY: Final[dict[str, Cause]] = {
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
    "missing-pse": Cause(
        "a 4 MiB page of 32-bit paging, and CR4.PSE is clear",
        "set CR4.PSE (bit 4) before CR0.PG: without it bit 7 (PS) is ignored, and the entry is "
        "taken for the address of a table",
        "SDM Vol.3 4.3, table 4-4",
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
        "bits 63 to 47 must be equal (63 to 56 with five levels): correct the address, or "
        "sign-extend it",
        "SDM Vol.1 3.3.7.1",
    ),
    "bad-return": Cause(
        "a return to an address that is not canonical",
        "look at what has written to that slot of the stack, such as a copy beyond the end of a "
        "buffer below it, or a push without its pop",
        "SDM Vol.2 RET, Vol.1 6.4.1",
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
    "gate-dpl": Cause(
        "INT n through a gate that its ring may not use",
        "set the gate's DPL to 3 (0xee for 0x8e): it is asked of INT n, INT3 and INTO only",
        "SDM Vol.3 6.12.1.2",
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
    "no-ist": Cause(
        "a gate with a stack of the IST that was never set",
        "write the end of a stack to the TSS, ISTn at offset 0x1c + 8 * n, or clear the gate's IST "
        "field",
        "SDM Vol.3 6.14.5, 8.7",
    ),
    "no-rsp0": Cause(
        "a TSS whose RSP0 was never set",
        "write the end of a kernel stack to the TSS at offset 4 before ring 3 runs",
        "SDM Vol.3 6.14.2, 8.7",
    ),
}
"""Those of addresses, by key."""
