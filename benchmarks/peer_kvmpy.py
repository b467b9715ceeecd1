"""kvmpy: served by its C loop, by a Python function, and through the classes below Machine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from benchmarks.peer import PeerError
from benchmarks.peer_guests import ADDRESS, MEMORY, MMIO, PORT, State
from kvmpy import KVM, Machine, PortOut
from kvmpy.devices.native import Counter
from kvmpy.x86.registers import Registers
from kvmpy.x86.state import SpecialRegisters

__all__ = ["descriptor_lives", "lives", "runs", "runs_in_c"]

DEADLINE = 60.0


def _run(machine: Machine, limit: int | None) -> None:
    result = machine.run(DEADLINE, limit)
    if result.outcome not in ("halt", "max-exits"):
        raise PeerError(f"kvmpy: the guest ended otherwise: {result}")


def _attach(machine: Machine) -> Callable[[], int]:
    """Attach a Python function that adds up what is written; the sum since the last call."""
    total = 0

    def device(offset: int, size: int, value: int | None) -> None:
        nonlocal total
        total += value or 0

    def taken() -> int:
        nonlocal total
        seen, total = total, 0
        return seen

    machine.on_port(PORT)(device)
    machine.on_mmio(MMIO)(device)
    return taken


@contextmanager
def runs(image: bytes, ring: int = 0, limit: int | None = None) -> Iterator[Callable[[], int]]:
    """A machine that stays: each call runs it until HLT, or for `limit` exits."""
    with Machine(MEMORY, ring=ring) as machine:
        taken = _attach(machine)
        machine.load(image)

        def run() -> int:
            _run(machine, limit)
            return taken()

        yield run


@contextmanager
def runs_in_c(image: bytes) -> Iterator[Callable[[], int]]:
    """The same with a device in the C loop, which counts: the proof is the number of writes."""
    counters = Counter(), Counter()
    with Machine(MEMORY) as machine:
        machine.attach_port(PORT, 1, counters[0])
        machine.attach_mmio(MMIO, 4096, counters[1])
        machine.load(image)

        def run() -> int:
            before = counters[0].count + counters[1].count
            _run(machine, None)
            return counters[0].count + counters[1].count - before

        yield run


@contextmanager
def lives(image: bytes) -> Iterator[Callable[[], int]]:
    """Each call makes a Machine, runs it to its first write, and closes it."""

    def live() -> int:
        with Machine(MEMORY) as machine:
            taken = _attach(machine)
            machine.load(image)
            _run(machine, 1)
            return taken()

    yield live


@contextmanager
def descriptor_lives(image: bytes) -> Iterator[Callable[[], int]]:
    """The same with KVM, VM and VCPU, and what their registers are to be known beforehand."""
    state = State.of(image, 0)
    cpuid = state.cpuid[8:]

    def live() -> int:
        with KVM() as kvm, kvm.create_vm() as vm:
            ram = vm.add_memory(0, MEMORY)
            ram.write(state.area_address, state.area)
            ram.write(ADDRESS, state.image)
            cpu = vm.create_vcpu()
            cpu.set_cpuid2(cpuid)
            special = SpecialRegisters.unpack(state.sregs)
            special.apic_base = cpu.get_sregs().apic_base
            cpu.set_sregs(special)
            cpu.set_regs(Registers.unpack(state.regs))
            exit_ = cpu.run()
            if not isinstance(exit_, PortOut):
                raise PeerError(f"kvmpy: the first exit is {exit_}, not a port write")
            return int.from_bytes(exit_.data, "little")

    yield live
