"""Autopsies: classic mistakes by name, dead machines left alone, and no end that is hidden."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from struct import pack
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mistakes import MISTAKES, PRELUDE, Mistake

from kvmpy import Machine, assemble
from kvmpy.asm import Program
from kvmpy.autopsy import CAUSES, Autopsy, conduct
from kvmpy.autopsy.delivery import chain
from kvmpy.autopsy.entry import broken_rules
from kvmpy.autopsy.examine import explain_gap, explain_shutdown
from kvmpy.autopsy.fault import Fault
from kvmpy.autopsy.scene import Scene
from kvmpy.exits import FailEntry, Shutdown
from kvmpy.modes import build, entry_state
from kvmpy.probe import probe
from kvmpy.x86.exceptions import ERROR_CODE_VECTORS
from kvmpy.x86.flags import CR0, CR4, EFER, RFLAGS
from kvmpy.x86.registers import REGISTER_NAMES, Registers
from kvmpy.x86.segments import DescriptorTable
from kvmpy.x86.state import SpecialRegisters
from kvmpy.x86.tables import EXCEPTION_PORT, STUB_SIZE, idt64, stubs

with_kvm = pytest.mark.usefixtures("kvm_host")
NEEDS = {"emulator": "ring0-sse"}  # where this probe says yes, the guest does not die
STUBS, IDT, STACK = 0x20000, 0x22000, 0x25000


def program(mistake: Mistake) -> Program:
    source = (PRELUDE if mistake.mode == "long" else "") + mistake.source
    return assemble(source, mistake.mode, at=0x1000)


def machine_of(mistake: Mistake) -> Machine:
    machine = Machine("16M", mistake.mode, mistake.ring)
    machine.load(program(mistake))
    return machine


@with_kvm
@pytest.mark.parametrize("mistake", MISTAKES, ids=[one.name for one in MISTAKES])
def test_a_mistake_is_called_by_its_name(mistake: Mistake) -> None:
    if mistake.name in NEEDS and probe(NEEDS[mistake.name]).answer == "yes":
        pytest.skip(f"this host can do it: {probe(NEEDS[mistake.name]).detail}")
    with machine_of(mistake) as machine:
        result = machine.run(timeout=2)
        if result.outcome == "halt" and mistake.name == "wrong-gate":
            pytest.skip("this host's KVM takes an IDT entry of type 0 for a gate: nothing dies")
        assert result.crashed, result
        registers, special = machine.cpus[0].get_regs(), machine.cpus[0].get_sregs()
        memory = bytes(machine.memory.read(0, 16 << 20))
        found = machine.autopsy(result)
        assert (found.cause, found.vector) == (mistake.cause, mistake.vector), str(found)
        assert found.certain
        assert not found.failure
        assert found.rip == result.registers.rip
        assert found.outcome == result.outcome
        assert found.cause in CAUSES
        # The dead machine is as it was.
        assert machine.cpus[0].get_regs() == registers
        assert machine.cpus[0].get_sregs() == special
        assert bytes(machine.memory.read(0, 16 << 20)) == memory


OWN_TABLES = (
    *("idt", "gate", "stack-in", "no-rsp0", "lme-with", "wrong-code", "zeros", "fell-off"),
    "pml4-cleared",
)
AGREEING = [
    one
    for one in MISTAKES
    if one.mode == "long" and not one.ring and one.vector is not None
    and not any(word in one.name for word in OWN_TABLES)
]  # fmt: skip


@with_kvm
@pytest.mark.parametrize("mistake", AGREEING, ids=[one.name for one in AGREEING])
def test_the_processor_agrees(mistake: Mistake) -> None:
    """With an IDT, and a stack of its own for each handler, it says what it raised and where."""
    with machine_of(mistake) as machine:
        result = machine.run(timeout=2)
        found = machine.autopsy(result)
    with machine_of(mistake) as machine:
        seen: list[tuple[int, int | None, int]] = []
        table = bytearray(idt64(STUBS))
        table[4::16] = b"\x01" * 256  # IST 1
        machine.memory.write(STUBS, stubs())
        machine.memory.write(IDT, table)
        machine.memory.write(machine.layout.tss + 36, STACK.to_bytes(8, "little"))
        cpu = machine.cpus[0]
        special = cpu.get_sregs()
        special.idt = DescriptorTable(IDT, len(table) - 1)
        cpu.set_sregs(special)

        def report(offset: int, size: int, value: int | None) -> None:
            registers = cpu.get_regs()
            vector = (registers.rip - STUBS) // STUB_SIZE
            frame = machine.memory.read(registers.rsp, 16)
            words = [int.from_bytes(frame[at : at + 8], "little") for at in (0, 8)]
            has_code = vector in ERROR_CODE_VECTORS
            seen.append((vector, words[0] if has_code else None, words[has_code]))
            machine.end_run("reported")

        machine.on_port(EXCEPTION_PORT)(report)
        machine.run(timeout=2)
    assert seen == [(found.vector, found.error_code, found.rip)], str(found)


def test_enough_mistakes() -> None:
    assert len(MISTAKES) >= 25
    assert len(AGREEING) >= 25
    assert {one.cause for one in MISTAKES} <= set(CAUSES)


@with_kvm
def test_what_came_before() -> None:
    source = "mov al, 7; out 0x80, al; mov rax, 0xc0000000; jmp rax"
    with Machine("1M") as machine:
        machine.load(assemble(source, at=0x1000))
        machine.snapshot()
        found = machine.autopsy(machine.run(timeout=2))
    assert found.replayed
    assert found.last == (
        "out: 0x7 to port 0x80", "0x1004: movabs rax, 0xc0000000", "0x100e: jmp rax",
    )  # fmt: skip
    assert found.explanation[-1].startswith("first: stop")


@with_kvm
def test_lines_that_are_given_stand_before_the_replay() -> None:
    with Machine("1M") as machine:
        machine.load(b"\x0f\x0b")
        result = machine.run(timeout=2)
        assert machine.autopsy(result, last=["one", "two"]).last == ("one", "two")


@with_kvm
def test_the_last_records_of_a_recorder() -> None:
    class Recorded(Machine):
        trace = tuple(SimpleNamespace(text=f"exit {number}" if number else "", kind="halt")
                      for number in (9, 8, 7, 6, 5, 4, 3, 0))  # fmt: skip

    with Recorded("1M") as machine:
        machine.load(b"\x0f\x0b")
        found = machine.autopsy(machine.run(timeout=2))
    assert found.last == ("exit 7", "exit 6", "exit 5", "exit 4", "exit 3", "halt")


@with_kvm
def test_a_processor_that_was_reset_at_its_end() -> None:
    """As AMD's leaves a vCPU: nothing is left to look at, so a copy is stepped to the end."""
    with Machine("1M") as machine:
        machine.load(assemble("mov rax, 0x8000000000; mov rbx, [rax]; hlt", at=0x1000))
        start = machine.snapshot()
        result = machine.run(timeout=2)
        cpu = machine.cpus[0]
        special = cpu.get_sregs()
        special.cr0, special.efer, special.cr4 = int(CR0.ET), 0, 0
        special.cs.selector, special.cs.base, special.cs.l = 0xF000, 0xFFFF_0000, 0
        cpu.set_sregs(special)
        cpu.set_regs(Registers(rip=0xFFF0))
        reset = replace(result, packed=Registers(rip=0xFFF0).pack())
        found = machine.autopsy(reset, start=start)
        assert (found.cause, found.vector) == ("page-not-present", 14), str(found)
        assert found.replayed
        assert "INIT" in found.notes[-1]
        machine._at = None  # no snapshot: it says so
        found = machine.autopsy(reset)
        assert found.cause == "unknown"
        assert "no snapshot" in str(found)


