"""Devices so plain that the C loop can serve them, without returning to Python.

Each is an ordinary device as well, with the same behaviour from Python: that is how it works
while every exit is traced, and how it is tested. A machine that serves one in C sets its
`backing`; what C has counted and collected is then part of what the device shows.
"""

from collections.abc import Callable
from typing import Protocol

from ..bus import ones
from ..errors import ConfigError

__all__ = ["Backing", "Capture", "Constant", "Counter", "EndRun", "NativeDevice", "Sink"]


class Backing(Protocol):
    """What the C loop holds for one device."""

    def hits(self) -> int:
        """Return how many accesses C has served for the device so far."""

    def take(self) -> bytes:
        """Return the bytes that C has collected since the last call, and empty its buffer."""


class NativeDevice:
    """The base of these devices: reads give all ones, writes are dropped.

    `backing` is None, or what C holds for the device. `release()` must be called before what
    is behind `backing` goes away. The offset of an access makes no difference to any of them.
    """

    name = "native"
    backing: Backing | None = None

    def read(self, offset: int, size: int) -> int:
        """Return all ones."""
        return ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Drop the value."""

    def release(self) -> None:
        """Keep what C has collected so far in Python, and let go of `backing`."""
        self.backing = None

    def __getstate__(self) -> dict[str, object]:
        """A copy, in this process or in another one, is attached to no machine."""
        return {name: value for name, value in vars(self).items() if name not in _OF_A_MACHINE}


_OF_A_MACHINE = frozenset({"backing", "on_end"})


class Sink(NativeDevice):
    """Drops writes and reads as all ones: the cheapest exit there is."""

    name = "sink"


class Constant(NativeDevice):
    """Reads give the low bytes of `value`, as many as the access is wide; writes are dropped.

    `value` is an int of at most 64 bits, with zeros above it; raises ConfigError for another.
    """

    name = "constant"

    def __init__(self, value: int) -> None:
        if not 0 <= value < 1 << 64:
            raise ConfigError(f"constant {value:#x} does not fit in 64 bits: give 0 to 2**64 - 1")
        self.value = value

    def read(self, offset: int, size: int) -> int:
        """Return the constant, cut to `size` bytes."""
        return self.value & ones(size)


class Capture(NativeDevice):
    """Appends the bytes of every write, lowest first; reads give all ones.

    `capacity` is the size in bytes of the buffer that C fills; a write that does not fit is
    left to Python, which empties that buffer first, so that the order is the guest's. What
    is captured grows for as long as the guest writes: `clear()` lets go of it. Raises
    ConfigError where the capacity cannot hold one 8-byte write.
    """

    name = "capture"

    def __init__(self, capacity: int = 65536) -> None:
        if capacity < 8:
            raise ConfigError(f"capture capacity of {capacity} bytes: give at least 8")
        self.capacity = capacity
        self._data = bytearray()

    def data(self) -> bytes:
        """Return everything captured since the start or the last `clear()`."""
        self._collect()
        return bytes(self._data)

    def clear(self) -> None:
        """Forget what was captured."""
        self._collect()
        self._data.clear()

    def write(self, offset: int, size: int, value: int) -> None:
        """Append the value's `size` bytes, after those that C holds."""
        self._collect()
        self._data += value.to_bytes(size, "little")

    def save_state(self) -> bytes:
        """Everything captured."""
        return self.data()

    def load_state(self, state: bytes) -> None:
        """Take what `save_state` gave, in place of what was captured since."""
        self.clear()
        self._data += state

    def release(self) -> None:
        """Keep what C has collected so far in Python, and let go of `backing`."""
        self._collect()
        super().release()

    def __getstate__(self) -> dict[str, object]:
        """With what C has collected; a copy has bytes of its own."""
        return {**super().__getstate__(), "_data": bytearray(self.data())}

    def _collect(self) -> None:
        if self.backing is not None:
            self._data += self.backing.take()


class Counter(NativeDevice):
    """Counts reads and writes in `count`; reads give all ones, writes are dropped."""

    name = "counter"

    def __init__(self) -> None:
        self._count = 0

    @property
    def count(self) -> int:
        """How many accesses there were, from C and from Python."""
        return self._count + (0 if self.backing is None else self.backing.hits())

    def read(self, offset: int, size: int) -> int:
        """Count, and return all ones."""
        self._count += 1
        return ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Count, and drop the value."""
        self._count += 1

    def save_state(self) -> bytes:
        """The count, 8 bytes."""
        return self.count.to_bytes(8, "little")

    def load_state(self, state: bytes) -> None:
        """Take what `save_state` gave."""
        self._count += int.from_bytes(state, "little") - self.count

    def release(self) -> None:
        """Keep C's count in Python, and let go of `backing`."""
        self._count = self.count
        super().release()

    def __getstate__(self) -> dict[str, object]:
        """With what C has counted."""
        return {**super().__getstate__(), "_count": self.count}


class EndRun(NativeDevice):
    """A write ends the run with the outcome "ended" and the value written; reads give all ones.

    The cheapest way for a guest to say that it is done: `kvmpy.runs` then needs no Python between
    one run and the next.
    """

    name = "end of the run"
    on_end: Callable[[int], object] | None = None
    """What ends a run whose exits Python serves; the machine that it is attached to sets it."""

    def write(self, offset: int, size: int, value: int) -> None:
        """End the run."""
        if self.on_end is not None:
            self.on_end(value)
