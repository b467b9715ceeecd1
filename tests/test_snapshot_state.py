"""The state of processors and interrupt controllers comes back, whichever way one goes back."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_snapshot import (
    DATA,
    END,
    EVERYWHERE,
    MEMORY,
    MMIO,
    PORT,
    attach,
    code,
    disturb,
    end_state,
    machine_of,
)

from kvmpy import Machine, MmioRead, PortIn, assemble
from kvmpy.x86.state import DebugRegisters, MPState, XCRs

pytestmark = pytest.mark.usefixtures("kvm_host")

# The rest of a guest that takes interrupt 0x40 and ends with the number in BL.
HANDLER = """
handler:
mov al, bl
out 0xf4, al
.align 16
idt:
.space 1024
.word handler & 0xffff, 8, 0x8e00, handler >> 16
.long 0, 0
end:
register:
.word end - idt - 1
.quad idt
"""
ENABLE = """
lidt [rip + register]
mov bl, 9
mov edi, 0xfee00000
mov dword ptr [rdi + 0xf0], 0x1ff
"""


def interrupted(body: str) -> bytes:
    return bytes(assemble(ENABLE + body + HANDLER, mode="long", at=0x1000))


def again(machine: Machine, snapshot: Any) -> Iterator[Machine]:
    """The machine at the snapshot, each time in another way."""
    yield machine
    machine.restore(snapshot)
    yield machine
    for _ in range(3):
        machine.reset_to(snapshot)
        yield machine
    with Machine.from_snapshot(snapshot, attach) as other:
        yield other
        for way in (other.restore, other.reset_to, other.reset_to):
            way(snapshot)
            yield other


# Exits of more than one part ----------------------------------------------------------------

IN_PARTS = (
    f"mov esi, {DATA}\nmov edx, {PORT}\nmov ecx, 5\nrep outsb",
    f"mov edi, {DATA + 64}\nmov edx, {PORT}\nmov ecx, 5\nrep insb",
    f"mov edi, {DATA + 4094}\nmov edx, {PORT}\nmov ecx, 2\nrep insd",
    f"mov edi, {MMIO:#x}\nxchg [rdi], eax",
    f"mov edi, {MMIO + 16:#x}\nlock add [rdi], rax",
    f"mov edi, {MMIO + 0xFFD:#x}\nmov rax, [rdi]",
    f"mov edi, {MMIO + 0xFFD:#x}\nmov [rdi], rax",
    f"mov esi, {MMIO:#x}\nmov edi, {DATA}\nmovsq",
    f"mov esi, {DATA}\nmov edi, {MMIO:#x}\nmov ecx, 2\nrep movsq",
    f"push qword ptr [{DATA}]",
)


@settings(max_examples=8)
@pytest.mark.parametrize("ring", [0, 3])
@given(pieces=st.lists(st.sampled_from(EVERYWHERE + IN_PARTS), min_size=1, max_size=10))
def test_at_every_exit_also_of_accesses_in_parts(ring: int, pieces: list[str]) -> None:
    """Seen one by one as they come, unanswered, or by a limit of exits."""
    body = b"".join(map(code, pieces)) + code(END)
    with machine_of(body, ring) as machine:
        whole = end_state(machine)
        exits = sum(machine.cpus[0].exit_counts().values())
    with machine_of(body, ring) as machine:
        start = machine.snapshot()
        for k in range(1, exits):
            for how in ("limit", "exits"):
                machine.restore(start)
                if how == "limit":
                    machine.run(max_exits=k, timeout=10)
                else:
                    list(machine.exits(max_exits=k, timeout=10))
                snapshot = machine.snapshot()
                for way in (machine.restore, machine.reset_to, machine.reset_to):
                    disturb(machine)
                    way(snapshot)
                    assert end_state(machine) == whole
            with Machine.from_snapshot(snapshot, attach) as other:
                assert end_state(other) == whole


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("kind", [PortIn, MmioRead])
def test_a_read_that_was_or_was_not_answered_by_hand(kind: type, answered: bool) -> None:
    text = {
        PortIn: f"in eax, {PORT}\nmov edi, {DATA}\nmov [rdi], eax\n" + END,
        MmioRead: f"mov edi, {MMIO:#x}\nmov eax, [rdi]\nmov edi, {DATA}\nmov [rdi], eax\n" + END,
    }[kind]
    with machine_of(code(text), 0) as machine:
        (cpu,) = machine.cpus
        assert isinstance(cpu.run(timeout=10), kind)
        if answered:
            cpu.reply(b"\x11\x22\x33\x44")
        snapshot = machine.snapshot()
        found = set()
        for one in again(machine, snapshot):
            assert one.run(timeout=10).outcome == "debug-exit"
            found.add(one.memory.read(DATA, 4))
        assert len(found) == 1
        assert (found == {b"\x11\x22\x33\x44"}) == answered


# Registers that only an ioctl reaches -------------------------------------------------------

MSRS = {
    0xC0000081: 0x0023_0010_0000_0000,  # STAR
    0xC0000082: 0xFFFF_8000_0000_1234,  # LSTAR
    0xC0000084: 0x700,  # FMASK
    0xC0000102: 0x1234_5678,  # KERNEL_GS_BASE
    0x174: 0x8,  # SYSENTER_CS
    0x175: 0x7000,  # SYSENTER_ESP
    0x176: 0x8000,  # SYSENTER_EIP
    0xC0000100: 0x5555_0000,  # FS base
    0xC0000101: 0x6666_0000,  # GS base
    0x277: 0x0007_0406_0007_0401,  # PAT
    0x202: 0x1000_0006,  # the variable MTRR 1's base
    0x259: 0x0606_0606,  # the fixed MTRR of 0xa0000
    0x2FF: 0xC06,  # the MTRRs' default type
}


@pytest.mark.parametrize("by", ["guest", "host"])
def test_msrs_debug_registers_and_xcr0(by: str) -> None:
    changes = "".join(
        f"mov ecx, {index:#x}\nmov eax, {value & 0xFFFFFFFF:#x}\nmov edx, {value >> 32:#x}\nwrmsr\n"
        for index, value in MSRS.items()
    )
    changes += "mov rax, 0x4000\nmov dr0, rax\nmov rax, 0x5000\nmov dr3, rax\n"
    with machine_of(code("out 0x30, al\n" + changes + END), 0) as machine:
        (cpu,) = machine.cpus
        machine.run(max_exits=1, timeout=10)
        before = cpu.get_xcrs()
        snapshot = machine.snapshot()
        for one in again(machine, snapshot):
            (cpu,) = one.cpus
            assert cpu.get_xcrs() == before
            assert cpu.get_debugregs().db == (0, 0, 0, 0)
            start = cpu.get_msrs(MSRS)
            assert not any(start[index] == value for index, value in MSRS.items())
            assert one.snapshot().diff(snapshot).registers == {}
            if by == "guest":
                assert one.run(timeout=10).outcome == "debug-exit"
            else:
                cpu.set_msrs(MSRS)
                cpu.set_debugregs(DebugRegisters(db=(0x4000, 0, 0, 0x5000)))
                if before.values:  # the host has XSAVE
                    cpu.set_xcrs(XCRs({0: 3 if before.values[0] != 3 else 1}))
                    assert cpu.get_xcrs() != before
            assert cpu.get_msrs(MSRS) == MSRS
            assert cpu.get_debugregs().db == (0x4000, 0, 0, 0x5000)


# Interrupts ---------------------------------------------------------------------------------


def test_an_interrupt_that_waits_without_an_irqchip() -> None:
    body = interrupted("out 0x30, al\nsti\nnop\nhlt")
    with machine_of(body, 0) as machine:
        machine.run(max_exits=2, timeout=10)  # without a local APIC, its registers are MMIO
        empty = machine.snapshot()
        machine.cpus[0].interrupt(0x40)
        waiting = machine.snapshot()
        assert waiting.diff(empty).registers
        for _ in range(2):
            for one in again(machine, waiting):
                assert one.run(timeout=10).value == 9
            machine.reset_to(empty)
            assert machine.run(timeout=10).outcome == "halt"  # it is gone
            machine.restore(waiting)


@pytest.mark.parametrize("irqchip", ["split", pytest.param("full", marks=pytest.mark.slow)])
def test_a_timer_in_flight_and_a_guest_that_sleeps(irqchip: str) -> None:
    timer = """
    mov dword ptr [rdi + 0x3e0], 0xb
    mov dword ptr [rdi + 0x320], 0x40
    mov dword ptr [rdi + 0x380], 150000000
    sti
    out 0x30, al
    wait:
    hlt
    jmp wait
    """
    with Machine(MEMORY, irqchip=irqchip) as machine:
        attach(machine)
        machine.load(interrupted(timer), 0x1000)
        machine.run(max_exits=1, timeout=10)
        assert machine.run(timeout=0.01).outcome == "timeout"
        snapshot = machine.snapshot()
        for one in again(machine, snapshot):
            assert one.cpus[0].get_mp_state() == MPState.HALTED
            started = time.monotonic()
            assert one.run(timeout=10).value == 9
            assert time.monotonic() - started > 0.002  # of 140 ms: it was not due at once
            assert one.cpus[0].get_mp_state() == MPState.RUNNABLE


def test_a_message_that_waits_in_the_local_apic() -> None:
    with Machine(MEMORY, irqchip="split") as machine:
        attach(machine)
        machine.load(interrupted("cli\nout 0x30, al\nsti\nnop\nwait:\njmp wait"), 0x1000)
        machine.run(max_exits=1, timeout=10)
        empty = machine.snapshot()
        machine.vm.signal_msi(0xFEE00000, 0x40)
        waiting = machine.snapshot()
        for one in again(machine, waiting):
            assert one.run(timeout=10).value == 9
        for _ in range(2):
            machine.reset_to(empty)
            assert machine.run(timeout=0.02).outcome == "timeout"


@pytest.mark.parametrize("kind", ["fixed", "start-up"])
def test_two_vcpus_in_the_midst_of_an_ipi(kind: str) -> None:
    """Sent by the one, and not yet seen by the other."""
    fixed = """
    cmp byte ptr [0x20000], 0
    jne second
    mov dword ptr [rdi + 0x310], 0x1000000
    mov dword ptr [rdi + 0x300], 0x4040
    out 0x30, al
    wait:
    jmp wait
    second:
    sti
    nop
    stay:
    jmp stay
    """
    start_up = """
    mov dword ptr [rdi + 0x310], 0x1000000
    mov dword ptr [rdi + 0x300], 0x4500
    mov dword ptr [rdi + 0x310], 0x1000000
    mov dword ptr [rdi + 0x300], 0x4608
    out 0x30, al
    wait:
    jmp wait
    """
    with Machine(MEMORY, cpus=2, irqchip="split") as machine:
        attach(machine)
        machine.load(interrupted(fixed if kind == "fixed" else start_up), 0x1000)
        real = assemble("mov al, 9\nout 0xf4, al\nhlt", mode="real", at=0x8000)
        machine.memory.write(0x8000, bytes(real))
        if kind == "fixed":
            machine.cpus[1].set_mp_state(MPState.RUNNABLE)
            machine.memory.write(DATA, b"\1")
            assert machine.run(timeout=0.05, cpu=1).outcome == "timeout"  # at `stay`
            machine.memory.write(DATA, b"\0")
        machine.run(max_exits=1, timeout=10)
        snapshot = machine.snapshot()
        for one in again(machine, snapshot):
            assert one.run(timeout=10, cpu=1).value == 9
            assert one.run(timeout=0.01, cpu=0).outcome == "timeout"


@pytest.mark.parametrize("ring", [0, 3])
def test_translations_of_what_is_undone_are_forgotten(ring: int) -> None:
    """The guest maps something else for a moment: in the end no byte of RAM has changed."""
    virtual, tables = 1 << 39, 0x100000
    text = f"""
    mov rdi, {virtual:#x}
    mov esi, {tables + 0x2000:#x}
    mov rbx, [rsi]
    mov rcx, rbx
    xor rcx, r8
    mov [rsi], rcx
    mov eax, [rdi]
    mov [rsi], rbx
    out 0xf4, eax
    hlt
    """
    with Machine(4 << 20, "long", ring) as machine:
        machine.load(code(text), 0x1000)
        (cpu,) = machine.cpus
        machine.memory.write(0x20000, b"one.")
        machine.memory.write(0x21000, b"two.")
        # Accessed and dirty already, so that the processor has nothing to note.
        pml4 = cpu.get_sregs().cr3
        machine.memory.write_u64(pml4 + 8, tables | 0x27)
        machine.memory.write_u64(tables, tables + 0x1000 | 0x27)
        machine.memory.write_u64(tables + 0x1000, tables + 0x2000 | 0x27)
        machine.memory.write_u64(tables + 0x2000, 0x20000 | 0x67)
        machine.run(timeout=10)
        machine.set_entry(0x1000)
        snapshot = machine.snapshot()
        for other in (1, 0, 1, 1, 0, 0, 1, 0):
            machine.restore(snapshot)
            registers = cpu.get_regs()
            registers.r8 = 0x1000 * other
            cpu.set_regs(registers)
            value = machine.run(timeout=10).value
            assert value == int.from_bytes(b"two." if other else b"one.", "little")