@with_kvm
def test_a_copy_that_ends_otherwise_says_so() -> None:
    # in al, dx from the serial port: with a byte it dies, without one it halts
    source = "mov dx, 0x3fd; in al, dx; test al, 1; jz x; mov rbx, 0xc0000000; jmp rbx; x: hlt"
    feed = iter((b"!",))
    with Machine("1M", input=lambda: next(feed, b"")) as machine:
        machine.load(assemble(source, at=0x1000))
        machine.snapshot()
        result = machine.run(timeout=2)
        assert result.outcome == "internal-error"
        found = machine.autopsy(result)
    assert found.cause == "no-ram"
    assert not found.replayed
    assert "ended otherwise (halt)" in str(found)


@with_kvm
def test_an_interrupt_without_an_idt() -> None:
    with Machine("1M") as machine:
        machine.load(assemble("sti; nop; x: jmp x", at=0x1000))
        machine.run(timeout=0.05)
        machine.cpus[0].interrupt(0x20)
        found = machine.autopsy(machine.run(timeout=2))
    assert found.cause == "no-idt"
    assert found.vector is None
    assert not found.certain
    assert "interrupt" in found.explanation[1]


@with_kvm
def test_a_copy_needs_the_devices_that_the_guest_has() -> None:
    def attach(machine: Machine) -> None:
        machine.on_port(0x10)(lambda offset, size, value: 7)

    source = "in al, 0x10; cmp al, 7; jne x; mov rax, 0xc0000000; jmp rax; x: hlt"
    with Machine("1M") as machine:
        attach(machine)
        machine.load(assemble(source, at=0x1000))
        machine.snapshot()
        result = machine.run(timeout=2)
        assert not machine.autopsy(result).replayed
        found = machine.autopsy(result, attach=attach)
    assert found.last[0] == "in: 1 bytes from port 0x10"
    assert found.last[-1].endswith("jmp rax")


