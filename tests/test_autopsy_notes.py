"""What an autopsy notes besides the cause: recursion, and what CR3 has to do with it."""

import pytest

from kvmpy import Machine, assemble
from kvmpy.autopsy import Autopsy

pytestmark = pytest.mark.usefixtures("kvm_host")

# Gates 13 and 14, at 0x20000, lead to a handler; the stack is just above the code, at 0x4000.
FAULTY_HANDLER = """
    mov rsp, 0x7000
    mov rdi, 0x20000 + 13 * 16
    lea rax, [rip + handler]
    mov [rdi], ax
    mov word ptr [rdi + 2], 8
    mov word ptr [rdi + 4], 0x8e00
    mov [rdi + 16], ax
    mov word ptr [rdi + 18], 8
    mov word ptr [rdi + 20], 0x8e00
    lidt [idtr]
    mov rax, 0x8000000000
first:
    mov rbx, [rax]
    hlt
handler:
    mov rbx, [rax]
    iretq
idtr: .word 0xfff
    .quad 0x20000
"""
# The page of 0x400000 to 0x600000 is taken away below the stack.
DEEP = """
    mov rbx, cr3
    mov rbx, [rbx]
    and rbx, -4096
    mov rbx, [rbx]
    and rbx, -4096
    mov qword ptr [rbx + 16], 0
    mov rcx, cr3
    mov cr3, rcx
    mov rsp, 0x602000
f:  push rbx
    call f
    hlt
"""
NESTED = """
    mov ecx, 20
f:  dec ecx
    jz last
    call f
last:
    ud2
"""
LOW_CR3 = """
    mov rsi, cr3
    mov rdi, 0x8800
    mov ecx, 0x100
    rep movsq
    mov rax, 0x8800 + {}
    mov cr3, rax
    nop
    hlt
"""


def autopsy_of(source: str) -> Autopsy:
    with Machine("16M") as machine:
        machine.load(assemble(source, at=0x4000))
        result = machine.run(timeout=5)
        assert result.outcome == "shutdown", result
        found = machine.autopsy(result)
        assert not found.failure
        return found


def test_a_handler_that_faults_itself() -> None:
    symbols = assemble(FAULTY_HANDLER, at=0x4000).symbols
    handler, first = symbols["handler"], symbols["first"]
    found = autopsy_of(FAULTY_HANDLER)
    note = found.notes[-1]
    told = f"a handler faults itself, again and again; the first of all was at {first:#x}"
    assert note.endswith(told), str(found)
    assert f"exceptions at {handler:#x}, none" in note
    assert int(note.split("frames of ")[1].split()[0]) > 100


def test_calls_without_an_end() -> None:
    found = autopsy_of(DEEP)
    back = assemble(DEEP, at=0x4000).symbols["f"] + 6
    assert found.cause == "stack-unmapped"
    assert f"the return address {back:#x} 512 times or more" in found.notes[-1], str(found)


def test_some_recursion_is_no_matter() -> None:
    assert not autopsy_of(NESTED).notes


def test_a_cr3_that_is_no_multiple_of_a_page() -> None:
    found = autopsy_of(LOW_CR3.format(0))
    assert "CR3 is 0x8800, and tables begin at multiples of 0x1000" in found.faults[0].why
    # PWT and PCD are low bits of CR3 that mean something, and have no part in this.
    assert "CR3" not in autopsy_of(LOW_CR3.format(0x808)).faults[0].why


def test_a_cr3_outside_of_ram() -> None:
    found = autopsy_of("mov rax, 0x7000000000; mov cr3, rax; nop; hlt")
    assert found.cause == "tables-outside-ram"
    assert found.faults[0].why.endswith("that address is CR3's, 0x7000000000")
    assert not found.notes
    assert found.certain
