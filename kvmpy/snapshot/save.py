"""Writing a snapshot to a file: stored pages, repeats, values, tables, and the header last."""

import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvmpy.abi import address_of, ffi, host_error, lib
from kvmpy.errors import ConfigError
from kvmpy.memory import PAGE_SIZE
from kvmpy.snapshot.config import Saved
from kvmpy.snapshot.image import Image, mark, words
from kvmpy.snapshot.layout import COMPRESSIONS, MOST_BYTES, Header, digest, pack_values
from kvmpy.snapshot.newfile import new_file
from kvmpy.snapshot.regions import Block, RegionTable, block_runs, pack_tables
from kvmpy.snapshot.values import Contents, named
from kvmpy.snapshot.zstd import compressor

__all__ = ["save"]


def save(path: Path, images: Sequence[Image], what: Contents, compress: str | None) -> Saved:
    """Write it; nobody sees the file before it is whole."""
    if compress not in COMPRESSIONS:
        raise ConfigError(f"compress={compress!r}: use None or 'zstd'")
    compressed = None if compress is None else compressor()
    values = pack_values(named(what))
    with new_file(path) as fd:
        end, tables = Header.SIZE, []
        for image in images:
            content = image.mapped()
            table = _table(image, content)
            if compressed is None:
                _keep_few_repeats(table)
                table.offset = end
                _write_in_place(fd, content, table)
                end += image.size
            else:
                end = _write_compressed(fd, content, table, end, compressed)
            tables.append(table)
        packed = pack_tables(tables)
        if max(len(values), len(packed)) > MOST_BYTES:
            raise ConfigError(
                f"the state of the snapshot's devices has {len(values)} bytes, and the tables of "
                f"its pages {len(packed)}: a file holds {MOST_BYTES} of each"
            )
        _write(fd, values, end)
        _write(fd, packed, end + len(values))
        header = Header(
            compress=compress,
            file_size=end + len(values) + len(packed),
            values_offset=end,
            values_size=len(values),
            values_digest=digest(values),
            tables_offset=end + len(values),
            tables_size=len(packed),
            tables_digest=digest(packed),
        ).pack()
        os.truncate(fd, end + len(values) + len(packed))
        _write(fd, header, 0)
    return Saved(Path(os.path.abspath(path)), digest(header))


def _write(fd: int, data: bytes, offset: int) -> None:
    left = memoryview(data)
    while left:
        done = os.pwrite(fd, left, offset)
        if not done:
            raise OSError(errno.ENOSPC, "nothing was written")
        left, offset = left[done:], offset + done


def _table(image: Image, view: mmap.mmap) -> RegionTable:
    """Which pages of an image are to be stored, and which repeat one of those."""
    marked = image.holding()
    start = ffi.cast("uint8_t *", address_of(view))
    lib.kvmpy_not_zero(start, image.pages, words(marked))
    table = RegionTable(image.address, image.size, image.readonly, 0, marked)
    seen: dict[int, int] = {}
    for runs in block_runs(bytearray(marked)):
        for first, count in runs:
            for page in range(first, first + count):
                data = view[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
                source = seen.setdefault(hash(data), page)
                at = source * PAGE_SIZE
                if source != page and view[at : at + PAGE_SIZE] == data:
                    table.repeats.append((page, source))
                    marked[page >> 3] &= ~(1 << (page & 7))
    return table


def _keep_few_repeats(table: RegionTable) -> None:
    """Store repeated pages at their places too, unless that doubles the file.

    A file that leaves them out cannot be mapped as it is: loading it fills memory.
    """
    if len(table.repeats) <= table.stored_pages:
        for page, _ in table.repeats:
            mark(table.stored, page, 1)
        table.repeats.clear()


def _write_in_place(fd: int, content: mmap.mmap, table: RegionTable) -> None:
    """Each stored page at its own place, so that the file can be mapped as RAM."""
    with memoryview(content) as view:
        for runs in block_runs(table.stored):
            table.blocks.append(Block(0, 0, digest(*_pieces(view, runs))))
    start = ffi.cast("uint8_t *", address_of(content))
    pages = table.size // PAGE_SIZE
    result = lib.kvmpy_write_pages(fd, table.offset, start, pages, words(table.stored))
    if result < 0:
        raise host_error(-result, "writing the pages of a snapshot")


def _write_compressed(
    fd: int, content: mmap.mmap, table: RegionTable, end: int, compressed: Any
) -> int:
    """Each block of stored pages, compressed, one after another from `end` on; the new end."""
    with memoryview(content) as view:
        for runs in block_runs(table.stored):
            data = compressed(b"".join(_pieces(view, runs)))
            _write(fd, data, end)
            table.blocks.append(Block(end, len(data), digest(data)))
            end += len(data)
    return end


def _pieces(view: memoryview, runs: list[tuple[int, int]]) -> list[memoryview]:
    """The bytes of runs of pages."""
    return [view[first * PAGE_SIZE : (first + count) * PAGE_SIZE] for first, count in runs]