@with_kvm
def test_it_never_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmpy.autopsy.replay._SECONDS", 0.3)
    # Some seconds of loop before the end, in a copy: the replay gives up, the diagnosis stays.
    source = "mov ecx, 100000000; x: dec ecx; jnz x; mov rbx, 0xc0000000; jmp rbx"
    with Machine("1M") as machine:
        machine.load(assemble(source, at=0x1000))
        machine.snapshot()
        cpu = machine.cpus[0]
        registers = cpu.get_regs()
        registers.rip = 0xC000_0000
        cpu.set_regs(registers)
        result = machine.run(timeout=2)
        started = time.monotonic()
        found = machine.autopsy(result)
        assert time.monotonic() - started < 20
        assert "ended otherwise (timeout)" in str(found)
    assert found.cause == "no-ram"


def broken(*_: object) -> None:
    raise ZeroDivisionError("a bug")


@with_kvm
def test_an_autopsy_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with Machine("1M") as machine:
        machine.load(b"\x0f\x0b")
        result = machine.run(timeout=2)
        monkeypatch.setattr("kvmpy.autopsy.conduct.explain_shutdown", broken)
        found = machine.autopsy(result)
    assert found.outcome == "shutdown"
    assert found.failure == "the autopsy itself failed: ZeroDivisionError: a bug"
    assert found.failure in str(found)


@with_kvm
def test_without_a_result_the_last_exit_counts() -> None:
    with Machine("1M") as machine:
        machine.load(b"\x0f\x0b")
        assert list(machine.exits(timeout=2))[-1] == Shutdown()
        assert machine.autopsy().cause == "no-idt"
        assert machine.autopsy(cpu=7).failure


def test_which_end_of_an_access_is_not_canonical() -> None:
    scene = scene_at(assemble("mov rcx, [rax]"))
    scene.registers.rax = (1 << 47) - 4
    assert "last byte, at 0x800000000003, is not canonical" in explain_shutdown(scene).faults[0].why
    scene.registers.rax = 1 << 47
    assert "0x800000000000), which is not canonical" in explain_shutdown(scene).faults[0].why


@pytest.mark.parametrize(
    ("cs", "ss", "cause"), [(0x1238, 0x10, "bad-frame"), (8, 0x1230, "bad-stack-segment")]
)
def test_iret_shows_its_whole_frame(cs: int, ss: int, cause: str) -> None:
    words = (0x2000, cs, 2, 0x9000, ss)
    scene = scene_at(assemble("iretq", at=0x1000).ljust(0x100, b"\0") + pack("<5Q", *words))
    scene.registers.rsp = 0x1100
    found = explain_shutdown(scene)
    assert found.cause == cause
    assert f"the frame is {', '.join(map(hex, words))}" in found.faults[0].why


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ((2, 0x2042, 8, 0x10046, 0x9000), "it begins a word later"),  # #PF's error code
        ((2, 0x2042, 8, 0x13046, 0x9000), "it begins a word later"),  # with an IOPL of 3
        ((8, 0x10046, 0x9000, 0x10, 0), "it begins a word earlier"),
        ((8, 0x2042, 2, 0x9000, 0x10), "the two are swapped"),
        ((0x10, 0x9000, 2, 0x2000, 8), "the frame has the code selector 0x9000"),
    ],
)
def test_a_frame_that_is_shifted_says_which_way(words: tuple[int, ...], hint: str) -> None:
    scene = scene_at(assemble("iretq", at=0x1000).ljust(0x100, b"\0") + pack("<5Q", *words))
    scene.registers.rsp = 0x1100
    found = explain_shutdown(scene)
    assert found.cause == "bad-frame"
    hints = {"word later", "word earlier", "swapped"}
    assert hint in found.faults[0].why
    assert sum(one in found.faults[0].why for one in hints) == ("selector" not in hint)


