"""What a region of RAM holds at one moment: a file of pages, or what changed since an earlier one.

RAM that a snapshot was taken of, or that was made from one, is a private mapping of the snapshot's
file: pages are shared until somebody writes them, and the kernel's page tables then say which
those are, whoever it was: the guest, the host, a view (/proc/self/pagemap).
"""

import mmap
import os
import weakref
from typing import Any, Final

from kvmpy.abi import address_of, ffi, host_error, lib
from kvmpy.memory import PAGE_SIZE, Memory

__all__ = [
    "Bitmap",
    "Image",
    "bits",
    "capture",
    "changed_pages",
    "mark",
    "memory_file",
    "put_back",
    "set_bits",
    "words",
]

Bitmap = bytearray
"""A bit for each page of 4 KiB, lowest page first, in whole words of 64."""

_FLATTEN: Final = 4  # an increment of more than a quarter of the pages becomes a whole image


def _empty(pages: int) -> Bitmap:
    return bytearray(-(-pages // 64) * 8)


def _full(pages: int) -> Bitmap:
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
    made = _empty(pages)
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


def words(bitmap: Bitmap) -> Any:
    """A bitmap as C takes it."""
    return ffi.from_buffer("uint64_t[]", bitmap, require_writable=True)


def _pointer(address: int) -> Any:
    return ffi.cast("uint8_t *", address)


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise host_error(-result, what)
    return result


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
        self._view: mmap.mmap | None = None
        self._close = weakref.finalize(self, os.close, fd)

    @property
    def pages(self) -> int:
        """How many pages of 4 KiB the region has."""
        return self.size // PAGE_SIZE

    @property
    def base(self) -> "Image":
        """The whole image at the end of the chain of parents."""
        return self if self.parent is None else self.parent.base

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
        self.add_increments(region.host_address)
        return region

    def view(self) -> mmap.mmap:
        """The whole content, mapped; kept, since what compares and resets reads it often."""
        if self._view is None:
            base = self.base
            view = mmap.mmap(base.fd, self.size, flags=mmap.MAP_PRIVATE, offset=base.offset)
            self.add_increments(address_of(view))
            self._view = view
        return self._view

    def read(self, page: int) -> bytes:
        """One page of the content."""
        at = page * PAGE_SIZE
        return self.view()[at : at + PAGE_SIZE]

    def add_increments(self, start: int) -> None:
        """Bring a mapping of the base at host address `start` to this image's content."""
        if self.parent is None or self.changed is None:
            return
        self.parent.add_increments(start)
        with mmap.mmap(self.fd, self.size, flags=mmap.MAP_PRIVATE, offset=self.offset) as own:
            changed = words(self.changed)
            source = _pointer(address_of(own))
            lib.kvmpy_copy_pages(_pointer(start), source, self.pages, changed)

    def differing(self, other: "Image") -> list[int]:
        """The numbers of the pages in which two images of a region differ."""
        marked = _full(self.pages)
        if self.base is other.base:
            marked = _empty(self.pages)
            for image in (self, other):
                step: Image | None = image
                while step is not None and step.changed is not None:
                    marked = bytearray(a | b for a, b in zip(marked, step.changed, strict=True))
                    step = step.parent
        here, there = (_pointer(address_of(image.view())) for image in (self, other))
        lib.kvmpy_differing(here, there, self.pages, words(marked))
        return bits(marked)


def own_pages(region: Memory) -> Bitmap:
    """The pages of a region that may differ from what it maps, or are not zero if it maps none."""
    pages = region.size // PAGE_SIZE
    if region.backing == "shared" or (region.backing == "private" and region.origin is None):
        return _full(pages)
    marked = _empty(pages)
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        start = _pointer(region.host_address)
        result = lib.kvmpy_own_pages(pagemap, start, pages, words(marked))
    finally:
        os.close(pagemap)
    _checked(result, "reading /proc/self/pagemap")
    return marked


def capture(region: Memory) -> Image:
    """What a region holds now; an increment where it comes from an image and little changed.

    The region then comes from what is returned, unless its backing is another's file.
    """
    origin = region.origin
    pages, start = region.size // PAGE_SIZE, _pointer(region.host_address)
    marked = own_pages(region)
    if isinstance(origin, Image):
        there = _pointer(address_of(origin.view()))
        count = lib.kvmpy_differing(start, there, pages, words(marked))
        if count <= pages // _FLATTEN:
            stored = bytearray(marked)
            lib.kvmpy_not_zero(start, pages, words(stored))
            fd = _write(start, region.size, stored)
            made = _image(region, fd, parent=origin, changed=marked)
            region.origin = made  # its base is what the region maps already
            return made
        marked = _full(pages)
    lib.kvmpy_not_zero(start, pages, words(marked))
    made = _image(region, _write(start, region.size, marked))
    _derive(region, made)
    return made


def _image(region: Memory, fd: int, **more: Any) -> Image:
    return Image(region.address, region.size, fd, readonly=region.readonly, **more)


def memory_file(size: int) -> int:
    """The descriptor of a file in memory of `size` zeros, which take nothing."""
    fd = os.memfd_create("kvmpy-snapshot", os.MFD_CLOEXEC)
    try:
        os.truncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _write(start: Any, size: int, marked: Bitmap) -> int:
    """A file in memory with the marked pages."""
    fd = memory_file(size)
    try:
        result = lib.kvmpy_write_pages(fd, 0, start, size // PAGE_SIZE, words(marked))
        _checked(result, "writing the pages of a snapshot")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _derive(region: Memory, image: Image) -> None:
    """Have a region of kvmpy's own map an image, copy-on-write."""
    if region.backing == "shared":
        return
    start, base = region.host_address, image.base
    result = lib.kvmpy_remap(_pointer(start), region.size, base.fd, base.offset)
    _checked(result, f"mapping the snapshot of {region!r}")
    region.origin = image
    image.add_increments(start)


def changed_pages(region: Memory, image: Image) -> Bitmap:
    """The pages of a region that differ from what an image holds."""
    pages, start = region.size // PAGE_SIZE, _pointer(region.host_address)
    marked = own_pages(region) if _near(region, image) else _full(pages)
    if _near(region, image):
        for step in _increments(image):  # pages of its own that the region may not have
            marked = bytearray(a | b for a, b in zip(marked, step, strict=True))
    lib.kvmpy_differing(start, _pointer(address_of(image.view())), pages, words(marked))
    return marked


def put_back(region: Memory, image: Image) -> list[int]:
    """Bring a region to what an image holds; the numbers of the pages that differed."""
    pages, start = region.size // PAGE_SIZE, _pointer(region.host_address)
    there = _pointer(address_of(image.view()))
    marked, near = changed_pages(region, image), _near(region, image)
    if near or region.backing == "shared":
        lib.kvmpy_copy_pages(start, there, pages, words(marked))
        if near:
            region.origin = image
    else:
        _derive(region, image)
    return bits(marked)


def _near(region: Memory, image: Image) -> bool:
    """Whether a region maps the base of an image."""
    return isinstance(region.origin, Image) and region.origin.base is image.base


def _increments(image: Image) -> list[Bitmap]:
    found = []
    step: Image | None = image
    while step is not None and step.changed is not None:
        found.append(step.changed)
        step = step.parent
    return found
