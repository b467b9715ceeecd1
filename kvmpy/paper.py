"""A machine on paper: the memory and the registers that a guest would start with, without KVM."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvmpy import modes
from kvmpy.boot.placing import check_entry, place_image
from kvmpy.boot.segments import Image
from kvmpy.machine import EXTRA_RAM, LOW_RAM_LIMIT, memory_size
from kvmpy.memory import AddressSpace, Memory
from kvmpy.modes import Layout
from kvmpy.views.pages import reader
from kvmpy.views.state import StateView
from kvmpy.views.symbols import places
from kvmpy.x86.state import SpecialRegisters

__all__ = ["Paper", "on_paper"]


@dataclass(frozen=True, slots=True)
class Paper:
    """What a machine would start with."""

    layout: Layout
    ram: AddressSpace
    view: StateView


@contextmanager
def on_paper(image: Image, memory: str | int | None = None) -> Iterator[Paper]:
    """The start of a machine with `image` loaded; it fails as `Machine.from_image` does.

    `memory` is by default what the image asks for, or 16M.
    """
    wanted = image.header.memory if image.header else None
    size = memory_size(memory or wanted or "16M")
    low = min(size, LOW_RAM_LIMIT)
    layout = modes.build(image.mode, image.ring or 0, low, size - low)
    ram = AddressSpace()
    try:
        ram.add(Memory(0, low))
        if size > low:
            ram.add(Memory(EXTRA_RAM, size - low, slot=1))
        if layout.data:
            ram.write(layout.base, layout.data)
        place_image(image, layout, ram)
        check_entry(image.entry, ram)
        registers, special = modes.entry_state(layout, image.entry, SpecialRegisters())
        symbols: dict[str, int] = {}
        for segment in image.segments:
            symbols |= places(image.symbols, segment.address, segment.memory_size)
        yield Paper(layout, ram, StateView(reader(ram.read), registers, special, symbols=symbols))
    finally:
        for region in ram:
            region.close()