@pytest.mark.parametrize(
    ("source", "words", "hint"),
    [
        ("iretd", (0x2042, 8, 2, 0x9000, 0x10), True),
        ("retf", (0x2042, 8), True),
        ("retf", (0x2042 | 0x1238 << 32, 8), True),
        ("retf", (0x2042, 0x1238), False),
    ],
)
def test_a_frame_of_iretq_that_iret_pops(source: str, words: tuple[int, ...], hint: bool) -> None:
    frame = b"".join(word.to_bytes(8, "little") for word in words)
    scene = scene_at(assemble(source, at=0x1000).ljust(0x100, b"\0") + frame)
    scene.registers.rsp = 0x1100
    found = explain_shutdown(scene)
    assert found.cause == "bad-frame"
    assert ("IRETQ and LRETQ pop 8" in found.faults[0].why) == hint


def test_an_instruction_that_was_refused() -> None:
    found = conduct.conduct(scene_at(b"\x90"), "shutdown", Shutdown(), None)
    text = str(found)
    assert found.cause == "unknown"
    assert not found.certain
    assert "(likely)" not in text
    assert "refused the instruction itself" in text


@with_kvm
def test_an_end_that_is_no_crash() -> None:
    with Machine("1M") as machine:
        machine.load(b"\xf4")
        found = machine.autopsy(machine.run(timeout=2))
    assert found.cause == "unknown"
    assert "halt" in str(found)


def kvmpy(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvmpy", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@with_kvm
def test_kvmpy_run_tells_it(tmp_path: Path) -> None:
    guest, report = tmp_path / "guest.bin", tmp_path / "report.json"
    guest.write_bytes(assemble("mov rax, 0x8000000000; mov rbx, [rax]; hlt", at=0x1000))
    done = kvmpy("run", guest, "--report", report)
    assert done.returncode == 126
    assert "autopsy: page-not-present" in done.stderr
    assert "try:" not in done.stderr  # what it says is more than a guess from the outcome
    assert "PML4 entry" in done.stderr
    facts = json.loads(report.read_text())["autopsy"]
    assert (facts["cause"], facts["vector"]) == ("page-not-present", 14)
    done = kvmpy("run", guest, "--no-autopsy", "--report", report)
    assert done.returncode == 126
    assert "try: an exception met no handler" in done.stderr
    assert "autopsy" not in done.stderr
    assert json.loads(report.read_text())["autopsy"] is None


@with_kvm
def test_kvmpy_run_shows_the_code_at_rip(tmp_path: Path) -> None:
    """A code segment of 64 bits has no base, whatever its descriptor says."""
    guest = tmp_path / "based.S"
    guest.write_text("""
        lgdt [g]; push 8; lea rax, [rip + x]; push rax; lretq
        x: mov ebx, 1; ud2
        .align 8
        t: .quad 0, 0x00209a0010000000
        g: .word 15; .quad t
    """)
    done = kvmpy("run", guest)
    assert ": 0f 0b                    ud2\n" in done.stderr


@with_kvm
@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "mov rax, cr3; mov qword ptr [rax], 0; mov cr3, rax; hlt",
            "is not mapped: its page tables",
        ),
        ("mov rax, 0xc0000000; jmp rax", "is at physical 0xc0000000, where there is no RAM"),
    ],
)
def test_kvmpy_run_tells_unmapped_from_no_ram(source: str, words: str, tmp_path: Path) -> None:
    guest = tmp_path / "guest.bin"
    guest.write_bytes(assemble(source, at=0x1000))
    for option in ((), ("--no-autopsy",)):
        done = kvmpy("run", guest, *option)
        assert done.returncode == 126
        assert words in done.stderr
        jumped = "the guest jumped to where there is no RAM" in done.stderr
        assert jumped is ("no RAM" in words)


# Without KVM: the state alone --------------------------------------------------------------


def scene_at(code: bytes, mode: str = "long", ring: int = 0) -> Scene:
    """The entry state of a guest in 1 MiB of RAM."""
    layout = build(mode, ring, 1 << 20)
    ram = bytearray(1 << 20)
    ram[layout.base :] = layout.data
    ram[0x1000 : 0x1000 + len(code)] = code
    registers, special = entry_state(layout, 0x1000, SpecialRegisters())
    return Scene(registers, special, partial(read, ram))


