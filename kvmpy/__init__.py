"""kvmpy: a minimal x86-64 hypervisor that drives /dev/kvm directly from Python.

`Machine` loads and runs a guest; `KVM`, `VM` and `VCPU` are the floor below, one class for each
kind of file descriptor. Each name is imported from its module when it is first used, so that
`import kvmpy` costs next to nothing; from outside the standard library only cffi's runtime is
ever loaded, until something needs an assembler, a disassembler or an ELF reader.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmpy.asm import Program, assemble
    from kvmpy.boot import Image, load_image
    from kvmpy.coverage import Coverage
    from kvmpy.devices import Entropy, Harness
    from kvmpy.errors import (
        AddressError,
        AssemblyError,
        ClosedError,
        ConfigError,
        DeviceError,
        HostError,
        ImageError,
        KvmpyError,
        KVMUnavailableError,
        OverlapError,
        PendingExitError,
        SnapshotError,
        UnsupportedError,
    )
    from kvmpy.exits import (
        Debug,
        Exit,
        FailEntry,
        Halt,
        InternalError,
        Interrupted,
        IrqWindowOpen,
        MmioRead,
        MmioWrite,
        MsrRead,
        MsrWrite,
        OtherExit,
        PortIn,
        PortOut,
        Shutdown,
        SystemEvent,
        UnknownExit,
    )
    from kvmpy.kvm import KVM
    from kvmpy.machine import Machine
    from kvmpy.memory import Memory
    from kvmpy.outcome import Outcome
    from kvmpy.pool import map
    from kvmpy.repeat import runs
    from kvmpy.result import Result
    from kvmpy.snapshot import Snapshot
    from kvmpy.spares import Spares
    from kvmpy.vcpu import VCPU
    from kvmpy.vm import VM

__version__ = "0.1.0"

__all__ = [
    "KVM",
    "VCPU",
    "VM",
    "AddressError",
    "AssemblyError",
    "ClosedError",
    "ConfigError",
    "Coverage",
    "Debug",
    "DeviceError",
    "Entropy",
    "Exit",
    "FailEntry",
    "Halt",
    "Harness",
    "HostError",
    "Image",
    "ImageError",
    "InternalError",
    "Interrupted",
    "IrqWindowOpen",
    "KVMUnavailableError",
    "KvmpyError",
    "Machine",
    "Memory",
    "MmioRead",
    "MmioWrite",
    "MsrRead",
    "MsrWrite",
    "OtherExit",
    "Outcome",
    "OverlapError",
    "PendingExitError",
    "PortIn",
    "PortOut",
    "Program",
    "Result",
    "Shutdown",
    "Snapshot",
    "SnapshotError",
    "Spares",
    "SystemEvent",
    "UnknownExit",
    "UnsupportedError",
    "assemble",
    "load_image",
    "map",
    "runs",
]

# Where each name lives: the same as above, for the interpreter.
_HOMES = {
    "kvmpy.asm": ("Program", "assemble"),
    "kvmpy.boot": ("Image", "load_image"),
    "kvmpy.coverage": ("Coverage",),
    "kvmpy.devices": ("Entropy", "Harness"),
    "kvmpy.errors": (
        "AddressError",
        "AssemblyError",
        "ClosedError",
        "ConfigError",
        "DeviceError",
        "HostError",
        "ImageError",
        "KvmpyError",
        "KVMUnavailableError",
        "OverlapError",
        "PendingExitError",
        "SnapshotError",
        "UnsupportedError",
    ),
    "kvmpy.exits": (
        "Debug",
        "Exit",
        "FailEntry",
        "Halt",
        "InternalError",
        "Interrupted",
        "IrqWindowOpen",
        "MmioRead",
        "MmioWrite",
        "MsrRead",
        "MsrWrite",
        "OtherExit",
        "PortIn",
        "PortOut",
        "Shutdown",
        "SystemEvent",
        "UnknownExit",
    ),
    "kvmpy.kvm": ("KVM",),
    "kvmpy.machine": ("Machine",),
    "kvmpy.memory": ("Memory",),
    "kvmpy.result": ("Result",),
    "kvmpy.pool": ("map",),
    "kvmpy.outcome": ("Outcome",),
    "kvmpy.repeat": ("runs",),
    "kvmpy.snapshot": ("Snapshot",),
    "kvmpy.spares": ("Spares",),
    "kvmpy.vcpu": ("VCPU",),
    "kvmpy.vm": ("VM",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a name of the face when it is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'kvmpy' has no attribute {name!r}")
    home = import_module(_HOME[name])
    # All at once, so that a module never takes the place of a name of its own.
    globals().update({each: getattr(home, each) for each in _HOMES[_HOME[name]]})
    return globals()[name]


def __dir__() -> list[str]:
    """The face, and what is there already."""
    return sorted({*globals(), *__all__})
