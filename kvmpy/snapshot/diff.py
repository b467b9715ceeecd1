"""What differs between two snapshots: pages, bytes, registers, devices."""

import struct
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from kvmpy.errors import ConfigError
from kvmpy.kvm import unpack_cpuid
from kvmpy.memory import PAGE_SIZE
from kvmpy.snapshot.cpu import TIME_STAMPS
from kvmpy.x86.registers import Registers
from kvmpy.x86.state import DebugRegisters, SpecialRegisters

if TYPE_CHECKING:
    from kvmpy.snapshot.snapshot import Snapshot

__all__ = ["Difference", "difference", "without_in_use"]

_TYPED: Final[dict[str, Any]] = {
    "REGS": Registers,
    "SREGS": SpecialRegisters,
    "DEBUGREGS": DebugRegisters,
}
_PARTS: Final = ("irqchip", "pit", "routes", "console")
_PIT_CHANNELS: Final = 3
_PIT_CHANNEL: Final = 24  # bytes of a struct kvm_pit_channel_state; its last 8 are a time


@dataclass(frozen=True, slots=True)
class Difference:
    """From one snapshot to another. Each value is a pair: there, and in the other one.

    `pages` are guest-physical addresses of pages; `bytes` counts those that differ in them.
    `registers` have names such as "cpu0.rax", "cpu0.msr 0xc0000080" or, of CPUID's leaf 7,
    subleaf 0, "cpu0.cpuid 0x7.0 ebx"; None is in the place of what one of them has not. State that
    has no names is told by that of its ioctl, "cpu0.XSAVE". Clocks that run on by themselves are
    left out: the TSC and its like, the VM's clock, and when the PIT's counters were loaded.
    `devices` are their states, the in-kernel "irqchip", "pit" and GSI "routes", the "console", and,
    as "port 0x60, attached", devices that only one of the machines had.
    """

    pages: tuple[int, ...]
    bytes: int
    registers: dict[str, tuple[Any, Any]]
    devices: dict[str, tuple[Any, Any]]

    def __bool__(self) -> bool:
        return bool(self.pages or self.registers or self.devices)

    def __str__(self) -> str:
        lines = [
            f"{_counted(len(self.pages), 'page')} differ{'s' * (len(self.pages) == 1)}, in "
            f"{_counted(self.bytes, 'byte')}"
        ]
        lines += [f"  page {page:#x}" for page in self.pages]
        for name, (one, other) in {**self.registers, **self.devices}.items():
            lines.append(f"  {name}: {_shown(one)} -> {_shown(other)}")
        return "\n".join(lines)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:#x}"
    if isinstance(value, bytes):
        return value.hex() if len(value) <= 16 else f"{len(value)} bytes"
    return str(value)


def difference(one: "Snapshot", other: "Snapshot") -> Difference:
    """Compare two snapshots; ConfigError where the machines have other RAM or vCPUs."""
    shapes = [
        ([(image.address, image.size) for image in snapshot.images], len(snapshot.cpus))
        for snapshot in (one, other)
    ]
    if shapes[0] != shapes[1]:
        raise ConfigError("snapshots of machines with other RAM or vCPUs have nothing to compare")
    pages, count = [], 0
    for here, there in zip(one.images, other.images, strict=True):
        for page, old, new in here.differing(there):
            pages.append(here.address + page * PAGE_SIZE)
            changed = int.from_bytes(old, "little") ^ int.from_bytes(new, "little")
            count += PAGE_SIZE - changed.to_bytes(PAGE_SIZE, "little").count(0)
    registers: dict[str, tuple[Any, Any]] = {}
    for number, (before, after) in enumerate(zip(one.cpus, other.cpus, strict=True)):
        for name in dict.fromkeys((*before, *after)):
            for part, pair in _state(name, before.get(name, b""), after.get(name, b"")).items():
                registers[f"cpu{number}.{part}"] = pair
    devices: dict[str, tuple[Any, Any]] = {
        name: (one.devices.get(name, b""), other.devices.get(name, b""))
        for name in dict.fromkeys((*one.devices, *other.devices))
        if one.devices.get(name) != other.devices.get(name)
    }
    for name, before, after in zip(_PARTS, _parts(one), _parts(other), strict=True):
        if before != after:
            devices[name] = (before, after)
    for claim in dict.fromkeys((*one.attached, *other.attached)):
        mine, its = (str(claim) if claim in its.attached else None for its in (one, other))
        if mine != its:
            devices[f"{claim.bus} {claim.base:#x}, attached"] = (mine, its)
    return Difference(tuple(pages), count, registers, devices)


def without_in_use(area: bytes) -> bytes:
    """An XSAVE area without XSTATE_BV (SDM Vol.1 13.4.2).

    Whether a processor takes registers at their initial values for in use is its own affair, and
    changes by itself (13.6); KVM spells out those values.
    """
    return area[:512] + area[520:]


def _parts(snapshot: "Snapshot") -> tuple[Any, ...]:
    vm = snapshot.vm
    return b"".join(vm.chips), _without_time(vm.pit), vm.routes, snapshot.console


def _without_time(pit: bytes) -> bytes:
    """A struct kvm_pit_state2 without the host's time at which each counter was loaded."""
    made = bytearray(pit)
    for channel in range(_PIT_CHANNELS if pit else 0):
        made[channel * _PIT_CHANNEL + 16 : (channel + 1) * _PIT_CHANNEL] = bytes(8)
    return bytes(made)


def _state(name: str, before: bytes, after: bytes) -> dict[str, tuple[Any, Any]]:
    """The parts of one ioctl's struct that differ, by their names."""
    if before == after:
        return {}
    if name == "MSRS":
        one, other = ({i: v for i, _, v in struct.iter_unpack("<IIQ", d)} for d in (before, after))
        return {
            f"msr {index:#x}": (one.get(index), other.get(index))
            for index in dict.fromkeys((*one, *other))
            if one.get(index) != other.get(index) and index not in TIME_STAMPS
        }
    if name == "CPUID2":
        return _leaves(before, after)
    if name == "XSAVE":
        before, after = without_in_use(before), without_in_use(after)
        if before == after:
            return {}
    if name not in _TYPED or not before or not after:
        return {name: (before, after)}
    here, there = _TYPED[name].unpack(before), _TYPED[name].unpack(after)
    return {
        field.name: (getattr(here, field.name), getattr(there, field.name))
        for field in fields(here)
        if getattr(here, field.name) != getattr(there, field.name)
    }


def _leaves(before: bytes, after: bytes) -> dict[str, tuple[Any, Any]]:
    """The answers of CPUID that differ, by leaf, subleaf and register."""
    one, other = (
        {
            f"cpuid {entry.function:#x}.{entry.index} {name}": getattr(entry, name)
            for entry in unpack_cpuid(data)
            for name in ("eax", "ebx", "ecx", "edx", "flags")
        }
        for data in (before, after)
    )
    return {
        name: (one.get(name), other.get(name))
        for name in dict.fromkeys((*one, *other))
        if one.get(name) != other.get(name)
    }
