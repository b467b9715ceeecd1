"""Code of the grader's that a student's guest is asked to run: another one each time."""

from collections.abc import Sequence
from random import Random
from typing import Final

from kvmpy.asm import assemble
from kvmpy.labs.model import Check, Finding, Run
from kvmpy.machine import Machine

__all__ = ["KEPT", "keeps_registers", "place", "random_registers", "registers_stored", "stored"]

KEPT: Final = ("rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{n}" for n in range(8, 16)))
"""The registers that are compared, and RAX where it is no answer; RSP never is."""


def place(machine: Machine, address: int, source: str) -> None:
    """Put a piece of 64-bit code at a guest-physical address, which is also its linear one."""
    machine.memory.write(address, assemble(source, at=address))


def random_registers(random: Random, *more: str) -> dict[str, int]:
    """A number for each of `KEPT`, and of `more`."""
    return {name: random.getrandbits(64) for name in (*KEPT, *more)}


def registers_stored(values: dict[str, int], between: str, address: int) -> str:
    """Code that loads the registers, does what `between` says, and stores them at `address`."""
    loads = [f"mov {name}, {value:#x}" for name, value in values.items()]
    stores = [f"mov [{address + 8 * at:#x}], {name}" for at, name in enumerate(values)]
    return "\n".join([*loads, between, *stores])


def stored(run: Run, address: int, count: int) -> Sequence[int]:
    """That many 64-bit numbers from guest-physical memory."""
    return [run.machine.memory.read_u64(address + 8 * at) for at in range(count)]


def keeps_registers(address: int, who: str, look: str) -> Check:
    """What `registers_stored` stored is what it had loaded: `expect["registers"]` of the case."""

    def check(run: Run) -> Finding:
        wanted: dict[str, int] = run.case.expect["registers"]
        found = stored(run, address, len(wanted))
        changed = [name for (name, value), now in zip(wanted.items(), found, strict=True)
                   if value != now]  # fmt: skip
        if not changed:
            return Finding(True, f"{who} keeps the registers of the code that it interrupts")
        if not any(found):
            text = "the code that the grader put there did not come to its end"
            return Finding(False, text, look)
        names = ", ".join(changed)
        return Finding(False, f"{who} changes registers of the code that it interrupts: {names}",
                       look)  # fmt: skip

    return check
