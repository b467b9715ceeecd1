"""What a guest under test and its tester agree on: inputs, coverage, endings, fresh randomness.

The registers are of 8 bytes, little-endian, and are read and written in pieces as well; a write
of any size to READY, CRASH or DONE ends the run. docs/harness.md has them as a table.
"""

import os
import struct
from collections.abc import Callable, Iterator
from enum import IntEnum
from itertools import count, repeat
from typing import Final, Protocol

from ..bus import Claim, Device, ones
from ..errors import AddressError, ConfigError
from .native import EndRun

__all__ = ["ADDRESS", "IDENTITY", "SIZE", "Entropy", "Harness", "Offset"]

ADDRESS: Final = 0xD0010000
"""Where the registers are, unless the harness is told another address or port."""

IDENTITY: Final = int.from_bytes(b"kvmpyHRN", "little")
"""What the register IDENTITY reads as; all ones say that there is no harness."""


class Offset(IntEnum):
    """The registers' offsets."""

    IDENTITY = 0x00
    BUFFER = 0x08
    BUFFER_SIZE = 0x10
    MAP = 0x18
    MAP_SIZE = 0x20
    ENTROPY = 0x28
    GENERATION = 0x30
    READY = 0x38
    CRASH_ADDRESS = 0x40
    CRASH = 0x48
    DONE = 0x50


SIZE: Final = 0x58
_KEPT: Final = (
    Offset.BUFFER,
    Offset.BUFFER_SIZE,
    Offset.MAP,
    Offset.MAP_SIZE,
    Offset.READY,
    Offset.CRASH_ADDRESS,
)
_STATE: Final = struct.Struct(f"<{len(_KEPT)}Q")


class _Machine(Protocol):
    def attach_port(self, base: int, size: int, device: Device) -> Claim: ...
    def attach_mmio(self, base: int, size: int, device: Device) -> Claim: ...
    def end_run(self, outcome: str, detail: str = "", value: int | None = None) -> None: ...


class Entropy:
    """Where generations come from: a number, and bytes, for each time that a guest is copied.

    They are the host's (os.urandom) unless there is a `seed`: then the first generation that is
    asked for is the same in every process, and so is the second. Harnesses that share one of these
    never have the same one. With `fixed`, all generations are alike: for fuzzing, where an input
    has to do what it did before. A copy begins with the first generation: so do the worker
    processes of `kvmpy.map`, each of which has one.
    """

    def __init__(self, seed: int | None = None, *, fixed: bool = False) -> None:
        if fixed and seed is None:
            raise ConfigError("fixed entropy takes a seed: give one")
        self.seed, self.fixed = seed, fixed
        # next() of these is safe among threads.
        self._numbers: Iterator[int] = repeat(0) if fixed else count(1)

    def __reduce__(self) -> tuple[object, ...]:
        return _entropy, (self.seed, self.fixed)  # iterators are not for pickling

    def renew(self) -> Callable[[int], bytes]:
        """Begin a generation: a function that gives so many bytes of it, others each time."""
        if self.seed is None:
            return os.urandom
        from random import Random  # not the fastest to load

        return Random(f"kvmpy {self.seed} {next(self._numbers)}").randbytes


def _entropy(seed: int | None, fixed: bool) -> Entropy:
    return Entropy(seed, fixed=fixed)


