"""The formats of page tables: levels, entries and reserved bits of each paging mode.

Sources: SDM Vol.3 4.1.1, figures 4-4 (2-level), 4-7 (PAE) and 4-11 (4-level and 5-level).
"""

from dataclasses import dataclass, replace
from typing import Final

from kvmpy.x86.flags import CR0, CR4, EFER
from kvmpy.x86.state import SpecialRegisters

__all__ = [
    "FORMATS",
    "NO_PAGING",
    "Format",
    "LevelFormat",
    "canonical_bits",
    "format_of",
    "is_canonical",
    "paging_mode",
]

NO_PAGING: Final = "no paging"

_LARGE: Final = 1 << 7
_NX: Final = 1 << 63


@dataclass(frozen=True, slots=True)
class LevelFormat:
    """One level: `shift` is the first address bit of its index, `count` its entries.

    `large` says whether an entry may map a page itself ("yes", "no", or "pse": with CR4.PSE), and
    `has_rights` whether it has R/W, U/S and NX. `always` are bits that are reserved in any case.
    """

    name: str
    shift: int
    count: int
    wide: bool = True
    large: str = "no"
    last: bool = False
    has_rights: bool = True
    always: int = 0
    reserved_high: int = 0
    """Bits above the physical address that are reserved, not ignored."""

    def is_large(self, value: int, special: SpecialRegisters) -> bool:
        """Whether a present entry maps a large page."""
        if not value & _LARGE or self.last:
            return False
        return self.large == "yes" or (self.large == "pse" and bool(special.cr4 & CR4.PSE))

    def reserved(self, large: bool, physical_bits: int, nxe: bool) -> int:
        """The bits of a present entry that must be zero."""
        if not self.wide:
            # A 4 MiB page has bits 39..32 of its address in 20..13; bit 21 is reserved.
            width = min(40, physical_bits)
            return (1 << 21 | _span(max(width, 32) - 19, 21)) if large else 0
        mask = self.always | self.reserved_high | _span(physical_bits, 52)
        if not nxe:
            mask |= _NX
        return mask | _span(13, self.shift) if large else mask

    def page(self, value: int, large: bool) -> int:
        """The physical address of the page that an entry maps."""
        if self.wide:
            return value & _span(self.shift, 52)
        if large:
            return value & 0xFFC0_0000 | (value >> 13 & 0xFF) << 32
        return value & 0xFFFF_F000


def _span(first: int, end: int) -> int:
    """Bits from `first` up to, not including, `end`."""
    return (1 << end) - (1 << first) if end > first else 0


@dataclass(frozen=True, slots=True)
class Format:
    """A paging mode: its levels from the root on, and what of CR3 and entries are addresses."""

    levels: tuple[LevelFormat, ...]
    entry_size: int
    root_mask: int
    table_mask: int
    canonical_bits: int | None


_ADDRESS: Final = _span(12, 52)
_IGNORED_HIGH: Final = _span(52, 63)
_PML5 = LevelFormat("PML5", 48, 512, always=_LARGE)
_FOUR = (
    LevelFormat("PML4", 39, 512, always=_LARGE),
    LevelFormat("PDPT", 30, 512, large="yes"),
    LevelFormat("PD", 21, 512, large="yes"),
    LevelFormat("PT", 12, 512, last=True),
)
_PAE = (
    LevelFormat("PDPT", 30, 4, has_rights=False, always=0x1E6 | _NX, reserved_high=_IGNORED_HIGH),
    LevelFormat("PD", 21, 512, large="yes", reserved_high=_IGNORED_HIGH),
    LevelFormat("PT", 12, 512, last=True, reserved_high=_IGNORED_HIGH),
)
_TWO = (
    LevelFormat("PD", 22, 1024, wide=False, large="pse"),
    LevelFormat("PT", 12, 1024, wide=False, last=True),
)

FORMATS: Final = {
    "2-level": Format(_TWO, 4, 0xFFFF_F000, 0xFFFF_F000, None),
    "PAE": Format(_PAE, 8, 0xFFFF_FFE0, _ADDRESS, None),
    "4-level": Format(_FOUR, 8, _ADDRESS, _ADDRESS, 48),
    "5-level": Format((_PML5, *_FOUR), 8, _ADDRESS, _ADDRESS, 57),
}
"""The paging modes with tables, by name."""


def format_of(mode: str, gigabyte_pages: bool) -> Format:
    """The format of a mode of `FORMATS`, on a processor that has pages of 1 GiB or has not."""
    form = FORMATS[mode]
    if gigabyte_pages or form.canonical_bits is None:
        return form
    levels = [
        replace(level, always=_LARGE) if level.name == "PDPT" else level for level in form.levels
    ]
    return replace(form, levels=tuple(levels))


def paging_mode(special: SpecialRegisters) -> str:
    """The paging mode that the control registers make: a key of `FORMATS`, or `NO_PAGING`."""
    if not special.cr0 & CR0.PG:
        return NO_PAGING
    if not special.cr4 & CR4.PAE:
        return "2-level"
    if not special.efer & EFER.LMA:
        return "PAE"
    return "5-level" if special.cr4 & CR4.LA57 else "4-level"


def canonical_bits(special: SpecialRegisters) -> int:
    """How many bits of a linear address count, the highest of them as its sign."""
    return 57 if special.cr4 & CR4.LA57 else 48


def is_canonical(address: int, bits: int) -> bool:
    """Whether bits 63 to `bits` - 1 of an address are all equal (SDM Vol.1 3.3.7.1)."""
    return (address >> bits - 1) in (0, (1 << 65 - bits) - 1)
