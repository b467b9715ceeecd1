"""How a snapshot's machine was made, and which file it is in."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

__all__ = ["Config", "Saved"]


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


class Saved(NamedTuple):
    """A file that a snapshot is in: where, and the checksum of its header, which is that of all."""

    path: Path
    digest: bytes