class Harness:
    """The device by which a guest takes inputs, and tells what became of them.

    Attach it with `attach`, to the machine that makes itself ready, and then to those that are
    made from its snapshot (`attach=harness.attach`). `buffer`, `buffer_size` and `coverage` are
    what the guest said, `ready` whether it is. A run ends with the outcome "ready", with "ended"
    and the guest's status as its value, or with "crash" and a code.

    Each restore, reset and copy of a machine begins a generation: GENERATION reads as another
    number, and ENTROPY gives other bytes than those that any copy has had.

    It can be copied and pickled, also while it is attached: the copy knows what the guest said, and
    is attached to no machine.
    """

    name = "harness"

    def __init__(
        self,
        entropy: Entropy | None = None,
        *,
        address: int = ADDRESS,
        port: int | None = None,
    ) -> None:
        self.entropy = entropy or Entropy()
        self.address, self.port = address, port
        self._end: Callable[[str, str, int], object] | None = None
        self._values = dict.fromkeys(_KEPT, 0)
        self._bytes: Callable[[int], bytes] | None = None
        self._generation: int | None = None

    def attach(self, machine: _Machine) -> None:
        """Attach it to a machine: at its port, if it was given one, or else at its address."""
        done = EndRun()
        self._end = machine.end_run
        if self.port is None:
            machine.attach_mmio(self.address, Offset.DONE, self)
            machine.attach_mmio(self.address + Offset.DONE, SIZE - Offset.DONE, done)
        else:
            machine.attach_port(self.port, Offset.DONE, self)
            machine.attach_port(self.port + Offset.DONE, SIZE - Offset.DONE, done)

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_end": None, "_bytes": None, "_generation": None} | {
            "_values": dict(self._values)
        }

    # What the guest said ---------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether the guest said that it is ready."""
        return self._values[Offset.READY] != 0

    @property
    def buffer(self) -> int:
        """The guest-physical address for inputs: 8 bytes of length, and the input after them."""
        return self._values[Offset.BUFFER]

    @property
    def buffer_size(self) -> int:
        """The size of the buffer in bytes; the longest input has 8 bytes less."""
        return self._values[Offset.BUFFER_SIZE]

    @property
    def coverage(self) -> tuple[int, int] | None:
        """Address and size of the coverage map, for `collect` of `runs`; None if there is none."""
        size = self._values[Offset.MAP_SIZE]
        return (self._values[Offset.MAP], size) if size else None

    def pack(self, data: bytes) -> bytes:
        """An input as the guest's buffer has it; AddressError for one that is too long."""
        if 8 + len(data) > self.buffer_size:
            raise AddressError(
                f"an input of {len(data)} bytes does not fit into the guest's buffer of "
                f"{self.buffer_size} at {self.buffer:#x}, with 8 for its length"
            )
        return len(data).to_bytes(8, "little") + data

    # Generations -----------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """The number of this generation, of 64 bits."""
        if self._generation is None:
            self.random(0)
        assert self._generation is not None
        return self._generation

    def random(self, size: int) -> bytes:
        """Fresh bytes, as the guest gets them."""
        if self._bytes is None:
            self._bytes = self.entropy.renew()
            self._generation = int.from_bytes(self._bytes(8), "little")
        return self._bytes(size)

    # The device ------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Return a register, or a part of it."""
        register, byte = offset & ~7, offset & 7
        if register == Offset.ENTROPY:
            return int.from_bytes(self.random(size), "little")
        if register == Offset.IDENTITY:
            value = IDENTITY
        elif register == Offset.GENERATION:
            value = self.generation
        else:
            value = self._values.get(Offset(register), 0)
        return value >> 8 * byte & ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a register's value, or a part of it; end the run where that is what it is for."""
        register, shift = Offset(offset & ~7), 8 * (offset & 7)
        if register == Offset.READY:
            self._values[register] = 1
            self._ends("ready", "", value)
        elif register == Offset.CRASH:
            where = self._values[Offset.CRASH_ADDRESS]
            self._ends("crash", f"code {value}" + (f" at {where:#x}" if where else ""), value)
        elif register in self._values:
            kept = self._values[register] & ~(ones(size) << shift)
            self._values[register] = (kept | value << shift) & ones(8)

    def _ends(self, outcome: str, detail: str, value: int) -> None:
        if self._end is not None:
            self._end(outcome, detail, value)

    def save_state(self) -> bytes:
        """What the guest said; not the generation, which no copy shares."""
        return _STATE.pack(*(self._values[register] for register in _KEPT))

    def load_state(self, state: bytes) -> None:
        """Take what `save_state` gave, and begin a generation."""
        self._values.update(zip(_KEPT, _STATE.unpack(state), strict=True))
        self._bytes = self._generation = None
