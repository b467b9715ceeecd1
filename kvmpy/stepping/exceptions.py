"""Telling from where RIP went that a step has taken an exception or interrupt."""

from collections.abc import Iterator
from typing import Final

from kvmpy.views.code import LONGEST
from kvmpy.views.gates import gate_at
from kvmpy.views.linear import read_linear
from kvmpy.views.pages import Read
from kvmpy.x86.exceptions import EXCEPTIONS
from kvmpy.x86.flags import CR0, EFER
from kvmpy.x86.registers import Registers
from kvmpy.x86.state import SpecialRegisters

__all__ = ["returns_to_ring3", "taken"]

_FRAME: Final = {"iret": 2, "iretd": 4, "iretq": 8}


def taken(
    read: Read, mnemonic: str, before: Registers, after: Registers, special: SpecialRegisters
) -> str:
    """A sentence if RIP is at, or one instruction into, a handler; empty otherwise.

    `special` are the registers after the step.
    """
    if before.rsp == after.rsp or mnemonic == "call":  # pushed nothing, or no more than RIP
        return ""
    found = []
    for vector in _near(read, special, after.rip):
        gate = gate_at(read, special, vector)
        if gate.present and gate.selector & ~3 == special.cs.selector & ~3:
            found.append(gate)
    if not found:
        return ""
    first = max(found, key=lambda gate: gate.offset)
    same = [gate for gate in found if gate.offset == first.offset]
    if len(same) > 1:
        what = "an exception or interrupt"
    else:
        what = "{} ({})".format(
            *EXCEPTIONS.get(first.vector, (f"vector {first.vector}", "interrupt"))
        )
    text = f"{what} was taken: its handler is at {first.offset:#x}"
    inside = after.rip != first.offset
    return text + (", and its first instruction is in this step" if inside else "")


def _near(read: Read, special: SpecialRegisters, rip: int) -> Iterator[int]:
    """The vectors whose handlers begin at `rip`, or at most an instruction before it."""
    idt, protected = special.idt, special.cr0 & CR0.PE
    size = 16 if special.efer & EFER.LMA else 8 if protected else 4
    data = read_linear(read, special, idt.base, min(256 * size, idt.limit + 1))
    for start in range(0, len(data) - size + 1, size):
        gate = data[start : start + size]
        offset = gate[0:2] + gate[6:8] + gate[8:12] if protected else gate[0:2]
        if 0 <= rip - int.from_bytes(offset, "little") <= LONGEST:
            yield start // size


def returns_to_ring3(
    read: Read, mnemonic: str, before: Registers, special: SpecialRegisters
) -> bool:
    """Whether the instruction at hand is to go on in ring 3."""
    if mnemonic.startswith(("sysret", "sysexit")):
        return True
    size = _FRAME.get(mnemonic)
    if size is None:
        return False
    stack = before.rsp if special.cs.l else special.ss.base + before.rsp
    pushed = read_linear(read, special, stack, 2 * size)
    return len(pushed) == 2 * size and pushed[size] & 3 == 3
