"""Two address spaces, one mechanism: which device answers at a port or an MMIO address.

A bus is a sorted table of claims. It knows nothing of KVM and calls no device: the run
loop asks `find`, subtracts `claim.base`, and calls the device with offset, size and value.

Ports are a space of 64 KiB of their own (Intel SDM vol. 1, "Input/Output"; AMD APM vol. 1,
sec. 3.8); MMIO is guest-physical memory that no RAM is behind, up to the 52 bits
of a physical address (Intel SDM vol. 3, sec. 4.1.4; AMD APM vol. 2, sec. 5.3).
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeGuard, runtime_checkable

from .errors import AddressError, ConfigError, DeviceError, OverlapError

__all__ = [
    "Bus",
    "Claim",
    "Device",
    "FunctionDevice",
    "Stateful",
    "Unclaimed",
    "check_device",
    "check_place",
    "has_state",
    "ones",
]

AccessFunction = Callable[[int, int, int | None], int | None]


def ones(size: int) -> int:
    """Return `size` bytes of all ones, what a read gives when no device drives the bus."""
    return (1 << (8 * size)) - 1


class Device(Protocol):
    """What answers accesses: anything with a name, a `read` and a `write`.

    `offset` counts bytes from the claim's base; `size` is 1, 2 or 4 bytes at a port and 1 to
    8 at an MMIO address. An access may begin inside of a claim and run past its end.
    """

    @property
    def name(self) -> str:
        """What messages and reports call the device."""

    def read(self, offset: int, size: int) -> int:
        """Return the value read: at least 0 and less than `1 << 8 * size`."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Take the `value` written, which fits in `size` bytes."""


@runtime_checkable
class Stateful(Protocol):
    """What a device has whose state is a part of snapshots; others are taken to have none."""

    def save_state(self) -> bytes:
        """Return the state, in whatever form `load_state` understands, now and later."""

    def load_state(self, state: bytes) -> None:
        """Take a state that `save_state` gave, here or in another process."""


def has_state(device: object) -> TypeGuard[Stateful]:
    """Whether a device is a `Stateful` one; isinstance() takes ten times as long."""
    return hasattr(device, "save_state") and hasattr(device, "load_state")


def check_device(device: object, name: str | None = None) -> None:
    """Raise ConfigError for what is no device; with a `name`, it needs none of its own."""
    what = getattr(device, "__name__", None) or repr(device)[:80]
    if isinstance(device, type):
        raise ConfigError(f"{what} is a class: attach an instance, {what}()")
    needed = ("read", "write") if name is not None else ("name", "read", "write")
    missing = [part for part in needed if not hasattr(device, part)]
    if missing and callable(device):
        raise ConfigError(f"{what} is a function: on_port and on_mmio make devices of functions")
    if missing:
        raise ConfigError(
            f"{what} is no device, without {' and '.join(missing)}: a device has a name, "
            "read(offset, size) and write(offset, size, value)"
        )


def check_place(kind: str, base: object, size: object) -> None:
    """Raise ConfigError for a place on a bus that is not given in integers."""
    for what, given in (("address", base), ("size", size)):
        if not hasattr(given, "__index__"):
            raise ConfigError(f"{kind} {what} {given!r:.80}: give an int")


