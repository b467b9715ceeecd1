"""Taking the content of a region of RAM, and putting it back.

RAM that a snapshot was taken of, or that was made from one, is a private mapping of the snapshot's
file: pages are shared until somebody writes them, and the kernel's page tables then say which
those are, whoever it was: the guest, the host, a view (/proc/self/pagemap).
"""

import os
from typing import Any, Final

from kvmpy.abi import address_of, lib
from kvmpy.memory import PAGE_SIZE, Memory
from kvmpy.snapshot.image import (
    Bitmap,
    Image,
    bits,
    checked,
    empty,
    full,
    host_errors,
    pointer,
    united,
    words,
)

__all__ = ["capture", "changed_pages", "memory_file", "put_back"]

_FLATTEN: Final = 4  # an increment of more than a quarter of the pages becomes a whole image
_UNKNOWN: Final = object()  # as a region's origin: no telling what it maps


def own_pages(region: Memory) -> Bitmap:
    """The pages of a region that may differ from what it maps, or are not zero if it maps none."""
    pages = region.size // PAGE_SIZE
    if region.backing == "shared" or (region.backing == "private" and region.origin is None):
        return full(pages)
    if region.origin is _UNKNOWN:
        return full(pages)
    marked = empty(pages)
    result = lib.kvmpy_own_pages(pointer(region.host_address), pages, words(marked))
    checked(result, "reading /proc/self/pagemap")
    return marked


def _not_zero(region: Memory) -> Bitmap:
    """The pages of a region that may be other than zero."""
    marked, origin = own_pages(region), region.origin
    return united(marked, origin.holding()) if isinstance(origin, Image) else marked


def capture(region: Memory, *, from_base: bool = False) -> Image:
    """What a region holds now; an increment where it comes from an image and little changed.

    The region then comes from what is returned, unless its backing is another's file. With
    `from_base`, an increment is one of the whole image at the end of the chain.
    """
    origin = region.origin
    pages, start = region.size // PAGE_SIZE, pointer(region.host_address)
    marked = own_pages(region)
    if isinstance(origin, Image):
        if from_base:
            marked, origin = united(marked, origin.since_base()), origin.base
        before = origin.mapped()
        there = pointer(address_of(before))
        count = lib.kvmpy_differing(start, there, pages, words(marked))
        del before
        if count <= pages // _FLATTEN:
            stored = bytearray(marked)
            lib.kvmpy_not_zero(start, pages, words(stored))
            fd = _write(start, region.size, stored)
            made = _image(region, fd, parent=origin, changed=marked)
            region.origin = made  # its base is what the region maps already
            return made
        marked = _not_zero(region)
    lib.kvmpy_not_zero(start, pages, words(marked))
    made = _image(region, _write(start, region.size, marked))
    _derive(region, made)
    return made


def _image(region: Memory, fd: int, **more: Any) -> Image:
    return Image(region.address, region.size, fd, readonly=region.readonly, **more)


def memory_file(size: int) -> int:
    """The descriptor of a file in memory of `size` zeros, which take nothing."""
    with host_errors("making the file of a snapshot"):
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
        checked(result, "writing the pages of a snapshot")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _derive(region: Memory, image: Image) -> None:
    """Have a region of kvmpy's own map an image, copy-on-write."""
    if region.backing == "shared":
        return
    start, base = region.host_address, image.base
    region.origin = _UNKNOWN  # where a signal handler raises in between
    result = lib.kvmpy_remap(pointer(start), region.size, base.fd, base.offset)
    checked(result, f"mapping the snapshot of {region!r}")
    image.add_increments(start)
    region.origin = image


def changed_pages(region: Memory, image: Image) -> Bitmap:
    """The pages of a region that differ from what an image holds."""
    pages, start = region.size // PAGE_SIZE, pointer(region.host_address)
    if _near(region, image):  # its increments: pages of its own that the region may not have
        marked = united(own_pages(region), image.since_base())
    else:
        marked = united(_not_zero(region), image.holding())
    lib.kvmpy_differing(start, pointer(address_of(image.view())), pages, words(marked))
    return marked


def put_back(region: Memory, image: Image) -> list[int]:
    """Bring a region to what an image holds; the numbers of the pages that differed."""
    pages, start = region.size // PAGE_SIZE, pointer(region.host_address)
    there = pointer(address_of(image.view()))
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
