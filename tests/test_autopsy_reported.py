"""Autopsies of exceptions that ring 3 has reported, and of debug exceptions."""

from dataclasses import replace
from struct import pack

import pytest
from test_autopsy import scene_at

from kvmpy import Machine, assemble
from kvmpy.autopsy.examine import Finding, explain_shutdown
from kvmpy.autopsy.reported import explain_exception
from kvmpy.x86.exceptions import EXCEPTIONS, GuestException
from kvmpy.x86.flags import RFLAGS
from kvmpy.x86.segments import DescriptorTable
from kvmpy.x86.state import DebugRegisters

with_kvm = pytest.mark.usefixtures("kvm_host")
GENERAL_DETECT = 1 << 13


def reported(source: str, vector: int, *, past: int = 0, error: int | None = None,
             address: int | None = None, rflags: int = 2) -> Finding:  # fmt: skip
    """What is said of an exception at `source`, whose RIP is so many bytes past its start."""
    scene = scene_at(assemble(source, at=0x1000), ring=3)
    scene.registers.rip += past
    scene.registers.rflags = rflags
    name = EXCEPTIONS.get(vector, (f"vector {vector}",))[0]
    special, rip = scene.special, scene.registers.rip
    exception = GuestException(vector, name, "", error, rip, special.cs.selector, rflags,
                               scene.registers.rsp, special.ss.selector, address)  # fmt: skip
    return explain_exception(scene, exception)


@pytest.mark.parametrize(
    ("source", "vector", "size"),
    [
        ("int3", 3, 1),
        (".byte 0xcd, 3", 3, 2),
        ("int 4", 4, 2),
        (".byte 0xf1", 1, 1),
        ("int 0x80", 0x80, 2),
    ],
)
def test_a_trap_is_at_the_instruction_that_asked_for_it(
    source: str, vector: int, size: int
) -> None:
    found = reported(source, vector, past=size)
    assert (found.cause, found.rip, found.faults[0].vector) == ("trap", 0x1000, vector)


def test_a_vector_that_happens_to_stand_before_rip_is_no_trap() -> None:
    found = reported("mov eax, 0x0dcd0000; hlt", 13, past=5, error=0)  # cd 0d before HLT
    assert (found.cause, found.rip) == ("privileged", None)


@pytest.mark.parametrize(
    ("cause", "source", "vector", "more"),
    [
        ("trap", "nop", 1, {"rflags": RFLAGS.TF | 2}),
        ("floating-point", "divss xmm0, xmm0", 19, {}),
        ("floating-point", "fwait", 16, {}),
        ("unaligned", "mov eax, [0x5001]", 17, {"error": 0, "rflags": RFLAGS.AC | 2}),
        # What a masked move writes is in a register that nobody shows.
        ("page-not-present", "maskmovdqu xmm0, xmm1", 14, {"error": 6, "address": 1 << 40}),
        ("supervisor-page", "maskmovdqu xmm0, xmm1", 14, {"error": 7, "address": 0xFF000}),
        # A host that emulates makes #UD of what a processor raises #GP for.
        ("unaligned", "addps xmm0, [0x5008]", 6, {}),
        ("invalid-opcode", "int 0x80", 6, {}),
        ("invalid-opcode", "nop", 6, {}),
        # SYSRET has two reasons here, and the vector says which it was.
        ("privileged", "sysretq", 13, {"error": 0}),
        ("unknown", "nop", 13, {"error": 0}),
    ],
)
def test_a_reported_exception(cause: str, source: str, vector: int, more: dict[str, int]) -> None:
    found = reported(source, vector, **more)
    assert (found.cause, found.faults[0].vector) == (cause, vector), found
    assert found.faults[0].error_code == more.get("error")


@with_kvm
def test_int3_in_ring_3() -> None:
    with Machine("1M", ring=3) as machine:
        machine.load(assemble("nop; int3", at=0x1000))
        found = machine.autopsy(machine.run(timeout=2))
    assert (found.cause, found.rip, found.vector) == ("trap", 0x1001, 3), str(found)
    assert found.instruction.startswith("int3")


@pytest.mark.parametrize(
    ("source", "rflags", "debug"),
    [
        ("nop", RFLAGS.TF | 2, DebugRegisters()),
        ("nop", 2, DebugRegisters((0, 0x1000, 0, 0), dr7=1 << 2)),
        ("mov rax, dr0", 2, DebugRegisters(dr7=GENERAL_DETECT)),
    ],
)
def test_a_debug_exception_without_an_idt(source: str, rflags: int, debug: DebugRegisters) -> None:
    scene = replace(scene_at(assemble(source, at=0x1000)), debug=debug)
    scene.registers.rflags = rflags
    found = explain_shutdown(scene)
    assert found.settled
    assert (found.cause, found.faults[0].vector, found.faults[1].error_code) == ("no-idt", 1, 0xB)


