"""Steps of known guests: what each instruction did, and the mode switches on the way."""

import pytest

from kvmpy import ConfigError, Machine, UnsupportedError, assemble
from kvmpy.exits import Halt, MmioRead, MmioWrite, PortIn, PortOut, Shutdown
from kvmpy.probe import Finding, probe
from kvmpy.stepping import stepper
from kvmpy.x86.flags import RFLAGS


@pytest.fixture(autouse=True)
def stepping(kvm_host):
    found = probe("single-step")
    if found.answer != "yes":
        pytest.skip(found.detail)


def machine_of(code, mode="long", ring=0, **options):
    machine = Machine("2M", mode, ring, **options)
    machine.load(assemble(code, mode=mode, at=0x4000))
    return machine


def steps_of(code, mode="long", ring=0, count=40, **options):
    with machine_of(code, mode, ring, **options) as machine:
        return list(machine.trace_instructions(count=count, timeout=20))


def texts(steps):
    return [one.text for one in steps]


def test_what_instructions_changed():
    steps = steps_of("mov eax, 5; sub eax, 5; mov rbx, rax; hlt")
    assert texts(steps) == ["mov eax, 5", "sub eax, 5", "mov rbx, rax", "hlt"]
    assert steps[0].changes == (("rax", 0, 5),)
    assert set(steps[1].changes) == {("rax", 5, 0), ("PF", 0, 1), ("ZF", 0, 1)}
    assert steps[2].changes == ()
    assert [one.address for one in steps] == [0x4000, 0x4005, 0x4008, 0x400B]
    assert steps[0].data == b"\xb8\x05\0\0\0" and steps[0].mode.bits == 64


def test_halt_is_an_exit_also_where_it_is_stepped_over():
    last = steps_of("nop; hlt; nop")[-1]
    assert (last.exits, last.outcome) == ((Halt(),), "halt")


def test_halt_with_kvms_interrupt_controller_waits_or_says_that_it_would():
    with machine_of("hlt; nop; nop", irqchip="split") as machine:
        (one,) = machine.trace_instructions(count=1, timeout=1)
    assert one.text == "hlt" and (one.outcome == "timeout" or "would wait" in one.note)


def test_the_way_from_real_to_long_mode():
    with Machine.from_image("boot_sector") as machine:
        steps = list(machine.trace_instructions(timeout=30))
        assert machine.console == b"Real mode\nProtected mode\nLong mode\n"
        at = {name: machine.symbols[name] for name in ("real", "protected", "long", "done")}
    found = [(t.name, t.value, one.text) for one in steps for t in one.transitions]
    assert found == [
        ("CR0.PE", 1, "mov cr0, eax"),
        ("CS.D", 1, "ljmp 8:0x7c2c"),
        ("EFER.LME", 1, "wrmsr"),
        ("CR0.PG", 1, "mov cr0, eax"),
        ("EFER.LMA", 1, "mov cr0, eax"),
        ("CS.L", 1, "ljmp 0x18:0x7ca2"),
    ]
    modes = {one.address: one.mode.name for one in steps}
    assert modes[at["real"]] == "real mode"
    assert modes[at["protected"]] == "protected mode, 32-bit code"
    assert modes[at["long"]] == "64-bit mode"
    after_pg = next(n for n, one in enumerate(steps) if ("CR0.PG", 1) in
                    [(t.name, t.value) for t in one.transitions])  # fmt: skip
    assert steps[after_pg + 1].mode.name == "compatibility mode, 32-bit code"
    assert all(t.source.startswith("SDM Vol.3") and len(t.meaning) > 20
               for one in steps for t in one.transitions)  # fmt: skip
    assert steps[-1].outcome == "halt" and steps[-1].address == at["done"]
    assert any(change.name == "gdtr.base" for one in steps for change in one.changes)
    printed = b"".join(e.data for one in steps for e in one.exits if isinstance(e, PortOut))
    assert printed == b"Real mode\nProtected mode\nLong mode\n"


