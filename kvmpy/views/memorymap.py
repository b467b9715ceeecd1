"""What is where in a VM: RAM by slots, what kvmpy keeps in it, devices at ports and in memory."""

from collections.abc import Iterable
from dataclasses import dataclass

from kvmpy.bus import Claim
from kvmpy.memory import Memory
from kvmpy.modes import Layout
from kvmpy.views.pages import size_words
from kvmpy.views.show import Grid, Shown
from kvmpy.x86.area import Region

__all__ = ["MemoryMapView", "memory_map"]


@dataclass(frozen=True, slots=True)
class MemoryMapView(Shown):
    """Regions of RAM, kvmpy's own things in low RAM, and the claims of devices."""

    ram: tuple[Memory, ...]
    layout: tuple[Region, ...]
    mmio: tuple[Claim, ...]
    ports: tuple[Claim, ...] | None

    def grids(self) -> tuple[Grid, ...]:
        """Guest-physical addresses from 0 upwards, then ports."""
        rows = [
            (
                one.address,
                f"{one.address:#x}",
                f"{one.end - 1:#x}",
                size_words(one.size),
                _slot(one),
            )
            for one in self.ram
        ]
        rows += [
            (one.start, f"  {one.start:#x}", f"  {one.end - 1:#x}",
             size_words(one.end - one.start), one.name)
            for one in self.layout
        ]  # fmt: skip
        rows += [
            (one.base, f"{one.base:#x}", f"{one.end - 1:#x}", size_words(one.size),
             f"MMIO: {one.name}")
            for one in self.mmio
        ]  # fmt: skip
        rows.sort(key=lambda row: row[0])  # stable: a region comes before what is in it
        memory = Grid(
            "guest-physical memory",
            ("from", "to", "size", "what it is"),
            [row[1:] for row in rows],
        )
        if self.ports is None:
            return (memory,)
        ports = [(f"{one.base:#x}", f"{one.end - 1:#x}", one.name) for one in self.ports]
        notes = () if ports else ("no devices",)
        return (memory, Grid("ports", ("from", "to", "device"), ports, notes))


def _slot(one: Memory) -> str:
    words = [f"RAM, slot {one.slot}", one.backing]
    if one.readonly:
        words.append("read-only")
    if one.log_dirty:
        words.append("dirty log")
    return ", ".join(words)


def memory_map(
    ram: Iterable[Memory],
    layout: Layout | None,
    mmio: Iterable[Claim] = (),
    ports: Iterable[Claim] | None = None,
) -> MemoryMapView:
    """The map of a VM whose low RAM is laid out as `layout` says, if it is kvmpy's.

    `ports` are None where there are no devices to speak of, since nothing runs.
    """
    parts = layout.describe() if layout is not None else ()
    claims = None if ports is None else tuple(ports)
    return MemoryMapView(tuple(ram), parts, tuple(mmio), claims)
