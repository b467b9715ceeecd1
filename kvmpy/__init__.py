"""kvmpy: a minimal x86-64 hypervisor that drives /dev/kvm directly from Python.

`Machine` loads and runs a guest; `KVM`, `VM` and `VCPU` are the floor below, one class for each
kind of file descriptor. Importing this loads cffi's runtime and nothing else from outside.
"""

from kvmpy.asm import Program, assemble
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
from kvmpy.result import Result
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
    "Debug",
    "DeviceError",
    "Exit",
    "FailEntry",
    "Halt",
    "HostError",
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
    "OverlapError",
    "PendingExitError",
    "PortIn",
    "PortOut",
    "Program",
    "Result",
    "Shutdown",
    "SystemEvent",
    "UnknownExit",
    "UnsupportedError",
    "assemble",
]
