"""The pages of a region of RAM in a snapshot file: which are stored, where, and their checksums."""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from kvmpy.errors import SnapshotError
from kvmpy.memory import PAGE_SIZE
from kvmpy.snapshot.image import Bitmap
from kvmpy.snapshot.layout import Bytes, Header

__all__ = ["BLOCK_PAGES", "Block", "RegionTable", "block_runs", "pack_tables", "unpack_tables"]

BLOCK_PAGES: Final = 64
_MOST_REGIONS: Final = 4096
_MOST_PAGES: Final = 1 << 31  # KVM's bound on one slot
_REGION = struct.Struct("<QQIIQQQ")
_BLOCK = struct.Struct("<QQ32s")
_REPEAT = struct.Struct("<QQ")


@dataclass(frozen=True, slots=True)
class Block:
    """Up to 64 stored pages, those next in order: where their bytes are, and their checksum.

    Without compression each page lies at its own place, and offset and size are 0.
    """

    offset: int
    size: int
    digest: bytes


@dataclass(slots=True)
class RegionTable:
    """The pages of a region of RAM: stored ones, those that repeat a stored one, and zeros.

    Without compression, `offset` is where the region's first page lies, or would lie, in the file.
    `repeats` are pairs: a page, and the stored page that it is the same as.
    """

    address: int
    size: int
    readonly: bool
    offset: int
    stored: Bitmap
    repeats: list[tuple[int, int]] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    @property
    def pages(self) -> int:
        """How many pages the region has."""
        return self.size // PAGE_SIZE

    @property
    def stored_pages(self) -> int:
        """How many of them have their bytes in the file."""
        return int.from_bytes(self.stored, "little").bit_count()

    def check(self, number: int, found: bytes) -> None:
        """Raise SnapshotError where a block's checksum is another than the one `found`."""
        if found != self.blocks[number].digest:
            raise SnapshotError(
                f"was altered: block {number} of the RAM at {self.address:#x} does not match its "
                "checksum"
            )


def pack_tables(tables: Iterable[RegionTable]) -> bytes:
    """All regions' tables, one after another."""
    made = bytearray()
    for table in tables:
        counts = (len(table.stored), len(table.repeats), len(table.blocks))
        made += _REGION.pack(
            table.address, table.size, int(table.readonly), 0, table.offset, *counts[1:]
        )
        made += table.stored
        made += b"".join(_REPEAT.pack(*pair) for pair in table.repeats)
        made += b"".join(_BLOCK.pack(one.offset, one.size, one.digest) for one in table.blocks)
    return bytes(made)


def unpack_tables(data: Bytes, header: Header) -> list[RegionTable]:
    """The same back, checked against each other and against the file's size.

    All parts of a file follow each other without gaps, in which there could be something.
    """
    tables: list[RegionTable] = []
    at, end, place = 0, 0, Header.SIZE
    while at < len(data):
        if at + _REGION.size > len(data):
            raise SnapshotError("is malformed: a region is cut off")
        numbers = _REGION.unpack_from(data, at)
        table = _unpack_table(data, at + _REGION.size, numbers)
        at += _REGION.size + _sizes(numbers)
        if table.address < end:
            raise SnapshotError("is malformed: regions of RAM overlap")
        end = table.address + table.size
        place = _place_after(table, place, header.compress)
        tables.append(table)
        if len(tables) > _MOST_REGIONS:
            raise SnapshotError(f"is malformed: it has more than {_MOST_REGIONS} regions of RAM")
    if not tables or place != header.values_offset:
        raise SnapshotError("is malformed: its pages are not all that lies before its values")
    return tables


def _sizes(numbers: tuple[int, ...]) -> int:
    """The bytes of a table after its numbers."""
    _, size, _, _, _, repeats, blocks = numbers
    bitmap = -(-(size // PAGE_SIZE) // 64) * 8
    return bitmap + repeats * _REPEAT.size + blocks * _BLOCK.size


def _unpack_table(data: Bytes, at: int, numbers: tuple[int, ...]) -> RegionTable:
    address, size, readonly, zero, offset, repeats, blocks = numbers
    pages = size // PAGE_SIZE
    if (
        (address | size | offset) % PAGE_SIZE
        or not 0 < pages <= _MOST_PAGES
        or address + size > 1 << 52
        or readonly > 1
        or zero
    ):
        raise SnapshotError(f"is malformed: a region of RAM at {address:#x} of {size:#x} bytes")
    if at + _sizes(numbers) > len(data):
        raise SnapshotError("is malformed: a region's table is longer than all of them")
    middle = at + -(-pages // 64) * 8
    last = middle + repeats * _REPEAT.size
    bitmap = bytearray(data[at:middle])
    if int.from_bytes(bitmap[pages // 64 * 8 :], "little") >> pages % 64:
        raise SnapshotError("is malformed: pages are stored that the region does not have")
    return RegionTable(
        address,
        size,
        bool(readonly),
        offset,
        bitmap,
        _repeats(data[middle:last], bitmap, pages),
        [Block(*one) for one in _BLOCK.iter_unpack(data[last : last + blocks * _BLOCK.size])],
    )


def _repeats(data: Bytes, stored: Bitmap, pages: int) -> list[tuple[int, int]]:
    found, before = [], -1
    for page, source in _REPEAT.iter_unpack(data):
        if not before < page < pages or source >= pages:
            raise SnapshotError("is malformed: a repeated page lies outside of its region")
        if stored[page >> 3] >> (page & 7) & 1 or not stored[source >> 3] >> (source & 7) & 1:
            raise SnapshotError("is malformed: a page repeats one that is not stored")
        found.append((page, source))
        before = page
    return found


def _place_after(table: RegionTable, place: int, compress: str | None) -> int:
    """Where the region's pages end in the file; they begin at `place`."""
    if len(table.blocks) != -(-table.stored_pages // BLOCK_PAGES):
        raise SnapshotError("is malformed: it has another number of blocks than its pages need")
    offset = place if compress is None else 0
    for block in table.blocks:
        if block.offset != (0 if compress is None else place) or (not compress and block.size):
            raise SnapshotError("is malformed: a block of pages is not where it must be")
        place += block.size
    if table.offset != offset:
        raise SnapshotError("is malformed: a region of RAM is not where it must be")
    return place + table.size if compress is None else place


def block_runs(stored: Bitmap) -> Iterator[list[tuple[int, int]]]:
    """The stored pages, block by block, as runs: the first page and how many follow each other."""
    runs: list[tuple[int, int]] = []
    room = BLOCK_PAGES
    for start, length in _runs(stored):
        first, count = start, length
        while count:
            step = min(count, room)
            runs.append((first, step))
            first += step
            count -= step
            room -= step
            if not room:
                yield runs
                runs, room = [], BLOCK_PAGES
    if runs:
        yield runs


def _runs(bitmap: Bitmap) -> Iterator[tuple[int, int]]:
    """Each run of marked pages."""
    start = count = 0
    for at in range(0, len(bitmap), 8):
        word = int.from_bytes(bitmap[at : at + 8], "little")
        base, left = 8 * at, 64
        while word:
            zeros = (word & -word).bit_length() - 1
            word >>= zeros
            base, left = base + zeros, left - zeros
            ones = (word ^ (word + 1)).bit_length() - 1
            if count and start + count == base:
                count += ones
            else:
                if count:
                    yield start, count
                start, count = base, ones
            word >>= ones
            base, left = base + ones, left - ones
    if count:
        yield start, count
