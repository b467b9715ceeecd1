"""Who answers an access: the two buses of a machine, and the C loop's routes made from them.

The C loop hands an access over as one number (csrc/loop.h). `served` maps that number to the
function to call, filled when an access of its kind is first seen, so that an exit costs one
dict lookup.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from operator import index
from threading import RLock
from typing import Any, Final, TypeAlias

from kvmpy.abi import ffi, lib
from kvmpy.bus import Bus, Claim, Device, FunctionDevice, Unclaimed, ones
from kvmpy.devices.native import Capture, Constant, Counter, EndRun, NativeDevice, Sink
from kvmpy.errors import ConfigError, DeviceError, OverlapError

__all__ = ["NO_ROUTES", "Dispatch", "Served", "add_note", "bad_answer"]

MMIO_LIMIT: Final = 1 << 52
_PORT, _MMIO, _WRITE = lib.KVMPY_PORT, lib.KVMPY_MMIO, lib.KVMPY_WRITE
_SHIFT = lib.KVMPY_SIZE_SHIFT
_KINDS: Final[tuple[tuple[type[NativeDevice], int], ...]] = (
    (Sink, lib.KVMPY_SINK),
    (Constant, lib.KVMPY_CONSTANT),
    (Capture, lib.KVMPY_CAPTURE),
    (Counter, lib.KVMPY_COUNTER),
    (EndRun, lib.KVMPY_END),
)

# What a machine without devices in C looks at, and never writes to. Of full size: C may read
# one of a machine's own tables together with the other one of these.
_NO_PORTS: Final = ffi.new("uint16_t[65536]")
_NO_ACTIONS: Final = ffi.new("struct kvmpy_action[]", lib.KVMPY_MAX_ROWS)

_NO_RANGES: Final = ffi.new("struct kvmpy_ranges *", (0, []))
NO_ROUTES: Final = ffi.new("struct kvmpy_routes *", (_NO_PORTS, _NO_RANGES, _NO_ACTIONS, 0))
"""What the C loop looks at where there is no `Dispatch` yet: every access is Python's."""

Stop: TypeAlias = Callable[[str], None]


Served: TypeAlias = tuple[Callable[..., Any], int | None, int, int | None, str]
"""How to serve one kind of access: (function, offset, size, limit, name of the device).

It is served by `function(offset, size[, value])`. The offset is None for MMIO, where it
differs from access to access; the limit is the largest value that a read may give, and None
for a write. A plain tuple, since the hot path takes it apart: a named one is 5 times slower.
"""


class _Numbers:
    """The numbers from `first` up to KVMPY_MAX_ROWS - 1, to be taken and given back.

    False when all are taken. What was given back rests until there is no fresh one left.
    """

    def __init__(self, first: int = 1) -> None:
        self._fresh = first
        self._resting: deque[int] = deque()

    def __bool__(self) -> bool:
        return self._fresh < lib.KVMPY_MAX_ROWS or bool(self._resting)

    def take(self) -> int:
        if self._fresh == lib.KVMPY_MAX_ROWS:
            return self._resting.popleft()
        self._fresh += 1
        return self._fresh - 1

    def give(self, number: int) -> None:
        self._resting.append(number)


