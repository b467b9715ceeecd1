"""kvmpy's area at the top of low RAM: what is where in it, and its bytes.

`kvmpy.modes` shows the map. The page tables of ring 3 hold everything but this area for the
user, so the 2 MiB pages at its two ends are split into 4 KiB pages.
"""

from typing import NamedTuple

from kvmpy.errors import ConfigError
from kvmpy.x86 import tables
from kvmpy.x86.paging import (
    PAGE_1G,
    PAGE_2M,
    PAGE_4K,
    Mapping,
    PageFlags,
    build_page_tables,
)
from kvmpy.x86.segments import Segment
from kvmpy.x86.tables import GDT_SIZE, IO_BITMAP_SIZE, TSS_SIZE, VECTORS, Selector

__all__ = ["Area", "Region", "build_area"]

_GIB4 = 4 * PAGE_1G
_GUEST_LEAST = 2 * PAGE_4K
"""What must stay below the area: page 0, and one page for an image and its stack."""

_IST1_STACK = 1024
_IDT64_SIZE = VECTORS * 16
_KERNEL_PAGES = 5
"""Ring 3: stubs and IDT (a page each), GDT, TSS, I/O bitmap (9 KiB in all) and the stacks."""


class Region(NamedTuple):
    """A named range of guest memory: from `start` up to, not including, `end`."""

    start: int
    end: int
    name: str


class Area(NamedTuple):
    """The area's first address, its bytes, what is where in it, and the TSS's segment."""

    base: int
    data: bytes
    regions: tuple[Region, ...]
    tss: Segment


def build_area(*, long_mode: bool, ring: int, low_ram: int, extra_ram: int) -> Area:
    """Return the area that ends at `low_ram`, for long mode or for protected mode.

    Raises ConfigError, with the least size, where `low_ram` is too small to hold it.
    """
    paging_size = _paging_size(ring, extra_ram) if long_mode else 0
    kernel_size = PAGE_4K * (_KERNEL_PAGES if ring else 1)
    kernel = low_ram - kernel_size
    base = kernel - paging_size
    if base < _GUEST_LEAST:
        least = kernel_size + paging_size + _GUEST_LEAST
        mode = "long" if long_mode else "protected"
        raise ConfigError(
            f"{mode} mode in ring {ring} needs at least {least >> 10} KiB of low RAM, "
            f"not {low_ram >> 10} KiB"
        )
    pieces = _Pieces(base)
    if long_mode:
        paging = build_page_tables(base, _mappings(ring, base, low_ram, extra_ram), PAGE_2M)
        pieces.add("page tables", paging.data, paging_size)
    if ring:
        stubs = pieces.add("reporting stubs", tables.stubs())
        pieces.add("IDT", tables.idt64(stubs) if long_mode else tables.idt32(stubs), _IDT64_SIZE)
    tss_at = pieces.end + GDT_SIZE
    bitmap_size = IO_BITMAP_SIZE if ring else 0
    tss = Segment.tss(Selector.TSS, tss_at, TSS_SIZE + bitmap_size - 1)
    pieces.add("GDT", tables.gdt(tss, long_mode=long_mode))
    stack, ist1 = (low_ram - _IST1_STACK, low_ram) if ring else (0, 0)
    if long_mode:
        pieces.add("TSS", tables.tss64(stack, ist1, open_ports=bool(ring)))
    else:
        pieces.add("TSS", tables.tss32(stack, open_ports=bool(ring)))
    if ring:
        pieces.add("kernel stack", b"", stack - pieces.end)
        pieces.add("IST 1 stack", b"", ist1 - stack)
    return Area(base, pieces.data(low_ram), tuple(pieces.regions), tss)


class _Pieces:
    """Pieces of the area, one after the other."""

    def __init__(self, base: int) -> None:
        self.base = self.end = base
        self.parts: list[bytes] = []
        self.regions: list[Region] = []

    def add(self, name: str, data: bytes, size: int = 0) -> int:
        """Append `data`, filled with zeros up to `size`; return its address."""
        start = self.end
        self.parts.append(data.ljust(size, b"\0"))
        self.end += len(self.parts[-1])
        self.regions.append(Region(start, self.end, name))
        return start

    def data(self, end: int) -> bytes:
        """Return the bytes of all pieces, filled with zeros up to the address `end`."""
        return b"".join(self.parts).ljust(end - self.base, b"\0")


def _paging_size(ring: int, extra_ram: int) -> int:
    """Bytes for the page tables of 4 GiB and `extra_ram` in 2 MiB pages."""
    directories = -(-(_GIB4 + extra_ram) // PAGE_1G)
    pointer_tables = -(-directories // 512)
    split_pages = 2 if ring else 0  # the 2 MiB pages that hold the area's two ends
    return PAGE_4K * (1 + pointer_tables + directories + split_pages)


def _mappings(ring: int, base: int, low_ram: int, extra_ram: int) -> list[Mapping]:
    kernel = PageFlags.PRESENT | PageFlags.WRITE | PageFlags.ACCESSED | PageFlags.DIRTY
    end = _GIB4 + -(-extra_ram // PAGE_2M) * PAGE_2M
    if not ring:
        return [Mapping(0, 0, end, kernel)]
    user = kernel | PageFlags.USER
    return [
        Mapping(0, 0, base, user),
        Mapping(base, base, low_ram - base, kernel),
        Mapping(low_ram, low_ram, end - low_ram, user),
    ]
