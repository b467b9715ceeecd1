"""Four-level page tables: building them and walking them (SDM Vol.3 4.5).

    virtual address  63..48     47..39   38..30   29..21   20..12   11..0
                     sign       PML4     PDPT     PD       PT       offset
    page size                            1 GiB    2 MiB    4 KiB

A table is 512 entries of 8 bytes; bits 51..12 of an entry are the physical address of the next
table or of the page, the others are flags.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import KEEP, IntFlag
from itertools import pairwise

from kvmpy.errors import AddressError, ConfigError, OverlapError

__all__ = [
    "PAGE_1G",
    "PAGE_2M",
    "PAGE_4K",
    "Level",
    "Mapping",
    "PageFlags",
    "PageTables",
    "Walk",
    "build_page_tables",
    "is_canonical",
    "walk",
]

PAGE_4K = 1 << 12
PAGE_2M = 1 << 21
PAGE_1G = 1 << 30

_ENTRIES = 512
_ADDRESS = 0x000F_FFFF_FFFF_F000
_PHYSICAL_END = 1 << 52
_MOST_TABLES = 1 << 14  # 64 MiB of tables: more is a mistake in a minimal hypervisor


class PageFlags(IntFlag, boundary=KEEP):
    """The flags of a page-table entry (SDM Vol.3 tables 4-15 to 4-20)."""

    PRESENT = 1 << 0
    WRITE = 1 << 1
    USER = 1 << 2
    WRITE_THROUGH = 1 << 3
    CACHE_DISABLE = 1 << 4
    ACCESSED = 1 << 5
    DIRTY = 1 << 6
    LARGE = 1 << 7
    GLOBAL = 1 << 8
    NX = 1 << 63


# What an entry that points to a table permits: everything, so that the last level decides. It is
# accessed from the start, so that the processor has nothing to write to it.
_TABLE_FLAGS = int(PageFlags.PRESENT | PageFlags.WRITE | PageFlags.USER | PageFlags.ACCESSED)
_PRESENT, _LARGE, _NX = int(PageFlags.PRESENT), int(PageFlags.LARGE), int(PageFlags.NX)
_PERMISSIONS = int(PageFlags.WRITE | PageFlags.USER)
_LEAF_FLAGS = ~_ADDRESS & ((1 << 64) - 1) & ~_LARGE


@dataclass(frozen=True, slots=True)
class Mapping:
    """`length` bytes at the virtual address `virtual` that lead to `physical`.

    All three are multiples of 4 KiB. `flags` are those of the last level, without LARGE.
    """

    virtual: int
    physical: int
    length: int
    flags: PageFlags = PageFlags.PRESENT | PageFlags.WRITE


@dataclass(frozen=True, slots=True)
class PageTables:
    """Built tables: `data` is to be loaded at `root`, which is the value for CR3."""

    root: int
    data: bytes

    @property
    def size(self) -> int:
        """The bytes that the tables take: 4096 for each."""
        return len(self.data)


def is_canonical(address: int) -> bool:
    """Whether bits 63..47 of a 64-bit address are all equal (SDM Vol.1 3.3.7.1)."""
    return 0 <= address < 1 << 47 or (1 << 64) - (1 << 47) <= address < 1 << 64


def build_page_tables(at: int, mappings: Sequence[Mapping], largest: int = PAGE_1G) -> PageTables:
    """Return four-level page tables for `mappings`, to be loaded at the physical address `at`.

    Each mapping uses the largest page that its alignment and length permit, up to `largest`
    (`PAGE_4K`, `PAGE_2M` or `PAGE_1G`; a processor may lack the last, CPUID 0x80000001 EDX
    bit 26). Raises AddressError for addresses that are misaligned, not canonical or beyond 52
    physical bits, OverlapError for overlapping mappings, ConfigError for anything else.
    """
    if largest not in {PAGE_4K, PAGE_2M, PAGE_1G}:
        raise ConfigError(f"largest page {largest:#x} is none of 0x1000, 0x200000, 0x40000000")
    if at % PAGE_4K or not 0 <= at < _PHYSICAL_END:
        raise AddressError(
            f"page tables at {at:#x}: use a multiple of 4096 below {_PHYSICAL_END:#x}"
        )
    for mapping in mappings:
        _check(mapping)
    ordered = sorted(mappings, key=lambda mapping: mapping.virtual)
    for below, above in pairwise(ordered):
        if below.virtual + below.length > above.virtual:
            raise OverlapError(f"mappings overlap at {above.virtual:#x}: {below} and {above}")
    builder = _Builder(at)
    for mapping in ordered:
        builder.add(mapping, largest)
    return PageTables(at, b"".join(table.tobytes() for table in builder.tables))


def _check(mapping: Mapping) -> None:
    virtual, physical, length = mapping.virtual, mapping.physical, mapping.length
    for name, value in (("virtual", virtual), ("physical", physical), ("length", length)):
        if value % PAGE_4K or value < 0:
            raise AddressError(f"mapping: {name} {value:#x} is not a multiple of 4096")
    if not length:
        raise AddressError(f"mapping at {virtual:#x} has no length; use a multiple of 4096")
    last = virtual + length - 1
    if not is_canonical(virtual) or not is_canonical(last) or (virtual ^ last) >> 63:
        raise AddressError(f"mapping: {virtual:#x} to {last:#x} is not all canonical")
    if physical + length > _PHYSICAL_END:
        raise AddressError(f"mapping: physical {physical:#x} + {length:#x} exceeds 52 bits")
    if not mapping.flags & PageFlags.PRESENT or mapping.flags & ~_LEAF_FLAGS:
        raise ConfigError(f"mapping: flags {int(mapping.flags):#x} need PRESENT and no LARGE")


class _Builder:
    """The tables made so far; table number n lies at `at` + 4096 * n, number 0 is the PML4."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.tables = [array("Q", bytes(PAGE_4K))]

    def add(self, mapping: Mapping, largest: int) -> None:
        virtual, physical, left = mapping.virtual, mapping.physical, mapping.length
        flags = int(mapping.flags)
        while left:
            size = PAGE_4K
            for larger in (PAGE_1G, PAGE_2M):
                if larger <= largest and larger <= left and not (virtual | physical) % larger:
                    size = larger
                    break
            table, index = self._table(virtual, size)
            # A run ends at the table's end at the latest: only there can a larger page begin.
            count = min(_ENTRIES - index, left // size)
            first = physical | flags | (_LARGE if size > PAGE_4K else 0)
            entries = range(first, first + count * size, size)
            table[index : index + count] = array("Q", entries)
            virtual, physical, left = (
                virtual + count * size,
                physical + count * size,
                left - count * size,
            )

    def _table(self, virtual: int, size: int) -> tuple["array[int]", int]:
        """Return the table that holds the pages of `size` at `virtual`, and the index in it."""
        table = self.tables[0]
        span = PAGE_1G * _ENTRIES
        while span > size:
            index = virtual // span % _ENTRIES
            if not table[index]:
                if len(self.tables) == _MOST_TABLES:
                    raise ConfigError("page tables exceed 64 MiB; map less or use larger pages")
                address = self.at + PAGE_4K * len(self.tables)
                if address >= _PHYSICAL_END:
                    raise AddressError(
                        f"page tables from {self.at:#x} exceed 52 bits; move them down"
                    )
                table[index] = address | _TABLE_FLAGS
                self.tables.append(array("Q", bytes(PAGE_4K)))
            table = self.tables[((table[index] & _ADDRESS) - self.at) // PAGE_4K]
            span //= _ENTRIES
        return table, virtual // span % _ENTRIES


@dataclass(frozen=True, slots=True)
class Level:
    """One step of a walk: the table's name, the entry's physical address and its value."""

    name: str
    address: int
    entry: int


@dataclass(frozen=True, slots=True)
class Walk:
    """What a walk found.

    `physical` is None where an entry is not present; `page_size` and `flags` are 0 then.
    Otherwise `flags` are the last entry's, but with WRITE and USER only where all levels have
    them and NX where any has it (SDM Vol.3 4.6).
    """

    levels: tuple[Level, ...]
    physical: int | None
    page_size: int
    flags: PageFlags


_LEVELS = (("PML4", PAGE_1G * _ENTRIES), ("PDPT", PAGE_1G), ("PD", PAGE_2M), ("PT", PAGE_4K))


def walk(read: Callable[[int], int], cr3: int, virtual: int) -> Walk:
    """Translate `virtual` as the processor does with four-level paging (SDM Vol.3 4.5.4).

    `read` returns the 8-byte entry at a physical address; what it raises passes through.
    Reserved bits are not checked. Raises AddressError for an address that is not canonical.
    """
    if not is_canonical(virtual):
        raise AddressError(f"virtual address {virtual:#x} is not canonical")
    allowed, forbidden = _PERMISSIONS, 0
    levels: list[Level] = []
    table = cr3 & _ADDRESS
    for name, span in _LEVELS:
        address = table + virtual // span % _ENTRIES * 8
        entry = read(address)
        levels.append(Level(name, address, entry))
        if not entry & _PRESENT:
            break
        allowed &= entry
        forbidden |= entry & _NX
        if span == PAGE_4K or (span < _LEVELS[0][1] and entry & _LARGE):
            physical = entry & _ADDRESS & -span | virtual % span
            flags = entry & _LEAF_FLAGS & ~_PERMISSIONS | allowed | forbidden
            return Walk(tuple(levels), physical, span, PageFlags(flags))
        table = entry & _ADDRESS
    return Walk(tuple(levels), None, 0, PageFlags(0))
