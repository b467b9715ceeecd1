"""Who answers an access: the two buses of a machine, and the C loop's routes made from them.

The C loop hands an access over as one number (csrc/loop.h). `served` maps that number to the
function to call, filled when an access of its kind is first seen, so that an exit costs one
dict lookup.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias

from kvmpy.abi import ffi, lib
from kvmpy.bus import Bus, Claim, Device, FunctionDevice, Unclaimed, ones
from kvmpy.devices.native import Capture, Constant, Counter, NativeDevice, Sink
from kvmpy.errors import ConfigError, DeviceError, OverlapError

__all__ = ["Dispatch", "Served", "bad_answer"]

MMIO_LIMIT: Final = 1 << 52
_PORT, _MMIO, _WRITE = lib.KVMPY_PORT, lib.KVMPY_MMIO, lib.KVMPY_WRITE
_SHIFT = lib.KVMPY_SIZE_SHIFT
_KINDS: Final[tuple[tuple[type[NativeDevice], int], ...]] = (
    (Sink, lib.KVMPY_SINK),
    (Constant, lib.KVMPY_CONSTANT),
    (Capture, lib.KVMPY_CAPTURE),
    (Counter, lib.KVMPY_COUNTER),
)

Stop: TypeAlias = Callable[[str], None]


class Served(NamedTuple):
    """How to serve one kind of access: `function(offset, size[, value])`.

    `offset` is None for MMIO, where it differs from access to access. `limit` is the largest
    value that a read may give.
    """

    function: Callable[..., Any]
    offset: int | None
    size: int
    limit: int
    name: str


class Dispatch:
    """Ports and MMIO of one machine. `on_unclaimed` is called for each access nobody claims,
    with a description of it."""

    def __init__(self, on_unclaimed: Stop | None = None) -> None:
        self.ports = Bus("port", 1 << 16)
        self.mmio = Bus("MMIO", MMIO_LIMIT)
        self.unclaimed = {bus: Unclaimed(bus.kind) for bus in (self.ports, self.mmio)}
        self.served: dict[int, Served] = {}
        self._on_unclaimed = on_unclaimed
        self._rows: list[Claim | None] = [None]
        # C reads these while a guest runs on another thread: what is replaced is kept.
        self._kept: list[object] = []
        self._port_table = ffi.new("uint16_t[65536]")
        self._actions = ffi.new("struct kvmpy_action[]", lib.KVMPY_MAX_ROWS)
        self._free = list(range(lib.KVMPY_MAX_ROWS - 1, 0, -1))
        self._native: dict[Claim, int] = {}
        self.routes: Any = ffi.new("struct kvmpy_routes *")
        """What the C loop looks at."""
        self.routes.ports = self._port_table
        self.routes.actions = self._actions

    def attach(self, bus: Bus, base: int, size: int, device: Device, name: str | None) -> Claim:
        """Claim addresses of a bus for a device, in C where the device is one of C's."""
        if bus is self.mmio and len(bus) + 1 >= lib.KVMPY_MAX_ROWS:
            raise ConfigError(f"more than {lib.KVMPY_MAX_ROWS - 1} MMIO claims")
        if isinstance(device, NativeDevice) and device.backing is not None:
            raise OverlapError(f"{device.name} is attached already: make another one")
        claim = bus.attach(base, size, device, name)
        if isinstance(device, NativeDevice):
            self._make_action(claim, device)
        self._rebuild(bus)
        return claim

    def detach(self, bus: Bus, claim: Claim) -> None:
        """Take a claim back; what C collected for the device stays with the device."""
        bus.detach(claim)
        number = self._native.pop(claim, 0)
        if bus is self.ports and number:
            for port in range(claim.base, claim.end):
                self._port_table[port] = 0
        self._rebuild(bus)
        if number:
            claim.device.release()  # type: ignore[attr-defined]
            self._actions[number].kind = lib.KVMPY_TO_PYTHON
            self._free.append(number)

    def release(self) -> None:
        """Give the devices that C serves what it holds for them, before it goes away."""
        for claim in list(self._native):
            claim.device.release()  # type: ignore[attr-defined]

    def _make_action(self, claim: Claim, device: NativeDevice) -> None:
        if not self._free:
            raise ConfigError(f"more than {lib.KVMPY_MAX_ROWS - 1} claims served in C")
        number = self._free.pop()
        action = self._actions + number
        action.kind = next(kind for cls, kind in _KINDS if isinstance(device, cls))
        action.value = device.value if isinstance(device, Constant) else 0
        action.reads = action.writes = action.length = action.capacity = 0
        buffer = None
        if isinstance(device, Capture):
            buffer = ffi.new("uint8_t[]", device.capacity)
            action.buffer, action.capacity = buffer, device.capacity
        self._native[claim] = number
        device.backing = _Backing(action, buffer, self._actions)

    def _rebuild(self, bus: Bus) -> None:
        """Bring the C loop's tables up to date with a bus."""
        self.served.clear()
        if bus is self.ports:
            for claim, number in self._native.items():
                if bus.find(claim.base) is claim:
                    for port in range(claim.base, claim.end):
                        self._port_table[port] = number
            return
        claims = list(bus)
        self._rows = [None, *claims]
        ranges = ffi.new("struct kvmpy_range[]", max(1, len(claims)))
        for row, claim in enumerate(claims, 1):
            fields = (claim.base, claim.end, row, self._native.get(claim, 0))
            ranges[row - 1].start, ranges[row - 1].end = fields[:2]
            ranges[row - 1].row, ranges[row - 1].action = fields[2:]
        self._kept += [ranges]
        self.routes.range_count = 0  # between the two, every MMIO access goes to Python
        self.routes.ranges = ranges
        self.routes.range_count = len(claims)

    def resolve(self, code: int) -> Served:
        """What serves the accesses of one number of the C loop's; remembered in `served`."""
        write = bool(code & _WRITE)
        offset: int | None
        if code & _PORT:
            bus, port = self.ports, code & 0xFFFF
            size = 1 << (code >> _SHIFT & 3)
            claim = bus.find(port)
            offset = port - (claim.base if claim else 0)
        else:
            bus, offset = self.mmio, None
            size = code >> _SHIFT - 4 & 0xF
            claim = self._rows[code & lib.KVMPY_MAX_ROWS - 1]
        function = self._function(bus, claim, write)
        served = Served(function, offset, size, ones(size), claim.name if claim else "nobody")
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
        self._function(bus, claim, True)(address - (claim.base if claim else 0), size, value)

    def read(self, bus: Bus, address: int, size: int) -> int:
        """Serve one read; DeviceError for an answer that is no value of that size."""
        claim = bus.find(address)
        value = self._function(bus, claim, False)(address - (claim.base if claim else 0), size)
        if not isinstance(value, int) or not 0 <= value <= ones(size):
            raise bad_answer(claim.name if claim else "nobody", address, size, value)
        return value


def bad_answer(name: str, address: int, size: int, value: object) -> DeviceError:
    """The exception for a read answered with something that is no value of its size."""
    shown = f"{value:#x}" if isinstance(value, int) else repr(value)
    return DeviceError(
        f"device {name} answered a {size}-byte read at {address:#x} with {shown}: "
        f"return an int of 0 to {ones(size):#x}"
    )


class _Backing:
    """What C holds for one device (see `devices.native.Backing`)."""

    def __init__(self, action: Any, buffer: Any, owner: object) -> None:
        self._action, self._buffer, self._owner = action, buffer, owner

    def hits(self) -> int:
        return int(self._action.reads + self._action.writes)

    def take(self) -> bytes:
        room = ffi.new("uint8_t[]", int(self._action.capacity))
        count = lib.kvmpy_take(self._action, room, len(room))
        return bytes(ffi.buffer(room, count))
