"""Autopsies of page faults: which address they are about, the GDT's among them."""

from functools import partial

import pytest

from kvmpy import Machine, assemble
from kvmpy.autopsy.delivery import chain
from kvmpy.autopsy.doubt import contradiction
from kvmpy.autopsy.fault import GP, PF, UD, Fault
from kvmpy.autopsy.scene import Scene
from kvmpy.modes import build, entry_state
from kvmpy.x86.paging import PAGE_2M, PAGE_4K
from kvmpy.x86.segments import DescriptorTable
from kvmpy.x86.state import SpecialRegisters

GUEST = """
        lidt    [rip + idt_register]
        mov     esp, 0x20000
        mov     qword ptr [0x10000], 0x11003
        mov     qword ptr [0x11000], 0x12003
        mov     qword ptr [0x12000], 0x83       # the first 2 MiB, and nothing else
        mov     eax, 0x10000
        mov     cr3, rax
        ud2
handler:
        hlt
        .align  16
idt:    .space  6 * 16
        .word   handler & 0xffff, 8, TYPE, handler >> 16
        .long   0, 0
idt_end:
idt_register:
        .word   idt_end - idt - 1
        .quad   idt
"""


@pytest.mark.usefixtures("kvm_host")
@pytest.mark.parametrize(
    ("gate", "second", "cause", "address"),
    [
        (0x8E00, 14, "page-not-present", True),
        (0x8800, 13, "wrong-gate", False),  # looked at before the descriptor is
        (0x0E00, 11, "gate-not-present", False),
    ],
)
def test_a_gdt_without_a_page(gate: int, second: int, cause: str, address: bool) -> None:
    with Machine("16M") as machine:
        machine.load(assemble(GUEST.replace("TYPE", f"{gate:#x}"), at=0x1000))
        result = machine.run(timeout=2.0)
        assert result.outcome == "shutdown"
        found = machine.autopsy(result)
        assert (found.vector, found.faults[1].vector) == (6, second)
        assert found.faults[1].cause == cause
        gdt = machine.layout.gdt
        assert gdt is not None and gdt > PAGE_2M
        assert found.faults[1].address == (gdt + 8 if address else None)


@pytest.mark.usefixtures("kvm_host")
@pytest.mark.parametrize("low", range(0x780, 0x790, 3))
def test_a_fault_is_about_the_first_byte(low: int) -> None:
    wanted = 0x1_2345_6000 + low
    with Machine("1M") as machine:
        machine.load(assemble(f"mov rax, {wanted:#x}; mov rax, [rax]; hlt", at=0x1000))
        found = machine.autopsy(machine.run(timeout=2.0))
        assert found.faults[0].address == wanted


SMALL_MAP = """
        mov     qword ptr [0x10000], 0x11003
        mov     qword ptr [0x11000], 0x12003
        mov     qword ptr [0x12000], 0x83       # the first 2 MiB, and nothing else
        mov     esp, 0x20000
        mov     eax, 0x10000
        mov     cr3, rax
"""
BACK = "lea rax, [rip + x]; push rax; "


@pytest.mark.usefixtures("kvm_host")
@pytest.mark.parametrize(
    ("source", "selector"),
    [
        ("mov eax, 0x10; mov ds, eax; hlt", 0x10),
        ("mov eax, 0x20; ltr ax; hlt", 0x20),
        ("push 8; " + BACK + "lretq; x: hlt", 8),
        ("push 0x10; push 0x9000; push 2; push 8; " + BACK + "iretq; x: hlt", 8),
        ("jmp far [y]; y: .long 0x2000; .word 8", 8),
    ],
)
def test_a_descriptor_without_a_page_is_a_page_fault(source: str, selector: int) -> None:
    with Machine("16M") as machine:
        machine.load(assemble(SMALL_MAP + source, at=0x1000))
        result = machine.run(timeout=2.0)
        found = machine.autopsy(result)
        gdt = machine.layout.gdt
        assert gdt is not None
        first = found.faults[0]
        assert (found.cause, first.vector, first.error_code) == ("page-not-present", 14, 0)
        assert first.address == gdt + selector
        assert f"reading descriptor {selector:#x} in the GDT at {gdt + selector:#x}" in first.why


# The GDT is in the third 2 MiB, which are read-only once it is written; CODE is its selector 8.
READ_ONLY_GDT = """
        mov     edi, 0x400000
        mov     rax, CODE
        mov     [rdi + 8], rax
        mov     rax, 0x00cf92000000ffff
        mov     [rdi + 16], rax
        mov     rax, 0x0000890070000067
        mov     [rdi + 24], rax
        mov     rbx, cr3
        mov     rbx, [rbx]
        and     rbx, -4096
        mov     rbx, [rbx]
        and     rbx, -4096
        and     qword ptr [rbx + 16], -3
        mov     rax, cr3
        mov     cr3, rax
        lgdt    [rip + gdtr]
        jmp     on
gdtr:   .word   39
        .quad   0x400000
on:
"""
CLEAR, ACCESSED = "0x00209a0000000000", "0x00209b0000000000"


