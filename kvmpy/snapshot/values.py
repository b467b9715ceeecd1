"""All of a snapshot but its RAM, as named byte strings, and back, with every size checked."""

import json
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from kvmpy.abi import IOCTLS
from kvmpy.errors import SnapshotError
from kvmpy.interrupts import GsiRoute, IrqchipRoute, MsiRoute
from kvmpy.snapshot.config import Attached, Config
from kvmpy.snapshot.cpu import ORDER, CpuState, VmState
from kvmpy.x86.state import CPUIDEntry

__all__ = ["Contents", "contents", "named"]

_CHIP_SIZE: Final = 512
_PIT_SIZE: Final = IOCTLS["GET_PIT2"].size
_CLOCK_SIZE: Final = IOCTLS["GET_CLOCK"].size
_LARGEST_XSAVE: Final = 1 << 16
_MOST_CPUID: Final = 256  # KVM_MAX_CPUID_ENTRIES
_MOST_CPUS: Final = 4096
_SIZE_BYTES: Final = 8
_IRQCHIP_ROUTE: Final = "irqchip"
_MSI_ROUTE: Final = "msi"


class Contents(NamedTuple):
    """What a snapshot has beside its RAM."""

    config: Config
    cpus: tuple[CpuState, ...]
    vm: VmState
    devices: Mapping[str, bytes]
    console: bytes
    entry: int | None
    backend: str
    attached: tuple[Attached, ...] = ()


def named(what: Contents) -> dict[str, bytes]:
    """As byte strings by name; "machine" is JSON, the rest is as KVM and the devices pack it."""
    config = what.config
    facts = {
        **{name: getattr(config, name) for name in Config.__slots__},
        "cpus": len(what.cpus),
        "entry": what.entry,
        "backend": what.backend,
        "routes": None if what.vm.routes is None else [_route(one) for one in what.vm.routes],
    }
    found = {"machine": json.dumps(facts).encode(), "clock": what.vm.clock}
    found |= {f"chip {number}": packed for number, packed in enumerate(what.vm.chips)}
    if what.vm.pit:
        found["pit"] = what.vm.pit
    for number, state in enumerate(what.cpus):
        found |= {f"cpu {number} {name}": packed for name, packed in state.items()}
    found |= {f"device {name}": state for name, state in what.devices.items()}
    for one in what.attached:
        packed = one.size.to_bytes(_SIZE_BYTES, "little") + one.name.encode("utf-8", "replace")
        found[f"attached {one.bus} {one.base:#x}"] = packed
    found["console"] = what.console
    return found


def _route(one: GsiRoute) -> list[Any]:
    if isinstance(one, IrqchipRoute):
        return [_IRQCHIP_ROUTE, one.gsi, one.chip, one.pin]
    return [_MSI_ROUTE, one.gsi, one.address, one.data]


def contents(values: Mapping[str, bytes]) -> Contents:
    """The same back. Raises SnapshotError for what is missing, unknown or of a wrong size."""
    left = dict(values)
    facts = _facts(left.pop("machine", b""))
    config = Config(**{name: facts[name] for name in Config.__slots__})
    cpus: list[dict[str, bytes]] = [{} for _ in range(facts["cpus"])]
    devices: dict[str, bytes] = {}
    attached: list[Attached] = []
    chips: list[bytes] = []
    clock, console = left.pop("clock", b""), left.pop("console", b"")
    pit = left.pop("pit", b"")
    for name, data in left.items():
        kind, _, rest = name.partition(" ")
        cpu = re.fullmatch(r"(\d{1,4}) (\w+)", rest) if kind == "cpu" else None
        if kind == "device":
            devices[rest] = data
        elif kind == "attached":
            attached.append(_attached(rest, data))
        elif kind == "chip" and rest == str(len(chips)) and len(data) == _CHIP_SIZE:
            chips.append(data)
        elif cpu and int(cpu[1]) < len(cpus) and _fits(cpu[2], len(data)):
            cpus[int(cpu[1])][cpu[2]] = data
        else:
            raise SnapshotError(f"is malformed: a value {name[:40]!r} of {len(data)} bytes")
    needed = {*ORDER, "CPUID2"} - (set() if config.irqchip else {"LAPIC"})
    for number, state in enumerate(cpus):
        if missing := needed - state.keys():
            raise SnapshotError(f"is malformed: vCPU {number} has no {min(missing)}")
    if (
        len(clock) != _CLOCK_SIZE
        or len(pit) not in (0, _PIT_SIZE)
        or len(chips) != (3 if config.irqchip == "full" else 0)
        or (pit and config.irqchip != "full")
    ):
        raise SnapshotError("is malformed: the VM's clock or interrupt controllers")
    routes = None if facts["routes"] is None else tuple(map(_unroute, facts["routes"]))
    vm = VmState(clock, tuple(chips), pit, routes)
    return Contents(
        config, tuple(cpus), vm, devices, console, facts["entry"], facts["backend"], tuple(attached)
    )


def _attached(where: str, data: bytes) -> Attached:
    found = re.fullmatch(r"(port|MMIO) 0x([0-9a-f]{1,16})", where)
    size = int.from_bytes(data[:_SIZE_BYTES], "little")
    if not found or not size or len(data) < _SIZE_BYTES:
        raise SnapshotError(f"is malformed: a device attached at {where[:40]!r}")
    name = data[_SIZE_BYTES:].decode("utf-8", "replace")
    return Attached(found[1], int(found[2], 16), size, name)


def _fits(name: str, size: int) -> bool:
    """Whether a vCPU's state of that name can have that size."""
    if name == "MSRS":
        return size % 16 == 0
    if name == "CPUID2":
        return size % CPUIDEntry.SIZE == 0 and size <= _MOST_CPUID * CPUIDEntry.SIZE
    if name == "XSAVE":
        return 4096 <= size <= _LARGEST_XSAVE
    return name in ORDER and size == IOCTLS[f"GET_{name}"].size


def _facts(data: bytes) -> dict[str, Any]:
    kinds: dict[str, tuple[type, ...]] = {
        "mode": (str,), "ring": (int,), "memory": (int,), "irqchip": (str, type(None)),
        "strict": (bool,), "posted_console": (bool,), "devices": (bool,), "cpus": (int,),
        "entry": (int, type(None)), "backend": (str,), "routes": (list, type(None)),
    }  # fmt: skip
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict) or facts.keys() != kinds.keys():
        raise SnapshotError("is malformed: its description of the machine")
    for name, value in facts.items():
        if type(value) not in kinds[name]:
            raise SnapshotError(f"is malformed: {name} of the machine is {str(value)[:40]!r}")
        if type(value) is int and not 0 <= value < 1 << 63:
            raise SnapshotError(f"is malformed: {name} of the machine is out of range")
    if not 1 <= facts["cpus"] <= _MOST_CPUS or facts["irqchip"] not in (None, "split", "full"):
        raise SnapshotError("is malformed: the number of vCPUs, or the irqchip")
    return facts


def _unroute(one: object) -> GsiRoute:
    if isinstance(one, list) and len(one) == 4:
        kind, *numbers = one
        if all(type(number) is int and 0 <= number < 1 << 64 for number in numbers):
            if kind == _IRQCHIP_ROUTE:
                return IrqchipRoute(*numbers)
            if kind == _MSI_ROUTE:
                return MsiRoute(*numbers)
    raise SnapshotError("is malformed: a route of an interrupt")
