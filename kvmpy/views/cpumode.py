"""Which mode the processor is in, from the special registers (SDM Vol.3 2.2, 5.2.1, 10.8, 10.9)."""

from typing import Final, NamedTuple

from kvmpy.x86.flags import CR0, EFER, RFLAGS
from kvmpy.x86.state import SpecialRegisters

__all__ = ["CpuMode", "cpu_mode", "instruction_pointer", "linear_rip"]


class CpuMode(NamedTuple):
    """The mode's name and the size of its code, in bits; `long` where EFER.LMA is set."""

    name: str
    bits: int
    long: bool = False

    def __str__(self) -> str:
        return self.name


_REAL: Final = CpuMode("real mode", 16)
_BIG_REAL: Final = CpuMode("real mode with 32-bit code", 32)
_V86: Final = CpuMode("virtual-8086 mode", 16)
_PROTECTED16: Final = CpuMode("protected mode, 16-bit code", 16)
_PROTECTED: Final = CpuMode("protected mode, 32-bit code", 32)
_COMPATIBILITY16: Final = CpuMode("compatibility mode, 16-bit code", 16, True)
_COMPATIBILITY: Final = CpuMode("compatibility mode, 32-bit code", 32, True)
_LONG: Final = CpuMode("64-bit mode", 64, True)


def cpu_mode(special: SpecialRegisters, rflags: int = 2) -> CpuMode:
    """The mode that code runs in: CR0.PE, EFER.LMA, RFLAGS.VM, CS.L and CS.D decide."""
    if not special.cr0 & CR0.PE:
        return _BIG_REAL if special.cs.db else _REAL
    if special.efer & EFER.LMA:
        if special.cs.l:
            return _LONG
        return _COMPATIBILITY if special.cs.db else _COMPATIBILITY16
    if rflags & RFLAGS.VM:
        return _V86
    return _PROTECTED if special.cs.db else _PROTECTED16


def linear_rip(special: SpecialRegisters, rip: int, rflags: int = 2) -> int:
    """The linear address of code at `rip`: CS has no base in 64-bit mode."""
    if cpu_mode(special, rflags).bits == 64:
        return rip
    return special.cs.base + rip & 0xFFFF_FFFF


def instruction_pointer(special: SpecialRegisters, linear: int, rflags: int = 2) -> int:
    """The other way round: what RIP is where code is at the linear address."""
    if cpu_mode(special, rflags).bits == 64:
        return linear
    return linear - special.cs.base & 0xFFFF_FFFF
