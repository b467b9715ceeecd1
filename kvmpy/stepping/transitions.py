"""Switches between the processor's modes, in words.

Sources: SDM Vol.3 10.9 (real and protected mode), 10.8.5 (long mode), 4.1.2 (paging), 5.2.1 and
3.4.5 (CS.L and CS.D), 5.5 (privilege levels).
"""

from typing import NamedTuple

from kvmpy.views.pages import cpl_of
from kvmpy.x86.flags import CR0, EFER
from kvmpy.x86.state import SpecialRegisters

__all__ = ["Transition", "transitions"]


class Transition(NamedTuple):
    """A switch: what was changed ("CR0.PE"), to what, what it means, and where that is defined."""

    name: str
    value: int
    meaning: str
    source: str

    def __str__(self) -> str:
        return f"{self.name} = {self.value}: {self.meaning} ({self.source})"


def transitions(before: SpecialRegisters, after: SpecialRegisters) -> tuple[Transition, ...]:
    """What an instruction has switched, in the order in which it takes effect."""
    found = []
    for register, bit, on, off, source in _SWITCHES:
        was, now = getattr(before, register) & bit, getattr(after, register) & bit
        if bool(was) is not bool(now):
            name = f"{register.upper()}.{bit.name}"
            found.append(Transition(name, int(bool(now)), on if now else off, source))
    found += _code_segment(before, after)
    ring, was = cpl_of(after), cpl_of(before)
    if ring != was:
        meaning = f"from ring {was} to ring {ring}"
        found.append(Transition("CPL", ring, meaning, "SDM Vol.3 5.5"))
    return tuple(found)


_SWITCHES = (
    (
        "cr0",
        CR0.PE,
        "protected mode: from now on a selector is looked up in the GDT when it is loaded; until "
        "a far jump loads CS, code goes on with the base and size that it had in real mode",
        "real mode: a selector times 16 is a segment's base when it is loaded, and the limits "
        "stay as they were",
        "SDM Vol.3 10.9",
    ),
    (
        "efer",
        EFER.LME,
        "long mode is enabled; it becomes active when paging is switched on",
        "long mode is disabled",
        "SDM Vol.3 10.8.5",
    ),
    (
        "cr0",
        CR0.PG,
        "paging: every linear address goes through the page tables at CR3 from now on",
        "paging is off: linear addresses are physical ones",
        "SDM Vol.3 4.1.2",
    ),
    (
        "efer",
        EFER.LMA,
        "long mode is active, in compatibility mode until a code segment with the L bit is loaded",
        "long mode is left",
        "SDM Vol.3 10.8.5",
    ),
)


def _code_segment(before: SpecialRegisters, after: SpecialRegisters) -> list[Transition]:
    found = []
    long_mode = bool(after.efer & EFER.LMA)
    was64 = bool(before.cs.l and before.efer & EFER.LMA)
    now64 = bool(after.cs.l and long_mode)
    if was64 is not now64 and long_mode:
        meaning = (
            "64-bit mode: 64-bit addresses and registers, and segments without base and limit"
            if now64
            else "compatibility mode: 16-bit or 32-bit code under long mode's page tables"
        )
        found.append(Transition("CS.L", int(now64), meaning, "SDM Vol.3 5.2.1"))
    if not now64 and not was64 and before.cs.db != after.cs.db:
        bits = 32 if after.cs.db else 16
        meaning = f"operands and addresses have {bits} bits unless a prefix says otherwise"
        found.append(Transition("CS.D", after.cs.db, meaning, "SDM Vol.3 3.4.5"))
    return found
