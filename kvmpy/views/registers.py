"""Views of registers: general ones with RFLAGS, control registers bit by bit, segments.

Sources: SDM Vol.1 3.4.3 (RFLAGS), Vol.3 2.5 (CR0 to CR4, CR8), 2.2.1 (EFER), 3.4.3 (segments).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntFlag
from typing import Final

from kvmpy.views.cpumode import cpu_mode
from kvmpy.views.descriptors import segment_kind
from kvmpy.views.formats import paging_mode
from kvmpy.views.pages import cpl_of
from kvmpy.views.show import Grid, Shown
from kvmpy.x86.flags import CR0, CR4, EFER, RFLAGS
from kvmpy.x86.registers import Registers
from kvmpy.x86.state import SpecialRegisters

__all__ = ["ControlView", "RegistersView", "SegmentsView", "flag_names"]

_PER_ROW: Final = 4
_SECTIONS: Final[Mapping[str, str]] = {
    "CR0.PE": "SDM Vol.3 10.9.1",
    "CR0.WP": "SDM Vol.3 4.6.1",
    "CR0.PG": "SDM Vol.3 4.1.1",
    "CR4.PSE": "SDM Vol.3 4.3",
    "CR4.PAE": "SDM Vol.3 4.1.1",
    "CR4.PGE": "SDM Vol.3 4.10.2.4",
    "CR4.LA57": "SDM Vol.3 4.5",
    "CR4.PCIDE": "SDM Vol.3 4.10.1",
    "CR4.SMEP": "SDM Vol.3 4.6.1",
    "CR4.SMAP": "SDM Vol.3 4.6.1",
    "CR4.PKE": "SDM Vol.3 4.6.2",
    "CR4.PKS": "SDM Vol.3 4.6.2",
    "EFER.SCE": "SDM Vol.3 5.8.8",
    "EFER.LME": "SDM Vol.3 10.8.5",
    "EFER.LMA": "SDM Vol.3 10.8.5",
    "EFER.NXE": "SDM Vol.3 4.1.1",
    **{
        f"EFER.{name}": "APM Vol.2 3.1.7"
        for name in ("SVME", "LMSLE", "FFXSR", "TCE", "MCOMMIT", "INTWB", "UAIE", "AIBRSE")
    },
}
"""By name, for flags of unlike registers are equal where their numbers are."""
_PRESENT_SEGMENTS: Final = ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt")
_ATTRIBUTES: Final = ("present", "s", "type", "db", "l", "g", "avl")
_APIC_BITS: Final = ((8, "BSP", "bootstrap processor"), (10, "EXTD", "x2APIC mode"),
                     (11, "EN", "local APIC enabled"))  # fmt: skip


def flag_names(value: int, kind: type[IntFlag]) -> str:
    """The names of the bits that are set, and in hexadecimal what has no name."""
    names = [one.name or "" for one in kind if value & one]
    rest = value & ~sum(int(one) for one in kind)
    if kind is RFLAGS:
        names = [name for name in names if name != "FIXED"]
        names.append(f"IOPL={value >> 12 & 3}")
        rest &= ~int(RFLAGS.IOPL)
    return " ".join(names + ([f"{rest:#x}"] if rest else []))


@dataclass(frozen=True, slots=True)
class RegistersView(Shown):
    """The general registers, RIP and RFLAGS with the names of its bits."""

    registers: Registers

    def grids(self) -> tuple[Grid, ...]:
        """Four registers a row; then the flags that are set, each with its meaning."""
        cells = [f"{name:>3} {value:016x}" for name, value in self.registers.as_dict().items()
                 if name != "rflags"]  # fmt: skip
        cells += [""] * (-len(cells) % _PER_ROW)
        rows = [cells[at : at + _PER_ROW] for at in range(0, len(cells), _PER_ROW)]
        value = self.registers.rflags
        flags = [
            (str(_first(one)), one.name or "", one.meaning)
            for one in RFLAGS
            if value & one and one is not RFLAGS.FIXED
        ]
        flags.append(("13:12", f"IOPL = {value >> 12 & 3}", RFLAGS.IOPL.meaning))
        title = f"rflags {value:#x}: {flag_names(value, RFLAGS)} (SDM Vol.1 3.4.3)"
        return (
            Grid("general registers", ("",) * _PER_ROW, rows),
            Grid(title, ("bit", "name", "meaning"), flags),
        )


@dataclass(frozen=True, slots=True)
class ControlView(Shown):
    """CR0, CR2, CR3, CR4, CR8, EFER and the APIC base, each bit that has a name."""

    special: SpecialRegisters

    def grids(self) -> tuple[Grid, ...]:
        """The mode that they make, and a grid for each register with bits."""
        special = self.special
        mode = f"{cpu_mode(special)}, ring {cpl_of(special)}, {paging_mode(special)}"
        notes = (
            f"cr2 {special.cr2:#x}: the linear address of the last page fault (SDM Vol.3 4.7)",
            f"cr3 {special.cr3:#x}: {self._cr3()}",
            f"cr8 {special.cr8:#x}: task priority, interrupts up to it wait (SDM Vol.3 11.8.6)",
            f"apic_base {special.apic_base:#x}: {self._apic()}",
        )
        return (
            Grid(mode, notes=notes),
            _bits("cr0", special.cr0, CR0, "SDM Vol.3 2.5"),
            _bits("cr4", special.cr4, CR4, "SDM Vol.3 2.5"),
            _bits("efer", special.efer, EFER, "SDM Vol.3 2.2.1"),
        )

    def _cr3(self) -> str:
        special = self.special
        mode = paging_mode(special)
        if mode == "PAE":
            return f"page directory pointers at {special.cr3 & 0xFFFF_FFE0:#x} (SDM Vol.3 4.4.1)"
        if mode == "2-level":
            return f"page directory at {special.cr3 & 0xFFFF_F000:#x} (SDM Vol.3 4.3)"
        text = f"root table at {special.cr3 & 0x000F_FFFF_FFFF_F000:#x}"
        if special.cr4 & CR4.PCIDE:
            text += f", PCID {special.cr3 & 0xFFF:#x}"
        return f"{text} (SDM Vol.3 4.5.2)" if special.cr0 & CR0.PG else "not used: paging is off"

    def _apic(self) -> str:
        value = self.special.apic_base
        words = [f"{name} ({text})" for bit, name, text in _APIC_BITS if value >> bit & 1]
        words.append(f"registers at {value & 0x000F_FFFF_FFFF_F000:#x}")
        return ", ".join(words) + " (SDM Vol.3 11.4.4)"


def _bits(name: str, value: int, kind: type[CR0 | CR4 | EFER], section: str) -> Grid:
    rows = [
        (
            str(_first(one)),
            one.name or "",
            str(int(bool(value & one))),
            one.meaning,
            _SECTIONS.get(f"{kind.__name__}.{one.name}", section),
        )
        for one in kind
    ]
    title = f"{name} {value:#x}: {flag_names(value, kind) or 'no bit is set'}"
    return Grid(title, ("bit", "name", "", "meaning", "source"), rows)


def _first(flag: int) -> int:
    return (flag & -flag).bit_length() - 1


@dataclass(frozen=True, slots=True)
class SegmentsView(Shown):
    """The segment registers with their hidden parts, and the table registers."""

    special: SpecialRegisters

    def grids(self) -> tuple[Grid, ...]:
        """A row for each register."""
        special = self.special
        rows = [self._row(name) for name in _PRESENT_SEGMENTS]
        tables = [
            (name.upper() + "R", f"{table.base:#x}", f"{table.limit:#x}")
            for name, table in (("gdt", special.gdt), ("idt", special.idt))
        ]
        columns = ("", "selector", "base", "limit", "what it is", "dpl", "attributes")
        notes = ("in 64-bit mode only FS and GS have bases, and no segment has a limit",)
        return (
            Grid("segments (SDM Vol.3 3.4.3)", columns, rows, notes if special.cs.l else ()),
            Grid("descriptor tables (SDM Vol.3 2.4)", ("", "base", "limit"), tables),
        )

    def _row(self, name: str) -> tuple[str, ...]:
        special = self.special
        segment = getattr(special, name)
        selector = f"{segment.selector:#06x}"
        if special.cr0 & CR0.PE and segment.selector & ~3:
            table = "LDT" if segment.selector & 4 else "GDT"
            selector += f" {table}[{segment.selector >> 3}] rpl {segment.selector & 3}"
        kind = segment_kind(segment, bool(special.efer & EFER.LMA))
        attributes = " ".join(f"{bit}={getattr(segment, bit):x}" for bit in _ATTRIBUTES)
        if segment.unusable:
            kind = "unusable"
        return (name.upper(), selector, f"{segment.base:#x}", f"{segment.limit:#x}", kind,
                str(segment.dpl), attributes)  # fmt: skip
