"""How a snapshot's machine was made, what was attached to it, and which file it is in."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

__all__ = ["Attached", "Config", "Saved"]


@dataclass(frozen=True, slots=True)
class Config:
    """How the machine was made: what `Machine` was called with, as far as a copy needs it."""

    mode: str
    ring: int
    memory: int
    irqchip: str | None = None
    strict: bool = False
    posted_console: bool = False
    devices: bool = True


class Attached(NamedTuple):
    """What a device that is not a standard one had claimed: of the bus "port" or "MMIO"."""

    bus: str
    base: int
    size: int
    name: str

    def __str__(self) -> str:
        last = "" if self.size == 1 else f"-{self.base + self.size - 1:#x}"
        name = "".join(c if c.isprintable() else "?" for c in self.name)  # it may be a file's
        return f"{self.bus} {self.base:#x}{last} ({name})"


class Saved(NamedTuple):
    """A file that a snapshot is in: where, and the checksum of its header, which is that of all."""

    path: Path
    digest: bytes