def read(ram: bytearray, address: int, length: int) -> bytes | None:
    return bytes(ram[address : address + length]) if address + length <= len(ram) else None


def test_a_wrong_gate_from_the_state() -> None:
    scene = scene_at(b"\x0f\x0b" + b"\x90" * 14 + bytes((0, 0x10, 8, 0, 0, 0x80)) + bytes(10))
    scene.special.idt = DescriptorTable(0x1010 - 6 * 16, 0xFFF)
    found = explain_shutdown(scene)
    assert found.cause == "wrong-gate"
    assert [fault.vector for fault in found.faults][:2] == [6, 13]


def test_a_missing_tss_from_the_state() -> None:
    scene = scene_at(b"\x0f\x0b", ring=3)
    scene.special.tr.unusable, scene.special.tr.present = 1, 0
    assert explain_shutdown(scene).cause == "no-tss"


def flags(register: str, bits: int) -> Callable[[Scene], None]:
    return lambda scene: setattr(scene.special, register, getattr(scene.special, register) | bits)


def in_ring0(bits: int) -> Callable[[Scene], None]:
    """Ring 0 in the layout of ring 3, where low memory is the user's."""

    def change(scene: Scene) -> None:
        scene.special.cr4 |= bits
        scene.special.ss.dpl = 0

    return change


def closed_ports(scene: Scene) -> None:
    scene.special.tr.limit = 0x67


