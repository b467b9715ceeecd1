"""Which pages of a guest's RAM are its page tables (SDM Vol.3 4.3-4.5)."""

import struct
from collections.abc import Callable
from typing import Final

from kvmpy.x86.state import SpecialRegisters

__all__ = ["table_pages"]

_PRESENT, _LARGE = 1 << 0, 1 << 7
_ADDRESS: Final = 0x000F_FFFF_FFFF_F000
_PG, _PAE, _LA57, _LMA = 1 << 31, 1 << 5, 1 << 12, 1 << 10
_MOST: Final = 1 << 14  # tables that refer to themselves, or garbage, must not take for ever


def table_pages(read: Callable[[int, int], bytes | None], special: SpecialRegisters) -> set[int]:
    """The guest-physical addresses of the pages with tables that CR3 leads to.

    `read(address, length)` gives bytes of RAM, or None where there is none.
    """
    if not special.cr0 & _PG:
        return set()
    wide = bool(special.cr4 & _PAE)
    levels = (5 if special.cr4 & _LA57 else 4) if special.efer & _LMA else 3 if wide else 2
    size, layout = (8, "<512Q") if wide else (4, "<1024I")
    found: set[int] = set()
    left = [(special.cr3 & (_ADDRESS if wide else 0xFFFFF000), levels)]
    while left and len(found) < _MOST:
        table, level = left.pop()
        data = None if table in found else read(table, 512 * 8)
        if data is None:
            continue
        found.add(table)
        entries = struct.unpack(layout, data)
        if levels == 3 and level == 3:  # four entries, where CR3 says
            start = (special.cr3 & 0xFE0) // size
            entries = struct.unpack("<4Q", data[start * size % 4096 : start * size % 4096 + 32])
        if level > 1:
            for entry in entries:
                large = entry & _LARGE and level in (2, 3)
                if entry & _PRESENT and not large:
                    left.append((entry & (_ADDRESS if wide else 0xFFFFF000), level - 1))
    return found
