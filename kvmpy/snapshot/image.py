"""What a region of RAM holds at one moment: a file of pages, or what changed since another one."""

import errno
import mmap
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from kvmpy.abi import address_of, ffi, host_error, lib
from kvmpy.errors import HostError
from kvmpy.memory import MAP_NORESERVE, PAGE_SIZE, Memory

__all__ = [
    "Bitmap",
    "Image",
    "bits",
    "checked",
    "data_pages",
    "empty",
    "full",
    "host_errors",
    "mark",
    "pointer",
    "set_bits",
    "united",
    "words",
]

Bitmap = bytearray
"""A bit for each page of 4 KiB, lowest page first, in whole words of 64."""

_MAPPING: Final = "mapping a snapshot"
_HINTS: Final = {
    errno.EMFILE: "each snapshot holds a descriptor: drop some, or raise the limit (ulimit -n)",
    errno.ENOMEM: "drop snapshots or machines, or raise the limit (ulimit -v)",
}


def empty(pages: int) -> Bitmap:
    """No page of so many."""
    return bytearray(-(-pages // 64) * 8)


def full(pages: int) -> Bitmap:
    """All pages of so many."""
    made = bytearray(((1 << pages) - 1).to_bytes(-(-pages // 8), "little"))
    return made.ljust(-(-pages // 64) * 8, b"\0")


def bits(bitmap: bytes | bytearray) -> list[int]:
    """The numbers of the pages that are marked."""
    found = []
    for at in range(0, len(bitmap), 8):
        word = int.from_bytes(bitmap[at : at + 8], "little")
        while word:
            low = word & -word
            found.append(8 * at + low.bit_length() - 1)
            word ^= low
    return found


def set_bits(pages: int, numbers: list[int]) -> Bitmap:
    """A bitmap of so many pages, with those marked."""
    made = empty(pages)
    for number in numbers:
        made[number >> 3] |= 1 << (number & 7)
    return made


def mark(bitmap: Bitmap, first: int, count: int) -> None:
    """Mark `count` pages from `first` on."""
    while count and first & 7:
        bitmap[first >> 3] |= 1 << (first & 7)
        first, count = first + 1, count - 1
    whole = count // 8
    bitmap[first >> 3 : (first >> 3) + whole] = b"\xff" * whole
    for page in range(first + 8 * whole, first + count):
        bitmap[page >> 3] |= 1 << (page & 7)


def data_pages(fd: int, offset: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a part of a file has data (lseek(2), SEEK_DATA): the first page, and how many."""
    at, end = offset, offset + size
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole is left
                return
            raise
        if at >= end:
            return
        after = min(os.lseek(fd, at, os.SEEK_HOLE), end)
        first = (at - offset) // PAGE_SIZE
        yield first, -(-(after - offset) // PAGE_SIZE) - first
        at = after


def united(one: Bitmap, other: Bitmap) -> Bitmap:
    """The pages that are marked in either."""
    both = int.from_bytes(one, "little") | int.from_bytes(other, "little")
    return bytearray(both.to_bytes(len(one), "little"))


def words(bitmap: Bitmap) -> Any:
    """A bitmap as C takes it."""
    return ffi.from_buffer("uint64_t[]", bitmap, require_writable=True)


def pointer(address: int) -> Any:
    """A host address as C takes it."""
    return ffi.cast("uint8_t *", address)


def checked(result: int, what: str) -> int:
    """What a function of C's returned; HostError where that is -errno."""
    if result < 0:
        raise host_error(-result, what, _HINTS.get(-result, ""))
    return result


@contextmanager
def host_errors(what: str) -> Iterator[None]:
    """Turn what Python's own calls raise into HostError."""
    try:
        yield
    except HostError:
        raise
    except OSError as error:
        code = error.errno or 0
        raise host_error(code, what, _HINTS.get(code, "")) from None


def _mapping(size: int) -> mmap.mmap:
    with host_errors(_MAPPING):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)


class Image:
    """The content of a region at `address`, of `size` bytes, when it was captured.

    `fd` holds pages at their own offsets from `offset` on, and zeros elsewhere. With `parent` it
    is an increment: only the pages of the bitmap `changed` count, and all others are the parent's.
    `stored` are the bytes of its pages, where `fd` holds other things beside them.
    The descriptor is closed when the image is no longer used.
    """

    def __init__(
        self,
        address: int,
        size: int,
        fd: int,
        *,
        offset: int = 0,
        readonly: bool = False,
        parent: "Image | None" = None,
        changed: Bitmap | None = None,
        stored: int | None = None,
    ) -> None:
        self.address, self.size, self.readonly = address, size, readonly
        self.fd, self.offset = fd, offset
        self.parent, self.changed = parent, changed
        self._stored = stored
        self._kept: dict[str, mmap.mmap] = {}
        self._close = weakref.finalize(self, os.close, fd)

    @property
    def pages(self) -> int:
        """How many pages of 4 KiB the region has."""
        return self.size // PAGE_SIZE

    def chain(self) -> "list[Image]":
        """Itself, its parent, and so on to the whole image at the end."""
        found = [self]
        while found[-1].parent is not None:
            found.append(found[-1].parent)
        return found

    @property
    def base(self) -> "Image":
        """The whole image at the end of the chain of parents."""
        return self if self.parent is None else self.chain()[-1]

    def since_base(self) -> Bitmap:
        """The pages that any increment of the chain has."""
        marked = empty(self.pages)
        for image in self.chain():
            if image.changed is not None:
                marked = united(marked, image.changed)
        return marked

    @property
    def stored(self) -> int:
        """The bytes that its own pages take; a page of zeros takes none."""
        return os.fstat(self.fd).st_blocks * 512 if self._stored is None else self._stored

    def map(self, slot: int) -> Memory:
        """A region of RAM that has its content, and shares its pages until they are written."""
        base = self.base
        region = Memory(
            self.address,
            self.size,
            slot=slot,
            readonly=self.readonly,
            backing="private",
            fd=base.fd,
            offset=base.offset,
        )
        region.origin = self
        if self.parent is not None:
            self.add_increments(region.host_address)
        return region

    def view(self) -> mmap.mmap:
        """The whole content, mapped; kept, since what goes back to it reads it often."""
        if not self._kept:
            # Several threads may come here at once: addresses in what one got must stay good.
            self._kept.setdefault("view", self.mapped())
        return self._kept["view"]

    def mapped(self) -> mmap.mmap:
        """The same for who looks once: if it is not kept already, it goes with what is returned.

        In it are copies of all pages of the chain's increments, and nobody counts those.
        """
        if self._kept:
            return self._kept["view"]
        base, view = self.base, _mapping(self.size)
        # Put in the place of another: Python's mmap of a file would keep a descriptor of it.
        start = address_of(view)
        checked(lib.kvmpy_remap(pointer(start), self.size, base.fd, base.offset), _MAPPING)
        self.add_increments(start)
        return view

    def holding(self) -> Bitmap:
        """The pages that can be other than zero; to look at the others would take memory."""
        marked, base = self.since_base(), self.base
        with host_errors("reading a snapshot"):
            for first, count in data_pages(base.fd, base.offset, base.size):
                mark(marked, first, count)
        return marked

    def add_increments(self, start: int) -> None:
        """Bring a mapping of the base at host address `start` to this image's content."""
        for image in reversed(self.chain()):
            if image.changed is None:
                continue
            with _mapping(self.size) as own:
                source = pointer(address_of(own))
                checked(lib.kvmpy_remap(source, self.size, image.fd, image.offset), _MAPPING)
                lib.kvmpy_copy_pages(pointer(start), source, self.pages, words(image.changed))

    def differing(self, other: "Image") -> Iterator[tuple[int, bytes, bytes]]:
        """The pages in which two images of a region differ: number, content here and there."""
        marks = Image.since_base if self.base is other.base else Image.holding
        marked = united(marks(self), marks(other))
        here, there = self.mapped(), other.mapped()
        starts = (pointer(address_of(view)) for view in (here, there))
        lib.kvmpy_differing(*starts, self.pages, words(marked))
        for page in bits(marked):
            place = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
            yield page, here[place], there[place]