class Dispatch:
    """Ports and MMIO of one machine. `on_unclaimed` is called for each access nobody claims,
    with a description of it."""

    def __init__(
        self,
        on_unclaimed: Stop | None = None,
        on_end: Callable[[int], object] | None = None,
    ) -> None:
        self.ports = Bus("port", 1 << 16)
        self.mmio = Bus("MMIO", MMIO_LIMIT)
        self.unclaimed = {bus: Unclaimed(bus.kind) for bus in (self.ports, self.mmio)}
        self.served: dict[int, Served] = {}
        self.posting = RLock()
        """Held while writes are taken out of the coalesced ring, which all vCPUs share."""
        self.standard: frozenset[Claim] = frozenset()
        """Those claims that every machine of its kind has."""
        self._on_unclaimed, self._on_end = on_unclaimed, on_end
        self._lock = RLock()
        # A claim keeps its row and its action for as long as it lasts, and then they rest: a
        # guest may be running on another thread, with an access in its hands.
        self._rows: dict[int, Claim] = {}
        self._row_of: dict[Claim, int] = {}
        self._free_rows = _Numbers()
        self._free = _Numbers()
        self._generation = 0  # of the claims; counts attachments and detachments
        self._loops: list[Any] = []
        # Ranges that C may be looking at still: how often each of its loops, that was in use when
        # they were replaced, had entered the guest by then.
        self._replaced: list[tuple[object, list[tuple[Any, int]]]] = []
        self._ranges: object = None
        self._port_table, self._actions = _NO_PORTS, _NO_ACTIONS
        self._native: dict[Claim, int] = {}
        self.routes: Any = ffi.new("struct kvmpy_routes *")
        """What the C loop looks at."""
        self.routes.ports = self._port_table
        self.routes.actions = self._actions
        self._rebuild(self.mmio)

    def lead(self, loop: Any) -> None:
        """Have the C loop of a vCPU look here."""
        self._loops.append(loop)
        loop.routes = self.routes

    def own(self) -> Iterator[tuple[Bus, Claim]]:
        """The claims of devices beyond the standard ones."""
        for bus in (self.ports, self.mmio):
            yield from ((bus, claim) for claim in bus if claim not in self.standard)

    @property
    def any_unclaimed(self) -> bool:
        """Whether there was any access that nobody claimed."""
        return any(one.total for one in self.unclaimed.values())

    def attach(
        self, bus: Bus, base: int, size: int, device: Device, name: str | None = None
    ) -> Claim:
        """Claim addresses of a bus for a device, in C where the device is one of C's."""
        with self._lock:
            if bus is self.mmio and not self._free_rows:
                raise ConfigError(f"more than {lib.KVMPY_MAX_ROWS - 1} MMIO claims")
            if isinstance(device, NativeDevice) and device.backing is not None:
                raise OverlapError(f"{device.name} is attached already: make another one")
            if isinstance(device, NativeDevice) and not self._free:
                raise ConfigError(f"more than {lib.KVMPY_MAX_ROWS - 1} claims served in C")
            claim = bus.attach(base, size, device, name)
            if bus is self.mmio:
                self._row_of[claim] = row = self._free_rows.take()
                self._rows[row] = claim
            if isinstance(device, NativeDevice):
                self._make_action(claim, device)
            self._rebuild(bus)
            return claim

    def detach(self, bus: Bus, claim: Claim) -> None:
        """Take a claim back; what C collected for the device stays with the device."""
        with self._lock:
            bus.detach(claim)
            number = self._native.pop(claim, 0)
            if bus is self.ports and number:
                for port in range(claim.base, claim.end):
                    self._port_table[port] = 0
            elif bus is self.mmio:
                row = self._row_of.pop(claim)
                del self._rows[row]
                self._free_rows.give(row)
            self._rebuild(bus)
            if number:
                self._actions[number].kind = lib.KVMPY_TO_PYTHON
                self._actions[number].capacity = 0  # from here on nothing fits
                claim.device.release()  # type: ignore[attr-defined]
                self._free.give(number)

    def release(self) -> None:
        """Give the devices that C serves what it holds for them, before it goes away."""
        for claim in list(self._native):
            claim.device.release()  # type: ignore[attr-defined]

    def _own_tables(self) -> None:
        """Make tables for this machine's own devices in C; most machines have none."""
        self._port_table = ffi.new("uint16_t[65536]")
        self._actions = ffi.new("struct kvmpy_action[]", lib.KVMPY_MAX_ROWS)
        self.routes.actions = self._actions
        self.routes.ports = self._port_table

    def _make_action(self, claim: Claim, device: NativeDevice) -> None:
        if self._actions is _NO_ACTIONS:
            self._own_tables()
        number = self._free.take()
        action = self._actions + number
        action.value = device.value if isinstance(device, Constant) else 0
        action.reads = action.writes = action.length = action.capacity = 0
        buffer = None
        if isinstance(device, Capture):
            buffer = ffi.new("uint8_t[]", device.capacity)
            action.buffer, action.capacity = buffer, device.capacity
        if isinstance(device, EndRun):
            device.on_end = self._on_end
        action.kind = next(kind for cls, kind in _KINDS if isinstance(device, cls))
        self._native[claim] = number
        device.backing = _Backing(action, buffer, self._actions)

    def _rebuild(self, bus: Bus) -> None:
        """Bring the C loop's tables up to date with a bus."""
        self._generation += 1
        self.served.clear()
        self.routes.generation = self._generation & 0xFFFFFFFF
        if bus is self.ports:
            for claim, number in self._native.items():
                if bus.find(claim.base) is claim:
                    for port in range(claim.base, claim.end):
                        self._port_table[port] = number
            return
        rows = [
            (claim.base, claim.end, self._row_of[claim], self._native.get(claim, 0))
            for claim in bus
        ]
        ranges = ffi.new("struct kvmpy_ranges *", (len(rows), rows))
        before, self._ranges = self._ranges, ranges
        self.routes.ranges = ranges
        users = [(loop, loop.entries) for loop in self._loops if lib.kvmpy_in_use(loop)]
        kept = [one for one in self._replaced if any(map(_looks_still, one[1]))]
        self._replaced = [*kept, (before, users)]

    def resolve(self, code: int) -> Served:
        """What serves the accesses of one number of the C loop's; remembered in `served`."""
        write, generation = bool(code & _WRITE), self._generation
        offset: int | None
        if code & _PORT:
            bus, port = self.ports, code & 0xFFFF
            size = 1 << (code >> _SHIFT & 3)
            claim = bus.find(port)
            offset = port - (claim.base if claim else 0)
        else:
            bus, offset = self.mmio, None
            size = code >> _SHIFT - 4 & 0xF
            claim = self._rows.get(code & lib.KVMPY_MAX_ROWS - 1)
        function = self._function(bus, claim, write)
        name, limit = claim.name if claim else "nobody", None if write else ones(size)
        served = (function, offset, size, limit, name)
        if generation == self._generation:  # or else it may be out of date
            self.served[code] = served
        return served

    def _function(self, bus: Bus, claim: Claim | None, write: bool) -> Callable[..., Any]:
        if claim is None:
            return self._unclaimed(bus, write)
        device = claim.device
        if not write:
            return device.read
        # One call less on the way to a function that is a device.
        return device.function if isinstance(device, FunctionDevice) else device.write

    def _unclaimed(self, bus: Bus, write: bool) -> Callable[..., Any]:
        unclaimed, report = self.unclaimed[bus], self._on_unclaimed

        def nobody(address: int, size: int, value: int | None = None) -> int:
            unclaimed.count(address, size, write)
            if report is not None:
                what = f"write of {value:#x}" if write else "read"
                report(f"{size}-byte {what} at {bus.kind} {address:#x}, which no device claims")
            return ones(size)

        return nobody

    # The teaching path: the same answers, found without the C loop ---------------------------

    def write(self, bus: Bus, address: int, size: int, value: int) -> None:
        """Serve one write."""
        claim = bus.find(address)
        function = self._function(bus, claim, True)
        try:
            function(address - (claim.base if claim else 0), size, value)
        except Exception as error:
            name = claim.name if claim else "nobody"
            add_note(error, name, f"{bus.kind} {address:#x}", size, True)
            raise

    def read(self, bus: Bus, address: int, size: int) -> int:
        """Serve one read; DeviceError for an answer that is no value of that size."""
        claim = bus.find(address)
        name, function = claim.name if claim else "nobody", self._function(bus, claim, False)
        try:
            value = function(address - (claim.base if claim else 0), size)
        except Exception as error:
            add_note(error, name, f"{bus.kind} {address:#x}", size, False)
            raise
        try:
            if 0 <= value <= ones(size):
                return index(value)
        except TypeError:
            pass
        raise bad_answer(name, address, size, value)


