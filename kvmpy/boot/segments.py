"""What every kind of guest image comes down to: bytes at addresses, and where to start."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvmpy.boot.header import GuestHeader

__all__ = ["Image", "LoadSegment"]


@dataclass(frozen=True, slots=True)
class LoadSegment:
    """Bytes that go to one place in guest memory.

    `address` is guest-physical; `data` is copied there; what `memory_size` (in bytes, at least
    `len(data)`) leaves after it reads as zero, as an ELF file's .bss does.
    """

    address: int
    data: bytes
    memory_size: int

    @property
    def end(self) -> int:
        """The address after the segment's last byte."""
        return self.address + self.memory_size


@dataclass(frozen=True, slots=True)
class Image:
    """A guest ready to be copied into memory and started.

    `kind` is "boot sector", "flat", "elf" or "assembly", and `why` says in one line what made
    kvmpy take it for that. `mode` is "real", "protected16", "protected" or "long"; `ring` is
    the privilege level to start at (0 or 3), or None where the guest does not say. `entry` is
    the guest-physical address of the first instruction; it may lie outside of the segments.
    `symbols` maps names to addresses. `header` is what an assembly source says of itself.
    """

    kind: str
    name: str
    segments: tuple[LoadSegment, ...]
    entry: int
    mode: str
    ring: int | None
    why: str
    symbols: Mapping[str, int] = field(default_factory=dict)
    header: GuestHeader | None = None
