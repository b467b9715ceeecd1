"""A machine at one moment, as a value: memory, CPU state, interrupt controllers, devices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvmpy.errors import ConfigError
from kvmpy.kvm import backend
from kvmpy.snapshot.cpu import CpuState, VmState
from kvmpy.snapshot.diff import Difference, difference
from kvmpy.snapshot.pages import Image

__all__ = ["Config", "Snapshot"]


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


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Snapshot:
    """All of a machine at one moment; made by `Machine.snapshot`, and never changed.

    It shares pages with its `parent`, the snapshot that the machine had been at before, and with
    the machines that are made from it; its memory is freed when none of them is left.
    `devices` are the states of the devices that have any, by bus and address.
    """

    config: Config
    images: tuple[Image, ...]
    cpus: tuple[CpuState, ...]
    vm: VmState
    devices: Mapping[str, bytes]
    console: bytes
    entry: int | None
    parent: "Snapshot | None" = None
    backend: str = field(default_factory=backend)

    @property
    def size(self) -> int:
        """The bytes of memory that it takes beside its parent's: its pages and states."""
        states = sum(len(data) for state in self.cpus for data in state.values())
        devices = sum(map(len, self.devices.values()))
        return sum(image.stored for image in self.images) + states + devices + len(self.console)

    @property
    def pages(self) -> int:
        """How many pages of 4 KiB of RAM the machine has."""
        return sum(image.pages for image in self.images)

    def read(self, address: int, length: int) -> bytes:
        """A copy of `length` bytes of RAM at guest-physical `address`; AddressError outside."""
        from kvmpy.errors import AddressError

        for image in self.images:
            if image.address <= address and address + length <= image.address + image.size:
                start = address - image.address
                return bytes(image.view()[start : start + length])
        raise AddressError(f"{length} bytes at address {address:#x} lie outside of the RAM")

    def diff(self, other: "Snapshot") -> Difference:
        """What differs from here to another snapshot of the same kind of machine."""
        return difference(self, other)

    def check_backend(self, across: bool = False) -> None:
        """Raise ConfigError on another backend than that which it was taken on.

        With `across`, nothing is refused: what of the state means the same there is up to KVM.
        """
        here = backend()
        if here != self.backend and not across:
            raise ConfigError(
                f"the snapshot was taken under {self.backend}, and this host has {here}: "
                "across_backends=True tries all the same"
            )

    def __repr__(self) -> str:
        kind = "increment" if self.parent else "snapshot"
        return f"<{kind} of a {self.config.mode} machine, {self.pages} pages, {self.size} bytes>"


def by_address(images: Sequence[Image]) -> dict[tuple[int, int], Image]:
    """Images by address and size of their regions."""
    return {(image.address, image.size): image for image in images}


def same_shape(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two lists of regions or images cover the same addresses."""
    return [(a.address, a.size) for a in one] == [(b.address, b.size) for b in other]
