"""Autopsies of page faults: which address they are about, the GDT's among them."""

import pytest

from kvmpy import Machine, assemble
from kvmpy.autopsy.doubt import contradiction
from kvmpy.autopsy.fault import GP, PF, Fault
from kvmpy.autopsy.scene import Scene
from kvmpy.modes import build, entry_state
from kvmpy.x86.paging import PAGE_2M
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