@pytest.mark.parametrize(
    ("rflags", "debug"),
    [
        (RFLAGS.RF | 2, DebugRegisters((0x1000, 0, 0, 0), dr7=1)),  # resumed
        (2, DebugRegisters((0x1000, 0, 0, 0))),  # not enabled
        (2, DebugRegisters((0x1000, 0, 0, 0), dr7=1 | 3 << 16)),  # of data
        (2, DebugRegisters((0x1001, 0, 0, 0), dr7=1)),  # elsewhere
    ],
)
def test_what_is_no_breakpoint(rflags: int, debug: DebugRegisters) -> None:
    scene = replace(scene_at(assemble("ud2", at=0x1000)), debug=debug)
    scene.registers.rflags = rflags
    assert explain_shutdown(scene).faults[0].vector == 6


@pytest.mark.parametrize("zeros", [True, False])
def test_what_has_come_through_zeros(zeros: bool) -> None:
    """Ring 3's run through zeros ends at kvmpy's page tables, which are the supervisor's."""
    scene = scene_at(b"\xf4", ring=3)
    address = scene.special.cr3
    if not zeros:
        scene = scene_at(b"\xf4" * (address - 0x1000), ring=3)
    scene.registers.rip = address
    special = scene.special
    exception = GuestException(14, "#PF", "", 0x15, address, special.cs.selector, 2,
                               scene.registers.rsp, special.ss.selector, address)  # fmt: skip
    found = explain_exception(scene, exception)
    assert any("there are zeros up to" in note for note in found.notes) == zeros, found


@pytest.mark.parametrize(
    ("source", "dpl", "second"),
    [
        ("int 0x21", 0, (13, 0x21 << 3 | 2)),
        ("int3", 0, (13, 3 << 3 | 2)),
        ("int3", 3, (14, 2)),  # the gate is right, and RSP0 is 0
        ("ud2", 0, (14, 2)),  # an exception, of which no DPL is asked
    ],
)
def test_a_gate_for_ring_3_has_a_dpl(source: str, dpl: int, second: tuple[int, int]) -> None:
    gate = pack("<HHHHII", 0x1000, 8, 0x8E00 | dpl << 13, 0, 0, 0)
    table = gate * 14 + bytes(16 * 0x13) + gate
    scene = scene_at(
        assemble(source, at=0x1000).ljust(0x100, b"\0") + table.ljust(0x400, b"\0"), ring=3
    )
    scene.special.idt = DescriptorTable(0x1100, 0x3FF)
    scene.special.tr.base = 0x1600  # a TSS of zeros
    found = explain_shutdown(scene)
    assert (found.faults[1].vector, found.faults[1].error_code) == second, found
    assert found.cause == ("gate-dpl" if second[0] == 13 else "no-rsp0")


@pytest.mark.parametrize(
    ("source", "size", "cause"),
    [("int3; nop", 1, "no-rsp0"), ("int 0x21; nop", 2, "no-rsp0"), ("nop; nop", 1, "unknown")],
)
def test_a_host_that_is_past_the_trap(source: str, size: int, cause: str) -> None:
    """INT3 in ring 3 that cannot be delivered leaves RIP behind it where the code runs natively."""
    table = pack("<HHHHII", 0x1000, 8, 0xEE00, 0, 0, 0) * 0x22
    scene = scene_at(assemble(source, at=0x1000).ljust(0x100, b"\0") + table, ring=3)
    scene.special.idt = DescriptorTable(0x1100, len(table) - 1)
    scene.special.tr.base = 0x1600
    scene.registers.rip += size
    found = explain_shutdown(scene)
    assert (found.cause, found.rip) == (cause, None if cause == "unknown" else 0x1000), found
    assert found.settled == (cause != "unknown")


def test_a_stack_where_no_ram_is_ends_the_chain() -> None:
    table = pack("<HHHHII", 0x1000, 8, 0x8E00, 0, 0, 0) * 16
    scene = scene_at(b"\x0f\x0b".ljust(0x100, b"\0") + table)
    scene.special.idt = DescriptorTable(0x1100, 0xFF)
    scene.registers.rsp = 0xD000_0000
    found = explain_shutdown(scene)
    assert found.settled
    assert (found.cause, found.faults[-1].vector) == ("delivery-exit", None)
    assert "where there is no RAM" in found.faults[-1].why


@with_kvm
def test_a_single_step_that_nobody_asked_for_by_name() -> None:
    with Machine("1M") as machine:
        machine.load(assemble("pushfq; or dword ptr [rsp], 0x100; popfq; nop; nop; hlt", at=0x1000))
        start = machine.snapshot()
        found = machine.autopsy(machine.run(timeout=2), start=start)
    assert (found.cause, found.vector) == ("no-idt", 1), str(found)