def test_back_to_real_mode():
    code = "mov eax, cr0; and al, 0xfe; mov cr0, eax; hlt"
    steps = steps_of(code, "protected16")
    (one,) = [t for step in steps for t in step.transitions if t.name == "CR0.PE"]
    assert one.value == 0 and "real mode" in one.meaning


def test_devices_are_served_within_the_step():
    with machine_of(
        "mov al, 65; out 0xe9, al; in al, 0x10; mov ecx, dword ptr [rbx]; "
        "mov dword ptr [rbx], ecx; nop; hlt"
    ) as machine:
        registers = machine.cpus[0].get_regs()
        registers.rbx = 0x300000
        machine.cpus[0].set_regs(registers)
        seen = []
        machine.on_port(0x10)(lambda offset, size, value: 0x77)

        @machine.on_mmio(0x300000)
        def device(offset, size, value):
            seen.append((offset, size, value))
            return 0x1234

        steps = list(machine.trace_instructions(timeout=20))
        assert machine.console == b"A"
    assert [one.text.split()[0] for one in steps] == [
        "mov", "out", "in", "mov", "mov", "nop", "hlt"
    ]  # fmt: skip
    assert steps[1].exits == (PortOut(0xE9, 1, b"A"),)
    assert steps[2].exits == (PortIn(0x10, 1),) and ("rax", 0x41, 0x77) in steps[2].changes
    assert steps[3].exits == (MmioRead(0x300000, 4),) and ("rcx", 0, 0x1234) in steps[3].changes
    assert steps[4].exits == (MmioWrite(0x300000, b"\x34\x12\0\0"),)
    assert seen == [(0, 4, None), (0, 4, 0x1234)]


def test_memory_operands_have_their_values():
    steps = steps_of(
        "mov qword ptr [0x5000], 7; add qword ptr [0x5000], 1; mov rax, [0x5000]; push 9; pop rdx;"
        "lea rcx, [rax + 0x40]; call next; next: ret 0"
        .replace("mov rax, [0x5000]", "mov rax, qword ptr [0x5000]"),
        count=8,
    )  # fmt: skip

    def number(data):
        return None if data is None else int.from_bytes(data, "little")

    seen = [[(m.access, number(m.before), number(m.after)) for m in one.memory] for one in steps]
    assert seen[0] == [("write", 0, 7)]
    assert seen[1] == [("read-write", 7, 8)]
    assert seen[2] == [("read", 8, 8)]
    assert seen[3] == [("write", None, 9)]
    assert seen[4] == [("read", 9, 9)]
    assert seen[5] == []
    assert seen[6] == [("write", None, steps[7].address)]
    assert steps[0].memory[0].address == 0x5000


def test_operands_in_segments():
    steps = steps_of("mov ax, 0x500; mov ds, ax; mov byte ptr [0x12], 5; mov bx, 0x10; "
                     "mov cl, byte ptr [bx + 2]; hlt", "real")  # fmt: skip
    (write,) = steps[2].memory
    assert (write.address, write.after) == (0x5012, b"\x05")
    assert steps[4].memory[0].address == 0x5012 and ("ecx", 0, 5) in steps[4].changes


def test_an_exception_is_named():
    with Machine.from_image("exceptions") as machine:
        steps = list(machine.trace_instructions(count=12, timeout=20))
    (one,) = [one for one in steps if one.note]
    assert one.text == "div ecx" and one.note.startswith("#DE (divide error) was taken")


def test_a_triple_fault_ends_it():
    last = steps_of("ud2")[-1]
    assert last.outcome == "shutdown" and last.exits == (Shutdown(),)


def test_a_device_ends_it():
    last = steps_of("mov al, 3; out 0xf4, al; nop")[-1]
    assert (last.outcome, last.value, last.text) == ("debug-exit", 3, "out 0xf4, al")
    last = steps_of("out 0x55, al; nop", strict=True)[-1]
    assert last.outcome == "unclaimed" and "0x55" in last.detail


