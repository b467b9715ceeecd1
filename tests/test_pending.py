"""Exits that KVM has not finished yet: state written, saved and restored at every one of them.

A guest makes each kind of access that ends in an exit, and writes down what it read. It is
moved to a fresh VM at its first, its second ... its last exit, and neither its memory nor what
its devices saw may differ from an undisturbed run. The devices' answers depend on how often
they were asked, so that an access carried out twice, or not at all, shows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvmpy import (
    KVM,
    VCPU,
    VM,
    Exit,
    Halt,
    Machine,
    MmioRead,
    MmioWrite,
    PendingExitError,
    PortIn,
    PortOut,
    modes,
)
from kvmpy.x86.registers import Registers

RAM = 1 << 20
CODE, RESULTS, TEXT = 0x1000, 0x8000, 0x9000
PORT = 0x50
MMIO = 0xD000_0000
SPLIT = MMIO + 0x1000 - 3  # 8 bytes from here are 3 in one page and 5 in the next

GUEST = bytes.fromhex(
    "e550 488906 4883c608"  # in eax, PORT; mov [rsi], rax; add rsi, 8
    "e450 488906 4883c608"  # in al, PORT: the rest of RAX stays
    "e750"  # out PORT, eax
    "488b03 488906 4883c608"  # mov rax, [rbx] (MMIO)
    "488903"  # mov [rbx], rax
    "488b4500 488906 4883c608"  # mov rax, [rbp] (MMIO, split)
    "48894500"  # mov [rbp], rax
    "488703 488906 4883c608"  # xchg [rbx], rax: a read and a write
    "48874500 488906 4883c608"  # xchg [rbp], rax: both of them split
    "f0480fc103 488906 4883c608"  # lock xadd [rbx], rax
    "480103"  # add [rbx], rax
    "ff33 8f06 4883c608"  # push [rbx]; pop [rsi]; add rsi, 8
    "4889f7 b905000000 ba50000000 f36c"  # mov rdi, rsi; mov ecx, 5; mov edx, PORT; rep insb
    "4889fe 4c89cf"  # mov rsi, rdi; mov rdi, r9
    "b903000000 f3a4"  # mov ecx, 3; rep movsb: RAM to MMIO
    "4c89c6 b906000000 f36e"  # mov rsi, r8; mov ecx, 6; rep outsb
    "41c700efbeadde"  # mov dword [r8], 0xdeadbeef: no access to a device, for once
    "e550"  # in eax, PORT
    "f4"
)
START = Registers(
    rip=CODE, rsp=0x7000, rsi=RESULTS, rbx=MMIO + 0x40, rbp=SPLIT, r8=TEXT, r9=MMIO + 0x80
)


@dataclass
class World:
    """All that is outside of the guest: it goes on when the guest moves."""

    trace: list[tuple[Any, ...]] = field(default_factory=list)

    def read(self, space: str, address: int, size: int) -> int:
        answer = 0x9E37_79B9_7F4A_7C15 * (len(self.trace) + 1) >> 5 & (1 << 8 * size) - 1
        self.trace.append((space, address, size, None, answer))
        return answer

    def write(self, space: str, address: int, size: int, value: int) -> None:
        self.trace.append((space, address, size, value, None))

    def serve(self, vcpu: VCPU, exit_: Exit) -> None:
        """Answer one exit at the vCPU."""
        match exit_:
            case PortIn(port=port, size=size, count=count):
                values = [self.read("port", port, size) for _ in range(count)]
                vcpu.reply(b"".join(value.to_bytes(size, "little") for value in values))
            case PortOut(port=port, size=size, values=values):
                for value in values:
                    self.write("port", port, size, value)
            case MmioRead(address=address, size=size):
                vcpu.reply(self.read("mmio", address, size).to_bytes(size, "little"))
            case MmioWrite(address=address, data=data, value=value):
                self.write("mmio", address, len(data), value)

    def attach(self, machine: Machine) -> None:
        """Be the devices of a machine."""

        @machine.on_port(PORT)
        def port(offset: int, size: int, value: int | None) -> int | None:
            if value is None:
                return self.read("port", PORT + offset, size)
            self.write("port", PORT + offset, size, value)
            return None

        @machine.on_mmio(MMIO, 0x2000)
        def mmio(offset: int, size: int, value: int | None) -> int | None:
            if value is None:
                return self.read("mmio", MMIO + offset, size)
            self.write("mmio", MMIO + offset, size, value)
            return None


def next_exit(vcpu: VCPU) -> Exit:
    return vcpu.run(timeout=10)


@contextmanager
def fresh_vm() -> Iterator[tuple[VM, VCPU]]:
    layout = modes.build("long", 0, RAM)
    with KVM() as kvm, kvm.create_vm() as vm:
        ram = vm.add_memory(0, RAM)
        ram.write(layout.base, layout.data)
        ram.write(CODE, GUEST)
        ram.write(TEXT, b"string")
        vcpu = vm.create_vcpu()
        vcpu.set_cpuid2(kvm.get_supported_cpuid())
        _, special = modes.entry_state(layout, CODE, vcpu.get_sregs())
        vcpu.set_sregs(special)
        vcpu.set_regs(START)
        yield vm, vcpu


def fresh_machine(world: World) -> Machine:
    machine = Machine(RAM, mode="long", devices=False)
    machine.load(GUEST, at=CODE)
    machine.memory.write(TEXT, b"string")
    machine.cpus[0].set_regs(START)
    world.attach(machine)
    return machine


def finish(vcpu: VCPU, world: World) -> None:
    """Finish the exit at hand at the vCPU; a split access gives its other parts first."""
    while True:
        try:
            vcpu.finish()
            return
        except PendingExitError:
            world.serve(vcpu, next_exit(vcpu))


def save(vcpu: VCPU) -> list[Any]:
    state = [vcpu.get_regs(), vcpu.get_sregs(), vcpu.get_xcrs(), vcpu.get_xsave()]
    return [*state, vcpu.get_debugregs(), vcpu.get_mp_state(), vcpu.get_vcpu_events()]


def restore(vcpu: VCPU, state: list[Any]) -> None:
    registers, special, xcrs, xsave, debug, mp_state, events = state
    vcpu.set_sregs(special)
    vcpu.set_xcrs(xcrs)
    vcpu.set_xsave(xsave)
    vcpu.set_regs(registers)
    vcpu.set_debugregs(debug)
    vcpu.set_mp_state(mp_state)
    vcpu.set_vcpu_events(events)


def outcome(memory: Any, vcpu: VCPU, world: World) -> tuple[Any, ...]:
    """What must not depend on how the guest got there."""
    return memory.read(RESULTS, 0x2000), vcpu.get_regs(), world.trace


@pytest.fixture(scope="module")
def undisturbed(kvm_host: None) -> tuple[int, tuple[Any, ...]]:
    """How many exits the guest makes before it halts, and what it comes to."""
    world, exits = World(), 0
    with fresh_vm() as (vm, vcpu):
        while (exit_ := next_exit(vcpu)) != Halt():
            world.serve(vcpu, exit_)
            exits += 1
        return exits, outcome(vm.memory, vcpu, world)


Undisturbed = tuple[int, tuple[Any, ...]]


def test_the_guest_makes_every_kind_of_access(undisturbed: Undisturbed) -> None:
    exits, (_, registers, trace) = undisturbed
    assert exits >= 20
    assert registers.rip == CODE + len(GUEST)
    shapes = {(space, size, value is None) for space, _, size, value, _ in trace}
    assert shapes >= {("port", 1, True), ("port", 4, True), ("port", 4, False), ("port", 1, False)}
    assert shapes >= {("mmio", 8, True), ("mmio", 8, False), ("mmio", 1, False)}
    assert shapes >= {("mmio", 3, True), ("mmio", 5, True), ("mmio", 3, False), ("mmio", 5, False)}
    text = bytes(
        value for space, _, size, value, _ in trace if (space, size) == ("port", 1) and value
    )
    assert text == b"string"


def test_a_machine_comes_to_the_same(undisturbed: Undisturbed) -> None:
    exits, wanted = undisturbed
    world = World()
    with fresh_machine(world) as machine:
        result = machine.run(timeout=10)
        assert result.outcome == "halt"
        assert sum(result.exits.values()) == exits + 1
        assert outcome(machine.memory, machine.cpus[0], world) == wanted


def test_the_teaching_path_comes_to_the_same(undisturbed: Undisturbed) -> None:
    exits, wanted = undisturbed
    world = World()
    with fresh_machine(world) as machine:
        assert len(list(machine.exits(timeout=10))) == exits + 1
        assert outcome(machine.memory, machine.cpus[0], world) == wanted


def test_finishing_every_exit_changes_nothing(undisturbed: Undisturbed) -> None:
    _, wanted = undisturbed
    world = World()
    with fresh_vm() as (vm, vcpu):
        while (exit_ := next_exit(vcpu)) != Halt():
            world.serve(vcpu, exit_)
            finish(vcpu, world)
            vcpu.finish()  # again: nothing
        assert outcome(vm.memory, vcpu, world) == wanted


def test_writing_back_the_state_at_every_exit_changes_nothing(undisturbed: Undisturbed) -> None:
    _, wanted = undisturbed
    world = World()
    with fresh_vm() as (vm, vcpu):
        while (exit_ := next_exit(vcpu)) != Halt():
            world.serve(vcpu, exit_)
            finish(vcpu, world)
            restore(vcpu, save(vcpu))
        assert outcome(vm.memory, vcpu, world) == wanted


def test_a_guest_moves_at_any_exit(undisturbed: Undisturbed) -> None:
    exits, wanted = undisturbed
    for before in range(1, exits + 1):
        world = World()
        with fresh_vm() as (old, source):
            for _ in range(before):
                exit_ = next_exit(source)
                assert exit_ != Halt()
                world.serve(source, exit_)
            finish(source, world)
            memory, state = old.memory.read(0, RAM), save(source)
        with fresh_vm() as (new, target):
            new.memory.write(0, memory)
            restore(target, state)
            while (exit_ := next_exit(target)) != Halt():
                world.serve(target, exit_)
            assert outcome(new.memory, target, world) == wanted, f"moved after exit {before}"


def test_a_machines_guest_moves_at_any_exit(undisturbed: Undisturbed) -> None:
    exits, wanted = undisturbed
    for before in range(1, exits + 1):
        world = World()
        with fresh_machine(world) as source:
            assert source.run(timeout=10, max_exits=before).outcome == "max-exits"
            source.cpus[0].finish()  # the devices serve what that brings up
            memory, state = source.memory.read(0, RAM), save(source.cpus[0])
        with fresh_machine(world) as target:
            target.memory.write(0, memory)
            restore(target.cpus[0], state)
            assert target.run(timeout=10).outcome == "halt"
            got = outcome(target.memory, target.cpus[0], world)
            assert got == wanted, f"moved after exit {before}"


def test_a_machines_guest_moves_at_any_exit_of_the_teaching_path(
    undisturbed: Undisturbed,
) -> None:
    exits, wanted = undisturbed
    for before in range(1, exits + 1):
        world = World()
        with fresh_machine(world) as source:
            assert len(list(source.exits(timeout=10, max_exits=before))) == before
            source.cpus[0].finish()
            memory, state = source.memory.read(0, RAM), save(source.cpus[0])
        with fresh_machine(world) as target:
            target.memory.write(0, memory)
            restore(target.cpus[0], state)
            assert target.run(timeout=10).outcome == "halt"
            assert outcome(target.memory, target.cpus[0], world) == wanted


def test_both_paths_can_take_turns(undisturbed: Undisturbed) -> None:
    """Stop at an exit, write the registers back, go on on the other path, and again."""
    _, wanted = undisturbed
    world = World()
    with fresh_machine(world) as machine:
        cpu = machine.cpus[0]
        for turn in range(1000):
            if turn % 2:
                ended = machine.run(timeout=10, max_exits=1).outcome == "halt"
            else:
                ended = Halt() in machine.exits(timeout=10, max_exits=1)
            if ended:
                break
            cpu.finish()
            cpu.set_regs(cpu.get_regs())
        assert outcome(machine.memory, cpu, world) == wanted


# A new RIP is not lost ----------------------------------------------------------------------

ELSEWHERE = 0x4000
NEW = Registers(rip=ELSEWHERE, rsp=0x7000, rax=0x1234_5678_9ABC_DEF0, rbx=1, rcx=2, rsi=3, rdi=4)


def write_regs(cpu: VCPU, world: World) -> None:
    finish(cpu, world)
    cpu.set_regs(NEW)


def write_regs_by_ioctl(cpu: VCPU, world: World) -> None:
    finish(cpu, world)
    cpu.can_sync = 0
    cpu.set_regs(NEW)


def write_regs_twice(cpu: VCPU, world: World) -> None:
    finish(cpu, world)
    cpu.set_regs(START)
    cpu.set_sregs(cpu.get_sregs())
    cpu.set_regs(NEW)


WRITERS = pytest.mark.parametrize("write", [write_regs, write_regs_by_ioctl, write_regs_twice])
Writer = Callable[[VCPU, World], None]


@WRITERS
def test_new_registers_take_effect_at_every_exit(undisturbed: Undisturbed, write: Writer) -> None:
    exits, _ = undisturbed
    for before in range(1, exits + 1):
        world = World()
        with fresh_vm() as (vm, vcpu):
            vm.memory.write(ELSEWHERE, b"\xf4")
            for _ in range(before):
                world.serve(vcpu, next_exit(vcpu))
            write(vcpu, world)
            seen = len(world.trace)
            assert next_exit(vcpu) == Halt(), f"after exit {before}"
            assert len(world.trace) == seen
            registers = vcpu.get_regs()
            assert registers.rip == ELSEWHERE + 1
            assert registers.as_dict() | {"rip": ELSEWHERE} == NEW.as_dict()


@WRITERS
def test_new_registers_take_effect_between_a_machines_runs(
    undisturbed: Undisturbed, write: Writer
) -> None:
    exits, _ = undisturbed
    for before in range(1, exits + 1):
        world = World()
        with fresh_machine(world) as machine:
            machine.memory.write(ELSEWHERE, b"\xf4")
            machine.run(timeout=10, max_exits=before)
            write(machine.cpus[0], world)
            result = machine.run(timeout=10)
            assert result.exits == {"halt": 1}, f"after exit {before}"
            assert result.registers.as_dict() | {"rip": ELSEWHERE} == NEW.as_dict()


def test_new_registers_written_by_a_device_take_effect(undisturbed: Undisturbed) -> None:
    """In the middle of a run, also where the access that it serves is one part of several."""
    trace = undisturbed[1][2]
    for number in range(len(trace)):

        class Jumping(World):
            def jump(self, turn: int = number) -> None:
                if len(self.trace) == turn + 1:
                    machine.cpus[0].set_regs(NEW)

            def read(self, space: str, address: int, size: int) -> int:
                answer = super().read(space, address, size)
                self.jump()
                return answer

            def write(self, space: str, address: int, size: int, value: int) -> None:
                super().write(space, address, size, value)
                self.jump()

        world = Jumping()
        with fresh_machine(world) as machine:
            machine.memory.write(ELSEWHERE, b"\xf4")
            result = machine.run(timeout=10)
            assert result.outcome == "halt"
            assert result.registers.as_dict() | {"rip": ELSEWHERE} == NEW.as_dict(), number


def test_a_split_access_is_not_dropped_by_those_who_ignore_the_error(kvm_host: None) -> None:
    code = bytes.fromhex("48894500 f4")  # mov [rbp], rax (split); hlt
    with fresh_vm() as (vm, vcpu):
        vm.memory.write(CODE, code)
        vcpu.set_regs(Registers(rip=CODE, rsp=0x7000, rbp=SPLIT, rax=0x8877_6655_4433_2211))
        assert next_exit(vcpu) == MmioWrite(SPLIT, b"\x11\x22\x33")
        for _ in range(3):
            with pytest.raises(PendingExitError, match="split"):
                vcpu.set_regs(START)
        assert next_exit(vcpu) == MmioWrite(MMIO + 0x1000, b"\x44\x55\x66\x77\x88")
        vcpu.finish()
        assert next_exit(vcpu) == Halt()


def test_the_rest_of_an_access_does_not_outlive_a_limit_of_exits(kvm_host: None) -> None:
    """Finishing may take an exit more than the run had left; the limit stays reached."""
    code = bytes.fromhex("48894500 e750 ebfc")  # mov [rbp], rax (split); again: out PORT, eax
    world = World()
    with fresh_machine(world) as machine:
        machine.memory.write(CODE, code)
        cpu = machine.cpus[0]
        cpu.set_regs(Registers(rip=CODE, rsp=0x7000, rbp=SPLIT))
        world.write = lambda *_: cpu.get_fpu()  # type: ignore[assignment] # which finishes
        assert machine.run(timeout=10, max_exits=1).outcome == "max-exits"