class FunctionDevice:
    """A device made from one function `f(offset, size, value)`.

    On a read `value` is None and what the function returns is the answer; on a write `value`
    is an int and what it returns is ignored. The function's name is the device's name.
    """

    def __init__(self, function: AccessFunction) -> None:
        self.function = function
        self.name: str = getattr(function, "__name__", type(function).__name__)

    def read(self, offset: int, size: int) -> int:
        """Return the function's answer; raise DeviceError where it returns None."""
        value = self.function(offset, size, None)
        if value is None:
            raise DeviceError(
                f"{self.name} answered a read of {size} bytes at offset {offset:#x} with None: "
                "return an int where value is None"
            )
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Hand the value written to the function."""
        self.function(offset, size, value)


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """A range of addresses that one device answers: `size` of them from `base` on.

    Claims are compared by identity, so that detaching one never takes away its twin.
    """

    base: int
    size: int
    device: Device
    name: str

    @property
    def end(self) -> int:
        """The first address after the range."""
        return self.base + self.size

    def __str__(self) -> str:
        return f"{_span(self.base, self.size)} of {self.name}"


class Bus:
    """An address space of `limit` addresses, in which devices hold ranges that never overlap.

    `kind` ("port" or "MMIO") is the word that messages use for an address. Iteration gives
    the claims in order of their addresses.
    """

    def __init__(self, kind: str, limit: int) -> None:
        self.kind = kind
        self.limit = limit
        # Parallel tuples: bisect on plain ints is what makes `find` fast. Both are replaced at
        # once, so that `find` can be called while another thread attaches.
        self._table: tuple[tuple[int, ...], tuple[Claim, ...]] = ((), ())

    def attach(self, base: int, size: int, device: Device, name: str | None = None) -> Claim:
        """Give the addresses `base` to `base + size - 1` to `device` and return the claim.

        `name` replaces the device's own in messages. Raises AddressError where the range is
        empty or leaves the bus, and OverlapError where another device holds a part of it.
        """
        check_place(self.kind, base, size)
        check_device(device, name)
        claim = Claim(base, size, device, device.name if name is None else name)
        if size <= 0:
            raise AddressError(
                f"{self.kind} {base:#x} for {claim.name}: a claim of {size} addresses is empty; "
                "claim at least 1"
            )
        if base < 0 or claim.end > self.limit:
            raise AddressError(
                f"{self.kind} {claim} lies outside of the bus: "
                f"choose addresses from 0x0 to {self.limit - 1:#x}"
            )
        bases, claims = self._table
        index = bisect_right(bases, base)
        for other in claims[max(index - 1, 0) : index + 1]:
            if other.base < claim.end and base < other.end:
                raise OverlapError(
                    f"{self.kind} {claim} overlaps {other}: "
                    "choose another base, or detach what is there"
                )
        self._table = (
            (*bases[:index], base, *bases[index:]),
            (*claims[:index], claim, *claims[index:]),
        )
        return claim

    def detach(self, claim: Claim) -> None:
        """Take a claim away again; raises AddressError where this bus does not hold it."""
        if self.find(claim.base) is not claim:
            raise AddressError(
                f"{self.kind} {claim} is not attached to this bus: nothing to detach"
            )
        bases, claims = self._table
        index = bisect_right(bases, claim.base) - 1
        self._table = (bases[:index] + bases[index + 1 :], claims[:index] + claims[index + 1 :])

    def find(self, address: int) -> Claim | None:
        """Return the claim that holds `address`, or None."""
        bases, claims = self._table
        index = bisect_right(bases, address) - 1
        if index >= 0:
            claim = claims[index]
            if address < claim.end:
                return claim
        return None

    def __iter__(self) -> Iterator[Claim]:
        return iter(self._table[1])

    def __len__(self) -> int:
        return len(self._table[1])


class Unclaimed:
    """Counts the accesses that no device claimed, by address, size and direction.

    A guest that sweeps its address space must not fill the host's memory: after
    `MAX_DISTINCT` different accesses, new ones are counted in `total` and `other` only.
    """

    MAX_DISTINCT = 4096

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.total = 0
        self.other = 0
        self.accesses: dict[tuple[int, int, bool], int] = {}

    def count(self, address: int, size: int, is_write: bool, times: int = 1) -> None:
        """Count `times` accesses of `size` bytes at `address`."""
        self.total += times
        key = (address, size, is_write)
        if key in self.accesses:
            self.accesses[key] += times
        elif len(self.accesses) < self.MAX_DISTINCT:
            self.accesses[key] = times
        else:
            self.other += times

    @property
    def reads(self) -> dict[int, int]:
        """How many reads there were, by address."""
        return self._by_address(is_write=False)

    @property
    def writes(self) -> dict[int, int]:
        """How many writes there were, by address."""
        return self._by_address(is_write=True)

    def lines(self) -> list[str]:
        """Return a report in order of address, such as "port 0x1234: 3 writes, 1 read"."""
        reads, writes = self.reads, self.writes
        lines = []
        for address in sorted(reads.keys() | writes.keys()):
            counts = ((writes.get(address, 0), "write"), (reads.get(address, 0), "read"))
            parts = [_plural(count, what) for count, what in counts if count]
            lines.append(f"{self.kind} {address:#x}: {', '.join(parts)}")
        if self.other:
            lines.append(f"other {self.kind} addresses: {_plural(self.other, 'access')}")
        return lines

    def clear(self) -> None:
        """Start counting from zero."""
        self.total = self.other = 0
        self.accesses.clear()

    def _by_address(self, *, is_write: bool) -> dict[int, int]:
        counts: dict[int, int] = {}
        for (address, _, direction), count in self.accesses.items():
            if direction == is_write:
                counts[address] = counts.get(address, 0) + count
        return counts


def _plural(count: int, what: str) -> str:
    ending = "" if count == 1 else "es" if what.endswith("s") else "s"
    return f"{count} {what}{ending}"


def _span(base: int, size: int) -> str:
    return f"{base:#x}" if size == 1 else f"{base:#x}-{base + size - 1:#x}"
