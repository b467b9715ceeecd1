"""Telling from where RIP went that a step has taken an exception or interrupt."""

from kvmpy.views.code import LONGEST
from kvmpy.views.gates import gate_at
from kvmpy.views.pages import Read
from kvmpy.x86.exceptions import EXCEPTIONS
from kvmpy.x86.registers import Registers
from kvmpy.x86.state import SpecialRegisters

__all__ = ["taken"]

VECTORS = 256


def taken(read: Read, before: Registers, after: Registers, special: SpecialRegisters) -> str:
    """A sentence if RIP is at, or one instruction into, a handler; empty otherwise."""
    if before.rsp == after.rsp:  # the processor has pushed nothing
        return ""
    for vector in range(VECTORS):
        gate = gate_at(read, special, vector)
        distance = after.rip - gate.offset
        at_handler = gate.present and gate.selector & ~3 == special.cs.selector & ~3
        if at_handler and 0 <= distance <= LONGEST:
            name, words = EXCEPTIONS.get(vector, (f"vector {vector}", "interrupt"))
            text = f"{name} ({words}) was taken: its handler is at {gate.offset:#x}"
            return text + (", and its first instruction is in this step" if distance else "")
    return ""
