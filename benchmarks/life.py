"""From nothing to the first exit and back: a whole life of a small machine."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

from benchmarks.floor import Guest
from benchmarks.stats import Prepared, Row, compare, interleave
from kvmpy import KVM, Machine, modes
from kvmpy.vcpuregs import SYNC_REGS

__all__ = ["by_descriptors", "life_turn", "measure_life"]

MEMORY = 4 << 20
GUEST = b"\xf4"
"""hlt"""


def by_machine() -> None:
    """The life of a Machine with its standard devices."""
    with Machine(MEMORY) as machine:
        machine.load(GUEST)
        machine.run()


def by_descriptors(cpuid: bytes) -> None:
    """The same with the classes below Machine, and no device."""
    layout = modes.build("long", 0, MEMORY)
    entry = modes.DEFAULT_LOAD["long"]
    with KVM() as kvm, kvm.create_vm() as vm:
        ram = vm.add_memory(0, MEMORY)
        ram.write(layout.base, layout.data)
        ram.write(entry, GUEST)
        cpu = vm.create_vcpu()
        cpu.set_cpuid2(cpuid)
        registers, special = modes.entry_state(layout, entry, cpu.get_sregs())
        cpu.set_sregs(special)
        cpu.set_regs(registers)
        cpu.run()


def life_turn(live: Callable[[], None]) -> Prepared:
    """A turn that gives the microseconds of one life."""

    def timed() -> float:
        start = time.perf_counter_ns()
        live()
        return (time.perf_counter_ns() - start) / 1000

    return nullcontext(timed)


def measure_life(rounds: int, turns: int) -> list[Row]:
    """Machine, and the classes below it, over the same calls in C."""
    guest = Guest(GUEST, MEMORY, valid=SYNC_REGS)
    with KVM() as kvm:
        cpuid = b"".join(entry.pack() for entry in kvm.get_supported_cpuid())
    kinds: dict[str, Callable[[], None]] = {
        "floor": guest.life,
        "machine": by_machine,
        "descriptors": lambda: by_descriptors(cpuid),
    }
    subjects = {name: partial(life_turn, live) for name, live in kinds.items()}
    interleave(1, 2, subjects)  # what is made once per process is made now
    samples = interleave(rounds, turns, subjects)
    floor = samples["floor"]
    return [
        compare("life of KVM, VM and VCPU", "ratio", "us", 1.10, samples["descriptors"], floor),
        compare("life of a Machine, 7 devices", "ratio", "us", None, samples["machine"], floor),
    ]