def add_note(error: Exception, name: str, where: str, size: int, write: bool) -> None:
    """Say on a device's exception what the device was serving; `where` is "port 0x10"."""
    kind = "write" if write else "read"
    error.add_note(f"raised by device {name}, serving a {size}-byte {kind} at {where}")


def bad_answer(name: str, address: int, size: int, value: object) -> DeviceError:
    """The exception for a read answered with something that is no value of its size."""
    shown = f"{value:#x}" if isinstance(value, int) else repr(value)
    return DeviceError(
        f"device {name} answered a {size}-byte read at {address:#x} with {shown}: "
        f"return an int of 0 to {ones(size):#x}"
    )


def _looks_still(user: tuple[Any, int]) -> bool:
    """Whether a loop may be serving the exit at which ranges were replaced."""
    loop, entries = user
    # Twice, as an entry may have been counted that this thread had not seen yet.
    return loop.entries < entries + 2 and bool(lib.kvmpy_in_use(loop))


class _Backing:
    """What C holds for one device (see `devices.native.Backing`)."""

    def __init__(self, action: Any, buffer: Any, owner: object) -> None:
        self._action, self._buffer, self._owner = action, buffer, owner
        self._process = os.getpid()

    def hits(self) -> int:
        return int(self._action.reads + self._action.writes)

    def take(self) -> bytes:
        room = ffi.new("uint8_t[]", 0 if self._buffer is None else len(self._buffer))
        child = self._process != os.getpid()
        count = lib.kvmpy_take(self._action, room, len(room), child)
        return bytes(ffi.buffer(room, count))