STATES = (
    ("tables-outside-ram", 14, "nop", "long", 0, lambda s: setattr(s.special, "cr3", 0x70 << 32)),
    ("smep", 14, "nop", "long", 3, in_ring0(CR4.SMEP)),
    ("smap", 14, "mov rax, [0x2000]", "long", 3, in_ring0(CR4.SMAP)),
    ("segment-limit", 13, "mov eax, [0x2000]", "protected", 0,
     lambda s: setattr(s.special.ds, "limit", 0xFFF)),
    ("segment-limit", 12, "push eax", "protected", 0,
     lambda s: setattr(s.special.ss, "limit", 0xFFF)),
    ("idt-outside-ram", 6, "ud2", "long", 0,
     lambda s: setattr(s.special, "idt", DescriptorTable(0xD000_0000, 0xFFF))),
    ("ldt-limit", 13, "mov eax, 0xc; mov ds, ax", "long", 0, lambda s: step(s, 5)),
    ("descriptor-bits", 13, "jmp far [x]; x: .long 0; .word 8", "long", 0, "0x00609a0000000000"),
    ("segment-rights", 13, "mov ss, [x]; x: .word 8", "long", 0, "0x00209a0000000000"),
    ("wrong-ring", 13, "jmp far [x]; x: .long 0; .word 8", "long", 0, "0x0020fa0000000000"),
    ("wrong-descriptor", 13, "ltr [x]; x: .word 8", "long", 0, "0x00cf92000000ffff"),
    ("not-present-segment", 11, "ltr [x]; x: .word 8", "long", 0, "0x0000090000000067"),
    ("nested-task", 13, "iretq", "long", 0, lambda s: setattr(s.registers, "rflags", 0x4002)),
    ("pg-without-pe", 13, "mov eax, 0x80000000; mov cr0, eax", "real", 0, lambda s: step(s, 6)),
    ("pg-in-64-bit-segment", 13, "mov eax, 0x80000001; mov cr0, eax", "protected", 0,
     lambda s: (step(s, 5), flags("efer", EFER.LME)(s), flags("cr4", CR4.PAE)(s),
                setattr(s.special.cs, "l", 1))),
    ("host-lacks-paging", 13, "mov eax, 0x80000001; mov cr0, eax", "protected", 0,
     lambda s: step(s, 5)),
    ("invalid-opcode", 6, ".byte 6", "long", 0, lambda s: None),
    ("port-closed", 13, "out 0x80, al", "long", 3, closed_ports),
    ("avx-disabled", 6, "vaddps ymm0, ymm1, ymm2", "long", 0, lambda s: None),
    ("fpu-disabled", 7, "fld1", "long", 0, flags("cr0", CR0.EM)),
    ("fpu-disabled", 7, "movups xmm0, [0x2000]", "long", 0, flags("cr0", CR0.TS)),
    ("sse-disabled", 6, "movups xmm0, [0x2000]", "long", 0, flags("cr0", CR0.EM)),
    ("privileged", 13, "rdpmc", "long", 3, lambda s: None),
    ("null-selector", 13, "mov eax, [0x2000]", "protected", 0,
     lambda s: setattr(s.special.ds, "unusable", 1)),
    ("reserved-control-bit", 13, "xsetbv", "long", 0, flags("cr4", CR4.OSXSAVE)),  # of 0
    ("not-enabled", 13, "sysenter", "protected", 0, lambda s: None),
    ("invalid-opcode", 6, "vmcall", "long", 0, lambda s: None),
    ("unaligned", 13, "fxsave [0x5008]", "long", 0, lambda s: None),
    ("unaligned", 13, "xsave [0x5010]", "long", 0, flags("cr4", CR4.OSXSAVE)),
    ("unaligned", 13, "vmovaps ymm0, [0x5010]", "long", 0, flags("cr4", CR4.OSXSAVE)),
    ("page-not-present", 14, "vmovups ymm0, [rax]", "long", 0,
     lambda s: (flags("cr4", CR4.OSXSAVE)(s), setattr(s.registers, "rax", (1 << 40) + 1))),
    ("not-enabled", 6, "xsave [0x5010]", "long", 0, lambda s: None),
    ("invalid-opcode", 13, ".rept 15; .byte 0x66; .endr; nop", "long", 0, lambda s: None),
    ("invalid-opcode", 6, "mov rax, dr4", "long", 0, flags("cr4", CR4.DE)),
    ("invalid-opcode", 6, ".byte 0x44, 0x0f, 0x23, 0xc0", "long", 0, lambda s: None),  # DR8
    ("reserved-control-bit", 13, "mov cr3, rax", "long", 0,
     lambda s: setattr(s.registers, "rax", 1 << 63)),
    ("reserved-control-bit", 13, "mov cr4, rax", "long", 0,
     lambda s: (setattr(s.registers, "rax", s.special.cr4 | CR4.PCIDE),
                setattr(s.special, "cr3", s.special.cr3 | 0x18))),
    ("not-enabled", 6, "rdfsbase rax", "long", 0, lambda s: None),
    ("non-canonical", 13, "wrgsbase rax", "long", 0,
     lambda s: (setattr(s.registers, "rax", 1 << 62), flags("cr4", CR4.FSGSBASE)(s))),
    ("divide-error", 0, "aam 0", "protected", 0, lambda s: None),
    ("segment-rights", 13, "mov eax, cs:[0x2000]", "protected", 0,
     lambda s: setattr(s.special.cs, "type", 9)),
    ("segment-limit", 13, "jmp 0x2000", "protected", 0,
     lambda s: setattr(s.special.cs, "limit", 0x1FFF)),
    ("segment-limit", 13, "call eax", "protected", 0,
     lambda s: (setattr(s.special.cs, "limit", 0x1FFF), setattr(s.registers, "rax", 0x2000))),
    ("segment-limit", 13, "mov eax, 1", "protected", 0,
     lambda s: setattr(s.special.cs, "limit", 0x1003)),
    # Its code has 16 bits because it was asked to, which is no mistake.
    ("segment-limit", 13, "mov ebx, 0x12345; mov ax, [ebx]", "protected16", 0,
     lambda s: (setattr(s.registers, "rbx", 0x12345), setattr(s.registers, "rip", 0x1006))),
    ("page-not-present", 14, "xlatb", "long", 0,
     lambda s: setattr(s.registers, "rbx", 1 << 40)),
    ("page-not-present", 14, "bts [0x2000], rax", "long", 0,
     lambda s: setattr(s.registers, "rax", 1 << 43)),
    ("page-not-present", 14, "rep stosb", "long", 0,
     lambda s: (setattr(s.registers, "rdi", 1 << 40), setattr(s.registers, "rcx", 1))),
)  # fmt: skip


def step(scene: Scene, size: int) -> None:
    """Past a first instruction that loads EAX or RAX with a number."""
    code = scene.read(0x1000, 6) or b""
    scene.registers.rax = int.from_bytes(code[size - 4 : size], "little")
    scene.registers.rip += size


def own_gdt(scene: Scene, descriptor: int) -> Scene:
    """The scene with a GDT at 0x3000 whose selector 8 is that descriptor."""
    ram = bytearray(scene.read(0, 1 << 20) or b"")
    ram[0x3008:0x3010] = descriptor.to_bytes(8, "little")
    scene.special.gdt = DescriptorTable(0x3000, 0x17)
    return replace(scene, read=partial(read, ram))