@pytest.mark.usefixtures("kvm_host")
@pytest.mark.parametrize(
    ("source", "code", "bit", "selector"),
    [
        ("mov eax, 0x10; mov ds, eax; hlt", CLEAR, "accessed", 0x10),
        ("mov eax, 0x10; mov ss, eax; hlt", CLEAR, "accessed", 0x10),
        ("mov eax, 0x18; ltr ax; hlt", CLEAR, "busy", 0x18),
        ("jmp far [y]; x: hlt; y: .long x; .word 8", CLEAR, "accessed", 8),
        ("jmp far [y]; x: hlt; y: .long x; .word 8", ACCESSED, "", 8),
        ("mov rax, cr0; btr rax, 16; mov cr0, rax; mov ds, [x]; hlt; x: .word 16", CLEAR, "", 16),
    ],
)
def test_a_gdt_that_is_read_only(source: str, code: str, bit: str, selector: int) -> None:
    """The processor sets a bit in what it loads, where it is not set yet (SDM Vol.3 3.4.5.1)."""
    with Machine("16M") as machine:
        machine.load(assemble(READ_ONLY_GDT.replace("CODE", code) + source, at=0x1000))
        result = machine.run(timeout=2.0)
        if not bit:
            assert result.outcome == "halt"
            return
        found = machine.autopsy(result)
    first = found.faults[0]
    assert (found.cause, first.vector, first.error_code) == ("write-protected", 14, 3), str(found)
    assert first.address == 0x400000 + selector
    assert f"setting the {bit} bit" in first.why
    assert found.certain


@pytest.mark.parametrize(("kind", "vectors"), [(0x9A, [6, 14]), (0x9B, [6])])
def test_a_handler_whose_descriptor_cannot_be_marked(kind: int, vectors: list[int]) -> None:
    """Delivery loads CS, too; from the state, for emulators leave the bit alone there."""
    layout = build("long", 0, 4 << 20)
    ram = bytearray(4 << 20)
    ram[layout.base :] = layout.data
    ram[0x1000:0x1002] = b"\x0f\x0b"
    ram[0x2060:0x2070] = bytes((0, 0x10, 8, 0, 0, 0x8E)) + bytes(10)
    ram[PAGE_2M + 8 : PAGE_2M + 16] = bytes((0, 0, 0, 0, 0, kind, 0x20, 0))
    registers, special = entry_state(layout, 0x1000, SpecialRegisters())
    registers.rsp = 0x8000
    special.idt = DescriptorTable(0x2000, 0x7F)
    special.gdt = DescriptorTable(PAGE_2M, 0xF)
    ram[special.cr3 + 2 * PAGE_4K + 8] &= ~2  # the PD entry of the second 2 MiB
    faults = chain(Scene(registers, special, partial(_read, ram)), Fault("trap", "", UD)).faults
    assert [one.vector for one in faults][:2] == vectors


def _read(ram: bytearray, address: int, length: int) -> bytes | None:
    return bytes(ram[address : address + length]) if address + length <= len(ram) else None


@pytest.mark.parametrize(
    ("cr2", "fault", "words"),
    [
        (1 << 40, Fault("page-not-present", "", PF, 0, 1 << 40), ""),
        ((1 << 40) + 8, Fault("page-not-present", "", PF, 0, (1 << 40) + 7), ""),
        (2 << 40, Fault("page-not-present", "", PF, 0, 1 << 40), "not 0x10000000000"),
        (0, Fault("bad-frame", "", GP, 0), ""),
        (1 << 40, Fault("bad-frame", "", GP, 0), ""),  # of a page fault before
        ((1 << 41) + 8, Fault("gdt-limit", "", GP, 8), "in the GDT"),
        ((1 << 42) + 7, Fault("unaligned", "", GP, 0), "in an operand"),
        ((1 << 42) + 8, Fault("unaligned", "", GP, 0), ""),
    ],
)
def test_what_cr2_says_against_it(cr2: int, fault: Fault, words: str) -> None:
    layout = build("long", 0, 1 << 20)
    ram = bytearray(1 << 20)
    ram[layout.base :] = layout.data
    ram[0x1000:0x1003] = assemble("mov rax, [rbx]")
    registers, special = entry_state(layout, 0x1000, SpecialRegisters())
    registers.rbx, special.cr2, special.gdt.base = 1 << 42, cr2, 1 << 41

    def read(address: int, length: int) -> bytes | None:
        return bytes(ram[address : address + length]) if address + length <= len(ram) else None

    found = contradiction(Scene(registers, special, read), [fault])
    assert words in found
    assert bool(words) is bool(found)
