"""The state of a vCPU and of a VM's interrupt controllers, as KVM packs it.

It is kept as bytes and written back as bytes: nothing is lost that kvmpy has no name for.
"""

import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from kvmpy.abi import IOCTLS
from kvmpy.errors import ConfigError, UnsupportedError
from kvmpy.interrupts import GsiRoute, IrqchipRoute
from kvmpy.once import Once
from kvmpy.vcpu import VCPU
from kvmpy.vm import VM
from kvmpy.x86.state import ClockData

__all__ = [
    "ORDER",
    "TIME_STAMPS",
    "CpuState",
    "VmState",
    "load_cpu",
    "load_routes",
    "load_vm",
    "msr_indices",
    "save_cpu",
    "save_vm",
    "write_msrs",
]

# In the order in which they are written back. The local APIC must be enabled (in SREGS) before its
# registers count; the TSC-deadline timer (an MSR) needs the APIC's timer mode; MP_STATE and events
# come last, since writing registers may take back what is pending.
ORDER: Final = (
    "XCRS",
    "SREGS",
    "LAPIC",
    "MSRS",
    "XSAVE",
    "REGS",
    "DEBUGREGS",
    "MP_STATE",
    "VCPU_EVENTS",
)
TIME_STAMPS: Final = (0x10, 0x3B, 0xE7, 0xE8)  # IA32_TSC, _TSC_ADJUST, _MPERF, _APERF
_OF_APIC: Final = ("LAPIC",)
_CHIPS: Final = range(3)
# What a vCPU has and KVM does not list, or not on every host: TSC_AUX, and the MTRRs (of variable
# and of fixed ranges, and the default type; SDM Vol.3 12.11.2).
_MORE_MSRS: Final = (
    0xC0000103,
    *range(0x200, 0x210),
    *(0x250, 0x258, 0x259),
    *range(0x268, 0x270),
    0x2FF,
)

CpuState = Mapping[str, bytes]
"""Packed structs by the name of their ioctls, without GET_ and SET_; CPUID among them."""


@dataclass(frozen=True, slots=True)
class VmState:
    """What a VM has beside its RAM and its vCPUs; `chips` and `pit` are empty without them."""

    clock: bytes
    chips: tuple[bytes, ...] = ()
    pit: bytes = b""
    routes: tuple[GsiRoute, ...] | None = None


_readable: Final = Once[tuple[int, ...]]()


def msr_indices(vcpu: VCPU, listed: tuple[int, ...]) -> tuple[int, ...]:
    """The MSRs that this host's vCPUs have; asked for one by one, once per process."""
    return _readable.get(lambda: tuple(_found(vcpu, listed)))


def _found(vcpu: VCPU, listed: tuple[int, ...]) -> Iterator[int]:
    for index in dict.fromkeys((*listed, *_MORE_MSRS)):
        with suppress(ConfigError):
            vcpu.get_msrs([index])
            yield index


def save_cpu(vcpu: VCPU, listed: tuple[int, ...], *, apic: bool) -> CpuState:
    """All of a vCPU's state; the exit at hand is finished first.

    `listed` are the MSRs that KVM lists, `apic` says whether the local APIC is KVM's.
    """
    state: dict[str, bytes] = {}
    for name in ORDER:
        if name == "MSRS":
            values = vcpu.get_msrs(msr_indices(vcpu, listed))
            packed = b"".join(
                struct.pack("<IIQ", index, 0, value) for index, value in values.items()
            )
            state[name] = packed
        elif name == "XSAVE":
            state[name] = vcpu.get_xsave()
        elif apic or name not in _OF_APIC:
            state[name] = vcpu.read_state(f"GET_{name}", IOCTLS[f"GET_{name}"].size)
    state["CPUID2"] = b"".join(entry.pack() for entry in vcpu.get_cpuid2())
    return state


def load_cpu(vcpu: VCPU, state: CpuState) -> None:
    """Write a vCPU's state, all but CPUID, which can be set before the first run only."""
    vcpu.finish()
    for name in ORDER:
        if name == "MSRS":
            write_msrs(vcpu, state[name])
        elif name == "SREGS":
            vcpu.set_packed_sregs(state[name])
        elif name in state:
            vcpu.write_state(f"SET_{name}", state[name])


def write_msrs(vcpu: VCPU, packed: bytes) -> dict[int, int]:
    """Write MSRs; those of them that the vCPU has taken, by index.

    A host may list what it refuses to have written, as that of asynchronous page faults without an
    APIC. Raises UnsupportedError if one of those has another value than it should.
    """
    values = {index: value for index, _, value in struct.iter_unpack("<IIQ", packed)}
    refused = vcpu.set_msrs(values, strict=False)
    for index in refused:
        value, found = values.pop(index), vcpu.get_msrs([index])[index]
        if found != value and index not in TIME_STAMPS:
            raise UnsupportedError(
                f"the snapshot has {value:#x} in MSR {index:#x}, and this host's vCPUs refuse that "
                f"(here: {found:#x}); use a host like that which it was taken on"
            )
    return values


def save_vm(vm: VM) -> VmState:
    """The clock, and interrupt controllers and PIT where they are KVM's."""
    chips = tuple(vm.get_irqchip(chip) for chip in _CHIPS) if vm.irqchip == "full" else ()
    pit = vm.get_pit() if vm.has_pit else b""
    clock = ClockData(clock=vm.get_clock().clock).pack()
    return VmState(clock, chips, pit, vm.gsi_routes)


def load_vm(vm: VM, state: VmState) -> None:
    """Write them; before the vCPUs' state."""
    vm.set_clock(ClockData.unpack(state.clock))
    for chip, packed in enumerate(state.chips):
        vm.set_irqchip(chip, packed)
    if state.pit:
        if not vm.has_pit:
            vm.create_pit()
        vm.set_pit(state.pit)
    load_routes(vm, state.routes)


def load_routes(vm: VM, routes: tuple[GsiRoute, ...] | None) -> None:
    """Bring the GSI routes back; None for the kernel's own."""
    if vm.gsi_routes != routes:
        vm.set_gsi_routing(_kernels_routes(vm) if routes is None else routes)
        vm.gsi_routes = routes


def _kernels_routes(vm: VM) -> tuple[GsiRoute, ...]:
    """Those that KVM_CREATE_IRQCHIP makes; a split irqchip begins without any (KVM API, 4.24)."""
    if vm.irqchip != "full":
        return ()
    ioapic = [IrqchipRoute(gsi, 2, gsi) for gsi in range(24)]
    return (*ioapic, *(IrqchipRoute(gsi, gsi // 8, gsi % 8) for gsi in range(16)))