@pytest.mark.parametrize(
    ("cause", "vector", "source", "mode", "ring", "change"), STATES,
    ids=[f"{one[0]}-{number}" for number, one in enumerate(STATES)],
)  # fmt: skip
def test_a_cause_from_the_state(cause, vector, source, mode, ring, change) -> None:
    code = assemble(source, mode, at=0x1000)
    scene = scene_at(code, mode, ring)
    if isinstance(change, str):
        scene = own_gdt(scene, int(change, 16))
    else:
        change(scene)
    found = explain_shutdown(scene)
    assert (found.cause, found.faults[0].vector) == (cause, vector), found


@pytest.mark.parametrize(
    ("number", "value", "words"),
    [(1, 1, "there is only XCR0"), (0, 2, "bit 0"), (0, 5, "without bit 1"), (0, 0x27, "AVX-512"),
     (0, 7, ""), (0, 0xE7, "")],
)  # fmt: skip
def test_what_xcr0_must_be(number: int, value: int, words: str) -> None:
    scene = scene_at(assemble("xsetbv", at=0x1000))
    scene.special.cr4 |= CR4.OSXSAVE
    scene.registers.rcx, scene.registers.rax = number, value
    found = explain_shutdown(scene)
    assert found.settled == bool(words)
    assert not words or words in found.faults[0].why


def test_rep_with_a_count_of_zero_touches_nothing() -> None:
    scene = scene_at(assemble("rep stosb"))
    scene.registers.rdi = 1 << 40
    assert explain_shutdown(scene).faults == ()


def test_an_exit_while_an_event_is_delivered() -> None:
    assert explain_gap(scene_at(b"\x0f\x0b"), "why", 3).cause == "delivery-exit"


@pytest.mark.parametrize(
    ("entry", "pse", "cause"),
    [(0x83, 0, "missing-pse"), (0x3, 0, "missing-ps"), (0x2, 0, "page-not-present"),
     (0x2, CR4.PSE, "page-not-present"), (0x20_0083, CR4.PSE, "reserved-bit")],
)  # fmt: skip
def test_32_bit_paging_from_the_state(entry: int, pse: int, cause: str) -> None:
    scene = scene_at(bytes(0x1000) + pack("<I", entry), "protected")
    scene.special.cr3, scene.special.cr4 = 0x2000, pse
    scene.special.cr0 |= CR0.PG
    assert explain_shutdown(scene).cause == cause


@pytest.mark.parametrize(
    ("cause", "source", "change"),
    [
        ("not-code", "ljmp 8:0x2000", lambda s: setattr(s.special.gdt, "base", 0x3000)),
        ("gdt-limit", "ljmp 0x88:0x2000", lambda s: None),
        ("emulator-lacks", "ljmp 0x18:0x2000", lambda s: None),
        ("emulator-lacks", "fld1", lambda s: None),
        # A frame of virtual-8086 mode: its CS, 0, is no null selector.
        ("emulator-lacks", "iretd", lambda s: setattr(s.registers, "rsp", 0x1010)),
    ],
)
def test_a_transfer_that_a_host_stops_at_has_a_reason_of_its_own(cause, source, change) -> None:
    """Emulators carry out far jumps, but for those that lead to no code segment."""
    code = assemble(source, "protected").ljust(16, b"\x90") + pack("<3I", 0x1000, 0, 0x20002)
    scene = scene_at(code, "protected")
    change(scene)
    found = explain_gap(scene, "why", 1)
    assert found.cause == cause, found
    if cause == "not-code":
        assert "the GDT at 0x3000, limit 0x57, has zeros there" in found.faults[0].why


def test_the_documentation_has_every_cause() -> None:
    text = (Path(__file__).parent.parent / "docs" / "autopsy.md").read_text()
    assert [name for name in CAUSES if f"| `{name}` |" not in text] == []


def test_an_exception_that_can_be_delivered_is_no_certain_cause() -> None:
    scene = scene_at(b"\x0f\x0b", ring=3)
    found = explain_shutdown(scene)
    assert not found.settled


def test_a_chain_of_two_page_faults_is_a_double_fault() -> None:
    scene = scene_at(b"")
    scene.special.idt = DescriptorTable(1 << 40, 0xFFF)
    first = Fault("page-not-present", "", 14, 0, 0)
    faults, shuts_down = chain(scene, first)
    assert shuts_down
    assert [fault.vector for fault in faults] == [14, 14, 14]
    assert not chain(scene_at(b"", ring=3), first).shuts_down


