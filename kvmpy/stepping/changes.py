"""Which registers and flags an instruction changed."""

from typing import Final

from kvmpy.stepping.step import Change
from kvmpy.views.cpumode import CpuMode
from kvmpy.x86.flags import RFLAGS
from kvmpy.x86.registers import REGISTER_NAMES, Registers
from kvmpy.x86.state import SpecialRegisters

__all__ = ["changes"]

_GENERAL: Final = REGISTER_NAMES[:-2]
_SEGMENTS: Final = ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt")
_CONTROL: Final = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
# FIXED never changes; RF and TF are the stepping's own doing.
_FLAGS: Final = tuple(flag for flag in RFLAGS if flag not in (RFLAGS.FIXED, RFLAGS.RF, RFLAGS.TF))


def changes(
    before: Registers,
    after: Registers,
    special_before: SpecialRegisters,
    special_after: SpecialRegisters,
    mode: CpuMode,
) -> tuple[Change, ...]:
    """All but RIP, which the next step shows, and the flags that stepping itself sets."""
    found = []
    for name in _GENERAL:
        was, now = getattr(before, name), getattr(after, name)
        if was != now:
            found.append(Change(_name(name, was | now, mode), was, now))
    if before.rflags != after.rflags:
        for flag in _FLAGS:
            if (before.rflags ^ after.rflags) & flag:
                was, now = bool(before.rflags & flag), bool(after.rflags & flag)
                found.append(Change(flag.name or "", int(was), int(now)))
        was, now = before.rflags >> 12 & 3, after.rflags >> 12 & 3
        if was != now:
            found.append(Change("IOPL", was, now))
    if special_before == special_after:
        return tuple(found)
    return tuple(found + _special(special_before, special_after))


def _name(name: str, value: int, mode: CpuMode) -> str:
    """What code of that mode calls a register."""
    return f"e{name[1:]}" if mode.bits < 64 and name[1].isalpha() and value < 1 << 32 else name


def _special(before: SpecialRegisters, after: SpecialRegisters) -> list[Change]:
    found = [
        Change(name, getattr(before, name), getattr(after, name))
        for name in _CONTROL
        if getattr(before, name) != getattr(after, name)
    ]
    for name in _SEGMENTS:
        was, now = getattr(before, name), getattr(after, name)
        if was.selector != now.selector:
            found.append(Change(name, was.selector, now.selector))
        for part in ("base", "limit"):
            if getattr(was, part) != getattr(now, part):
                found.append(Change(f"{name}.{part}", getattr(was, part), getattr(now, part)))
    for name in ("gdt", "idt"):
        for part in ("base", "limit"):
            was, now = getattr(getattr(before, name), part), getattr(getattr(after, name), part)
            if was != now:
                found.append(Change(f"{name}r.{part}", was, now))
    return found
