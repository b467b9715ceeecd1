"""Disassembly, in the mode that the processor is in, and hexadecimal dumps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from kvmpy.views.cpumode import CpuMode, cpu_mode, linear_rip
from kvmpy.views.linear import read_linear
from kvmpy.views.pages import Read
from kvmpy.views.show import Grid, Shown
from kvmpy.views.symbols import Symbols
from kvmpy.x86.state import SpecialRegisters

__all__ = ["CodeView", "HexView", "Instruction", "decoder", "disassemble", "hexdump"]

LONGEST: Final = 15
"""Bytes of the longest instruction (SDM Vol.2 2.3.11)."""
_PER_ROW: Final = 16
_MOST_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: `address` is what RIP is there. `text` is empty where none is decoded."""

    address: int
    data: bytes
    text: str
    symbol: str = ""


@dataclass(frozen=True, slots=True)
class CodeView(Shown):
    """Instructions in a row, and why there are no more of them, if that is so."""

    mode: CpuMode
    instructions: tuple[Instruction, ...]
    problem: str = ""

    def grids(self) -> tuple[Grid, ...]:
        """A row for each instruction."""
        rows = [
            (f"{one.address:#x}", one.symbol, one.data.hex(" "), one.text)
            for one in self.instructions
        ]
        if not any(one.symbol for one in self.instructions):
            rows = [(address, data, text) for address, _, data, text in rows]  # type: ignore[misc]
        columns = ("",) * (len(rows[0]) if rows else 0)
        return (Grid(self.mode.name, columns, rows, (self.problem,) if self.problem else ()),)


def decoder(mode: CpuMode, *, detail: bool = False) -> Any:
    """A capstone disassembler for code of that mode."""
    from capstone import CS_ARCH_X86, CS_MODE_16, CS_MODE_32, CS_MODE_64, Cs

    made = Cs(CS_ARCH_X86, {16: CS_MODE_16, 32: CS_MODE_32, 64: CS_MODE_64}[mode.bits])
    made.detail = detail
    return made


def disassemble(
    read: Read,
    special: SpecialRegisters,
    rip: int,
    count: int = 8,
    *,
    rflags: int = 2,
    symbols: Symbols | None = None,
) -> CodeView:
    """Up to `count` instructions from `rip` on, an offset in CS, through the page tables."""
    mode = cpu_mode(special, rflags)
    linear = linear_rip(special, rip, rflags)
    data = read_linear(read, special, linear, min(max(0, count) * LONGEST, _MOST_BYTES))
    found: list[Instruction] = []
    at = 0
    for one in decoder(mode).disasm(data, rip, max(0, count)):
        text = f"{one.mnemonic} {one.op_str}".rstrip()
        name = symbols.at(linear + at) if symbols else ""
        found.append(Instruction(one.address, bytes(one.bytes), text, name))
        at += one.size
    problem = ""
    if len(found) < count:
        where = f"{rip + at:#x}"
        rest = data[at : at + LONGEST]
        problem = f"{where}: {rest.hex(' ')}: no instruction" if rest else f"{where}: no memory"
    return CodeView(mode, tuple(found), problem)


@dataclass(frozen=True, slots=True)
class HexView(Shown):
    """Bytes of memory from `address` on, which is linear or guest-physical."""

    address: int
    data: bytes
    linear: bool
    problem: str = ""

    def grids(self) -> tuple[Grid, ...]:
        """Sixteen bytes a row; rows that repeat the one before are left out."""
        rows = list(self._rows())
        kind = "linear" if self.linear else "guest-physical"
        title = f"{len(self.data)} bytes at {kind} address {self.address:#x}"
        return (Grid(title, ("", "", ""), rows, (self.problem,) if self.problem else ()),)

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        before, skipped = b"", False
        for at in range(0, len(self.data), _PER_ROW):
            row = self.data[at : at + _PER_ROW]
            if row == before and at + _PER_ROW < len(self.data):
                if not skipped:
                    yield "*", "", ""
                skipped = True
                continue
            before, skipped = row, False
            shown = f"{row[:8].hex(' '):<23}  {row[8:].hex(' ')}".rstrip()
            text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in row)
            yield f"{self.address + at:#x}", shown, text


def hexdump(
    read: Read, special: SpecialRegisters, address: int, length: int, *, linear: bool = True
) -> HexView:
    """Up to `length` bytes, through the page tables if `linear`; at most 1 MiB."""
    length = min(max(0, length), _MOST_BYTES)
    if linear:
        data = read_linear(read, special, address, length)
    else:
        found = bytearray()
        while len(found) < length:
            at = address + len(found)
            piece = read(at, min(length - len(found), 4096 - at % 4096))
            if piece is None:
                break
            found += piece
        data = bytes(found)
    problem = ""
    if len(data) < length:
        problem = f"no memory at {address + len(data):#x}"
    return HexView(address, data, linear, problem)
