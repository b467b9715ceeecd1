"""RAM from a snapshot's file: mapped where it lies in the file, or expanded into memory, once.

An image's file is mapped by every machine that is made from it. Where the pages lie in the file as
they do in RAM, that is the snapshot's own file, and nothing is read before a guest touches it.
"""

import mmap
import os
from collections.abc import Callable

from kvmpy.abi import address_of, ffi, host_error, lib
from kvmpy.memory import PAGE_SIZE
from kvmpy.snapshot.image import Image, words
from kvmpy.snapshot.layout import digest
from kvmpy.snapshot.pages import memory_file
from kvmpy.snapshot.regions import RegionTable, block_runs
from kvmpy.snapshot.zstd import decompressor

__all__ = ["expanded", "mapped"]


def mapped(fd: int, table: RegionTable) -> Image:
    """The file's own pages as an image; a copy of them in memory, where pages repeat others."""
    if table.repeats:
        return _image(table, _filled(table, lambda made: _copy(fd, made, table)))
    taken = table.stored_pages * PAGE_SIZE
    return _image(table, os.dup(fd), offset=table.offset, stored=taken)


def expanded(fd: int, table: RegionTable) -> Image:
    """An image in memory of pages that are compressed; every block is checked on the way."""
    return _image(table, _filled(table, lambda made: _decompress(fd, made, table)))


def _image(table: RegionTable, fd: int, *, offset: int = 0, stored: int | None = None) -> Image:
    return Image(
        table.address, table.size, fd, offset=offset, readonly=table.readonly, stored=stored
    )


def _filled(table: RegionTable, fill: Callable[[int], None]) -> int:
    """A file in memory of the region's size, after `fill` was called with it."""
    made = memory_file(table.size)
    try:
        fill(made)
    except BaseException:
        os.close(made)
        raise
    return made


def _copy(fd: int, made: int, table: RegionTable) -> None:
    with mmap.mmap(fd, table.size, flags=mmap.MAP_PRIVATE, offset=table.offset) as ram:
        start = ffi.cast("uint8_t *", address_of(ram))
        result = lib.kvmpy_write_pages(made, 0, start, table.pages, words(table.stored))
    if result < 0:
        raise host_error(-result, "expanding a snapshot")
    _repeat(made, table)


def _repeat(made: int, table: RegionTable) -> None:
    """Write the repeated pages from what they repeat."""
    last, data = -1, b""
    for page, source in table.repeats:
        if source != last:
            last, data = source, os.pread(made, PAGE_SIZE, source * PAGE_SIZE)
        os.pwrite(made, data, page * PAGE_SIZE)


def _decompress(fd: int, made: int, table: RegionTable) -> None:
    decompress = decompressor()
    for number, runs in enumerate(block_runs(table.stored)):
        block = table.blocks[number]
        data = os.pread(fd, block.size, block.offset)
        table.check(number, digest(data))
        pages = decompress(data, sum(count for _, count in runs) * PAGE_SIZE)
        at = 0
        for first, count in runs:
            os.pwrite(made, pages[at : at + count * PAGE_SIZE], first * PAGE_SIZE)
            at += count * PAGE_SIZE
    _repeat(made, table)
