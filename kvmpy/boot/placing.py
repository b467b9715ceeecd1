"""Copying an image into guest memory, whoever's memory that is."""

from kvmpy.boot.segments import Image
from kvmpy.errors import AddressError
from kvmpy.memory import AddressSpace
from kvmpy.modes import Layout

__all__ = ["check_entry", "place_image"]


def place_image(image: Image, layout: Layout, memory: AddressSpace) -> None:
    """Copy every segment, and the zeros after it, into RAM.

    Raises AddressError for one that does not fit, or would cover what kvmpy keeps there.
    """
    for segment in image.segments:
        layout.check_load(segment.address, segment.memory_size)
        memory.write(segment.address, segment.data)
        zeros = segment.memory_size - len(segment.data)
        if zeros:
            memory.write(segment.address + len(segment.data), bytes(zeros))


def check_entry(entry: int, memory: AddressSpace) -> None:
    """Raise AddressError for an entry outside of RAM."""
    try:
        memory.read(entry, 1)
    except AddressError as error:
        raise AddressError(f"the entry {entry:#x} is no address of RAM: {error}") from None
