"""What an access was, in words: which device, which register, which value."""

from collections.abc import Callable
from typing import TypeAlias

from kvmpy.abi import lib
from kvmpy.bus import Claim, Device
from kvmpy.devices.ports import known_port
from kvmpy.devices.words import moved
from kvmpy.trace.record import LEVELS, Raw, Record

__all__ = ["Describe", "Find", "Names", "name_of"]

Find: TypeAlias = Callable[[bool, int], Claim | None]
"""Who claims an address: of a port (True) or of guest-physical memory."""

Describe: TypeAlias = Callable[[int, int, int, bool], str]
"""The words for an access: offset, size, value, whether it is a write."""

_IO, _MMIO = 2, 6
_ADDRESSED = frozenset((_IO, 3, 4, _MMIO, 29, 30))  # hypercall, debug and MSR exits, too
_VALUES = {17: "suberror", 9: "hardware reason", 24: "type"}


def name_of(find: Find, kind: str, address: int) -> str:
    """What is at the address of port and MMIO exits; "" for other kinds."""
    port = kind.startswith("port-")
    if not port and not kind.startswith("mmio-"):
        return ""
    claim = find(port, address)
    if claim is None:
        return (known_port(address) if port else "") or "nobody"
    return f"{claim.name} +{address - claim.base:#x}" if claim.size > 1 else claim.name


class Names:
    """Makes records of what the C loop wrote, for one vCPU and in its order.

    A device says in words what an access was by `describe(offset, size, value, write)`; one whose
    registers depend on earlier writes has `describing()`, which gives a new such function.
    """

    def __init__(self, find: Find) -> None:
        self._find = find
        self._describers: dict[Device, Describe] = {}

    def record(self, cpu: int, raw: Raw) -> Record:
        """The record, with names."""
        known = bool(raw.flags & lib.KVMPY_RECORD_VALUE)
        level, device, text = LEVELS[raw.level], "", ""
        if raw.reason in (_IO, _MMIO):
            claim = self._find(raw.reason == _IO, raw.address)
            device = "" if claim is None else claim.name
            text = self._access(raw, claim, known)
            if claim is None and level == "Python":
                level = "nobody"
        elif known:
            text = f"{_VALUES.get(raw.reason, 'value')} {raw.value:#x}"
        return Record(
            cpu=cpu,
            number=raw.number,
            entered=raw.entered,
            left=raw.left,
            kind=raw.kind,
            address=raw.address if raw.reason in _ADDRESSED else None,
            size=raw.size,
            elements=raw.elements,
            value=raw.value if known else None,
            digest=raw.digest,
            rip=raw.rip if raw.flags & lib.KVMPY_RECORD_RIP else None,
            level=level,
            starts=bool(raw.flags & lib.KVMPY_RECORD_FIRST),
            device=device,
            text=text,
        )

    def _access(self, raw: Raw, claim: Claim | None, known: bool) -> str:
        more = f" and {raw.elements - 1} more" if raw.elements > 1 else ""
        value = raw.value if known else None
        if claim is None:
            name = (known_port(raw.address) if raw.reason == _IO else "") or "nobody"
            return f"{name} {moved(value, raw.size, raw.write)}{more}"
        offset = raw.address - claim.base
        if value is not None:
            describe = self._describer(claim.device)
            if describe is not None:
                return f"{claim.name} {describe(offset, raw.size, value, raw.write)}{more}"
        place = f"+{offset:#x} " if claim.size > 1 else ""
        return f"{claim.name} {place}{moved(value, raw.size, raw.write)}{more}"

    def _describer(self, device: Device) -> Describe | None:
        if device not in self._describers:
            make = getattr(device, "describing", None)
            describe = getattr(device, "describe", None) if make is None else make()
            if describe is None:
                return None
            self._describers[device] = describe
        return self._describers[device]
