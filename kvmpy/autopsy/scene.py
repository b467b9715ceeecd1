"""The state that a guest is found in, and what can be asked of it without a machine."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from kvmpy.views.cpumode import CpuMode, cpu_mode, linear_rip
from kvmpy.views.descriptors import look_up
from kvmpy.views.linear import read_linear
from kvmpy.views.pages import Access, PageWalk, Read, cpl_of, page_walk
from kvmpy.x86.flags import RFLAGS
from kvmpy.x86.registers import Registers
from kvmpy.x86.segments import Segment
from kvmpy.x86.state import DebugRegisters, SpecialRegisters

__all__ = ["Scene"]

_LONGEST: Final = 15  # bytes of an instruction (SDM Vol.2 2.3.11)
_SUB: Final = {  # names of the four legacy registers' parts: register, shift, bits
    **{f"e{n}": (f"r{n}", 0, 32) for n in ("ax", "bx", "cx", "dx", "si", "di", "sp", "bp", "ip")},
    **{n: (f"r{n}", 0, 16) for n in ("ax", "bx", "cx", "dx", "si", "di", "sp", "bp", "ip")},
    **{f"{n}l": (f"r{n}", 0, 8) for n in ("si", "di", "sp", "bp")},
    **{f"{n}l": (f"r{n}x", 0, 8) for n in "abcd"},
    **{f"{n}h": (f"r{n}x", 8, 8) for n in "abcd"},
    **{f"r{n}d": (f"r{n}", 0, 32) for n in range(8, 16)},
    **{f"r{n}w": (f"r{n}", 0, 16) for n in range(8, 16)},
    **{f"r{n}b": (f"r{n}", 0, 8) for n in range(8, 16)},
}


@dataclass(frozen=True)
class Scene:
    """Registers, special registers and RAM, by `read(address, length)`.

    `code` are the bytes at RIP where the host has told them, else they are read. `physical_bits`
    is MAXPHYADDR, and `debug` are DR0 to DR7 where they are known.
    """

    registers: Registers
    special: SpecialRegisters
    read: Read
    code: bytes = b""
    physical_bits: int = 52
    debug: DebugRegisters | None = None

    @cached_property
    def mode(self) -> CpuMode:
        """The mode that the code at RIP runs in."""
        return cpu_mode(self.special, self.registers.rflags)

    @cached_property
    def cpl(self) -> int:
        """The current privilege level."""
        return 3 if self.registers.rflags & RFLAGS.VM else cpl_of(self.special)

    @property
    def linear(self) -> int:
        """The linear address of RIP."""
        return linear_rip(self.special, self.registers.rip, self.registers.rflags)

    @cached_property
    def instruction_bytes(self) -> bytes:
        """Up to 15 bytes from RIP on, as far as they are mapped."""
        return self.code or read_linear(self.read, self.special, self.linear, _LONGEST)

    def register(self, name: str) -> int:
        """A general register, or a part of one, by name."""
        whole, shift, bits = _SUB.get(name, (name, 0, 64))
        value: int = getattr(self.registers, whole)
        return value >> shift & (1 << bits) - 1

    def segment(self, name: str) -> Segment:
        """A segment register by name."""
        found: Segment = getattr(self.special, name)
        return found

    def walk(self, linear: int, access: Access, cpl: int | None = None) -> PageWalk:
        """A walk of the page tables for an access at the current, or another, ring."""
        return page_walk(
            self.read,
            self.special,
            linear & (1 << 64) - 1,
            access,
            cpl=self.cpl if cpl is None else cpl,
            ac=bool(self.registers.rflags & RFLAGS.AC),
            physical_bits=self.physical_bits,
        )

    def number(self, linear: int, size: int) -> int | None:
        """The little-endian number at a linear address, None where it is not mapped."""
        data = read_linear(self.read, self.special, linear & (1 << 64) - 1, size)
        return int.from_bytes(data, "little") if len(data) == size else None

    def stack_slot(self, number: int, size: int) -> int | None:
        """What is on the stack, so many slots of `size` bytes above its top."""
        return self.number(self.stack_address(number * size), size)

    def stack_address(self, offset: int) -> int:
        """The linear address so many bytes above the top of the stack."""
        if self.mode.bits == 64:
            return self.registers.rsp + offset & (1 << 64) - 1
        ss = self.special.ss
        mask = 0xFFFF_FFFF if ss.db else 0xFFFF
        return ss.base + (self.registers.rsp + offset & mask) & 0xFFFF_FFFF

    def at_ring3(self, registers: Registers, cs: int, ss: int, cr2: int) -> "Scene":
        """The scene before an exception out of ring 3, by what its frame says."""
        special = self.special.copy()
        for name, selector in (("cs", cs), ("ss", ss)):
            segment = look_up(self.read, special, selector).segment
            if segment is not None:
                setattr(special, name, segment)
        special.cr2 = cr2
        return replace(self, registers=registers, special=special)
