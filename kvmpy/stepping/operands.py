"""The memory operands of an instruction: their addresses, and what is there."""

from typing import Any, Final

from kvmpy.stepping.step import MemoryValue
from kvmpy.views.cpumode import CpuMode
from kvmpy.views.linear import linear_reader
from kvmpy.views.pages import Read
from kvmpy.x86.registers import REGISTER_NAMES, Registers
from kvmpy.x86.state import SpecialRegisters

__all__ = ["Operand", "operands", "stack_operand", "values", "with_values"]

_LARGEST: Final = 64
_MEMORY: Final = 3  # CS_OP_MEM
_READ, _WRITE = 1, 2  # CS_AC_READ, CS_AC_WRITE
_ACCESS: Final = {_READ: "read", _WRITE: "write", _READ | _WRITE: "read-write"}
_NO_ACCESS: Final = ("lea", "nop", "prefetch", "clflush", "invlpg")
_PUSHES: Final = ("push", "call", "enter", "lcall")
_POPS: Final = ("pop", "ret", "leave", "iret", "lret", "retf")

Operand = tuple[int, int, str]
"""Linear address, size, access."""


def _widths() -> dict[str, tuple[str, int]]:
    """Registers that addresses are made of: their 64-bit register, and their mask."""
    found = {}
    for name in REGISTER_NAMES[:-1]:
        found[name] = (name, (1 << 64) - 1)
        low = name[1:] if name[1].isalpha() else name
        found[f"{name}d" if low == name else f"e{low}"] = (name, (1 << 32) - 1)
        found[f"{name}w" if low == name else low] = (name, 0xFFFF)
    return found


_REGISTERS: Final = _widths()


def operands(
    instruction: Any, mode: CpuMode, registers: Registers, special: SpecialRegisters
) -> list[Operand]:
    """Those that the instruction names; `instruction` is capstone's, with detail."""
    if instruction.mnemonic.startswith(_NO_ACCESS):
        return []
    found = []
    for one in instruction.operands:
        if one.type == _MEMORY and 0 < one.size <= _LARGEST and one.access in _ACCESS:
            address = _address(instruction, one.mem, mode, registers, special)
            if address is not None:
                found.append((address, one.size, _ACCESS[one.access]))
    return found


def _address(
    instruction: Any, memory: Any, mode: CpuMode, registers: Registers, special: SpecialRegisters
) -> int | None:
    offset = memory.disp
    names = [instruction.reg_name(one) if one else "" for one in (memory.base, memory.index)]
    for name, scale in zip(names, (1, memory.scale), strict=True):
        if name in ("", "riz", "eiz"):
            continue
        if name in ("rip", "eip"):
            offset += instruction.address + instruction.size
        elif name in _REGISTERS:
            register, mask = _REGISTERS[name]
            offset += (getattr(registers, register) & mask) * scale
        else:
            return None  # a vector register: there is more than one address
    offset &= (1 << 8 * instruction.addr_size) - 1
    segment = instruction.reg_name(memory.segment) if memory.segment else ""
    if not segment:
        segment = "ss" if names[0] in ("rsp", "esp", "sp", "rbp", "ebp", "bp") else "ds"
    if mode.bits == 64:
        base = getattr(special, segment).base if segment in ("fs", "gs") else 0
        return int(base + offset & (1 << 64) - 1)
    return int(getattr(special, segment).base + offset & 0xFFFF_FFFF)


def stack_operand(
    mnemonic: str, before: Registers, after: Registers, special: SpecialRegisters, mode: CpuMode
) -> list[Operand]:
    """What a push or a pop of any kind moved; it names no operand in memory."""
    wide = mode.bits == 64
    base = 0 if wide else special.ss.base
    mask = (1 << 64) - 1 if wide else 0xFFFF_FFFF if special.ss.db else 0xFFFF
    if mnemonic.startswith(_PUSHES):
        size, start, access = (before.rsp - after.rsp) & mask, after.rsp & mask, "write"
    elif mnemonic.startswith(_POPS):
        size, start, access = (after.rsp - before.rsp) & mask, before.rsp & mask, "read"
    else:
        return []
    return [(base + start, size, access)] if 0 < size <= _LARGEST else []


def values(found: list[Operand], read: Read, before: SpecialRegisters) -> list[bytes | None]:
    """The bytes of operands as they are now."""
    linear = linear_reader(read, before)
    return [linear(address, size) for address, size, _ in found]


def with_values(
    found: list[Operand], earlier: list[bytes | None], later: list[bytes | None]
) -> tuple[MemoryValue, ...]:
    """Operands with what was there before and after the instruction."""
    return tuple(
        MemoryValue(address, size, access, was, now)
        for (address, size, access), was, now in zip(found, earlier, later, strict=True)
    )
