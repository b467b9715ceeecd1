"""What an autopsy notes besides the cause."""

import pytest

from kvmpy import Machine, assemble
from kvmpy.autopsy import Autopsy

pytestmark = pytest.mark.usefixtures("kvm_host")

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