@pytest.mark.parametrize("first", ["mov ss, ax", "swapgs"])
def test_no_instruction_goes_unseen(first):
    steps = steps_of(f"mov eax, 0x10; {first}; mov ecx, 7; nop; jmp x; nop; x: hlt")
    seen = "; ".join(f"{one.text}; {one.note}" for one in steps)
    assert seen.count("mov ecx, 7") == 1
    late = [one for one in steps if one.note]
    assert all(one.note == "the host held the trap: this step also took mov ecx, 7" for one in late)
    assert len(steps) + len(late) == 6


def test_until_an_address_or_a_symbol():
    with machine_of("nop; nop; loop: inc eax; jmp loop") as machine:
        assert len(list(machine.trace_instructions(until="loop", timeout=20))) == 2
        assert machine.cpus[0].get_regs().rip == 0x4002
        assert len(list(machine.trace_instructions(until=0x4002, timeout=20))) == 2
        assert len(list(machine.trace_instructions(count=0, timeout=20))) == 0
        with pytest.raises(ConfigError, match="no symbol 'lop'"):
            machine.trace_instructions(until="lop")


def test_string_instructions_and_loops():
    steps = steps_of("mov ecx, 3; l: dec ecx; jnz l; hlt")
    assert len(steps) == 1 + 6 + 1
    steps = steps_of("in al, 0x60; jmp 0x4002", count=4)
    assert texts(steps) == ["in al, 0x60", *["jmp 0x4002"] * 3]


def test_it_can_be_run_on_after_steps():
    with machine_of("mov al, 65; out 0xe9, al; mov al, 66; out 0xe9, al; hlt") as machine:
        cpu = machine.cpus[0]
        before = cpu.sync_regs
        steps = machine.trace_instructions(timeout=20)
        assert [next(steps).text for _ in range(2)] == ["mov al, 0x41", "out 0xe9, al"]
        steps.close()
        assert cpu.sync_regs == before
        assert machine.run(timeout=5).outcome == "halt" and machine.console == b"AB"
        assert not cpu.get_regs().rflags & RFLAGS.TF


def test_a_generator_may_outlive_its_machine():
    machine = machine_of("nop; nop; hlt")
    steps = machine.trace_instructions(timeout=20)
    next(steps)
    machine.close()
    steps.close()


def test_a_deadline():
    with machine_of("jmp 0x4000") as machine:
        steps = list(machine.trace_instructions(timeout=0.05))
    assert steps[-1].outcome == "timeout"


def test_ring_3_is_stepped_or_says_why_not():
    code = "mov eax, 5; mov ebx, 6; out 0x10, al; mov al, 1; out 0xf4, al; nop"
    steps = steps_of(code, ring=3)
    found = probe("single-step-ring3")
    if found.answer == "yes":
        assert [one.text.split()[0] for one in steps] == ["mov", "mov", "out", "mov", "out"]
    else:
        assert [one.native for one in steps] == [True, True]
        assert found.detail in steps[0].note and "cannot be stepped" in steps[0].note
    assert (steps[-1].outcome, steps[-1].value) == ("debug-exit", 1)
    outs = [e.port for one in steps for e in one.exits if isinstance(e, PortOut)]
    assert outs == [0x10, 0xF4]


def test_a_ring_3_exception_is_reported():
    last = steps_of("mov eax, 5; ud2", ring=3)[-1]
    assert last.outcome == "exception" and "#UD" in last.detail


def test_a_host_that_cannot_step_says_so(monkeypatch):
    monkeypatch.setattr(stepper, "probe", lambda name: Finding(name, "no", "stepping: no trap"))
    with machine_of("nop") as machine, pytest.raises(UnsupportedError, match="stepping: no trap"):
        machine.trace_instructions()


def test_posted_consoles_hide_exits():
    try:
        machine = machine_of("nop", posted_console=True)
    except UnsupportedError as error:
        pytest.skip(str(error))
    with machine, pytest.raises(ConfigError, match="posted_console"):
        machine.trace_instructions()