@pytest.mark.parametrize(
    ("source", "vectors"),
    [
        ("ud2", [6, 13, 13, 13]),  # benign, then contributory: no double fault yet
        ("xor ecx, ecx; div ecx", [0, 13, 13]),
        ("mov rax, [rax]", [14, 13, 13]),
    ],
)
def test_which_pairs_are_a_double_fault(source, vectors) -> None:
    scene = scene_at(assemble(source, at=0x1000))
    scene.registers.rax = 0x70_0000_0000
    if source.startswith("xor"):
        scene.registers.rip += 2
    assert [fault.vector for fault in explain_shutdown(scene).faults] == vectors


def test_a_large_page_without_ps_whose_page_could_be_a_table() -> None:
    scene = scene_at(b"\xf4")
    ram = bytearray(scene.read(0, 1 << 20) or b"")
    ram[0] = 1  # "present", where the walk takes the page at 0 for a table
    for at, entry in ((0x8000, 0x9003), (0x9000, 0xA003), (0xA000, 0x03)):
        ram[at : at + 2] = entry.to_bytes(2, "little")
    scene.special.cr3 = 0x8000
    assert explain_shutdown(replace(scene, read=partial(read, ram))).cause == "missing-ps"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: setattr(s.special, "cr0", int(CR0.PG)), "CR0.PG is set and CR0.PE is clear"),
        (lambda s: setattr(s.special, "cr4", 0), "CR4.PAE is clear"),
        (lambda s: setattr(s.special, "efer", int(EFER.LMA)), "EFER.LME differ"),
        (lambda s: setattr(s.special.cs, "db", 1), "CS.L and CS.D"),
        (lambda s: setattr(s.special.tr, "type", 9), "no busy TSS"),
        (lambda s: setattr(s.special.ss, "dpl", 3), "SS.DPL 3 differ"),
        (lambda s: setattr(s.special.ds, "limit", 0xFFFF_F000), "DS's limit"),
        (lambda s: setattr(s.registers, "rip", 1 << 47), "is not canonical"),
        (lambda s: setattr(s.registers, "rflags", 0), "RFLAGS bit 1"),
        (lambda s: setattr(s.registers, "rflags", 0x8002), "RFLAGS 0x8002 has reserved bits set"),
        (lambda s: setattr(s.special, "cr4", int(CR4.PCIDE)), "CR4.PAE"),
    ],
)
def test_a_refused_entry_names_the_rule(change, words) -> None:
    scene = scene_at(b"\xf4")
    scene.registers.rflags |= RFLAGS.IOPL
    assert broken_rules(scene) == []
    change(scene)
    assert any(words in rule for rule in broken_rules(scene))
    found = conduct.conduct(scene, "fail-entry", FailEntry(0x21, 0), None)
    assert found.cause == "bad-entry-state"
    assert words in str(found)


def test_an_autopsy_shows_itself() -> None:
    fault = Fault("page-not-present", "mov reads \x1b[31m<b>", 14, 2, 5)
    found = Autopsy("page-not-present", "shutdown", 0x1000, "mov", (fault, fault), ("out: 7",))
    text = str(found)
    assert "\x1b" not in text
    assert "#PF(0x2)" in text
    assert found.references in text
    assert "&lt;b&gt;" in found._repr_html_()
    assert found.__rich__() is not None
    assert json.dumps(found.as_dict())


def test_every_cause_says_what_to_do() -> None:
    for cause in CAUSES.values():
        assert all(cause)
        assert not cause.advice.endswith(".")


words64 = st.integers(0, (1 << 64) - 1) | st.integers(0, 0x2000) | st.just(1 << 47)


@given(
    st.binary(min_size=1, max_size=15),
    st.lists(words64, min_size=18, max_size=18),
    st.sampled_from(["real", "protected16", "protected", "long"]),
    st.sampled_from([0, 3]),
    st.booleans(),
)
def test_any_state_has_an_answer(code, values, mode, ring, at_code) -> None:
    scene = scene_at(code, mode, ring if mode in ("protected", "long") else 0)
    registers = Registers(**dict(zip(REGISTER_NAMES, values, strict=True)))
    if at_code:
        registers.rip = 0x1000
    scene = replace(scene, registers=registers)
    assert explain_shutdown(scene).cause in CAUSES
    assert explain_gap(scene, "why", 1).cause in CAUSES
    assert str(conduct.conduct(scene, "shutdown", Shutdown(), None))
