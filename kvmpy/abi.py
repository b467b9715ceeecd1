"""The only importer of the compiled module, and the table of KVM's plain ioctls.

The numbers come from the kernel's include/uapi/linux/kvm.h and do not depend on the headers
that kvmpy was built with; the tests compare them with those of the machine they run on.
"""

import errno
import os
import struct
from mmap import mmap
from typing import Final, NamedTuple, TypeAlias

from kvmpy import errors
from kvmpy._native import ffi, lib

__all__ = [
    "IOCTLS",
    "Ioctl",
    "WritableBuffer",
    "address_of",
    "ffi",
    "host_error",
    "ioctl",
    "lib",
    "pack",
]

WritableBuffer: TypeAlias = bytearray | memoryview | mmap

_NONE, _WRITE, _READ = 0, 1, 2  # the direction bits of _IOC(), asm-generic/ioctl.h
KVMIO: Final = 0xAE


class Ioctl(NamedTuple):
    """One row: `name` without KVM_, the request `number`, `size` of its struct in bytes.

    `size` is 0 where the argument is a plain number or there is none. `capability` names
    the KVM_CAP that brings the ioctl, where it is not part of the basic API.
    """

    name: str
    number: int
    size: int
    capability: str | None


def _row(name: str, direction: int, nr: int, size: int = 0, cap: str | None = None) -> Ioctl:
    return Ioctl(name, direction << 30 | size << 16 | KVMIO << 8 | nr, size, cap)


_ROWS = (
    # /dev/kvm
    _row("GET_API_VERSION", _NONE, 0x00),
    _row("CREATE_VM", _NONE, 0x01),
    _row("GET_MSR_INDEX_LIST", _READ | _WRITE, 0x02, 4),
    _row("CHECK_EXTENSION", _NONE, 0x03),
    _row("GET_VCPU_MMAP_SIZE", _NONE, 0x04),
    _row("GET_SUPPORTED_CPUID", _READ | _WRITE, 0x05, 8, "EXT_CPUID"),
    _row("GET_MSR_FEATURE_INDEX_LIST", _READ | _WRITE, 0x0A, 4, "GET_MSR_FEATURES"),
    # a VM
    _row("CREATE_VCPU", _NONE, 0x41),
    _row("GET_DIRTY_LOG", _WRITE, 0x42, 16),
    _row("SET_USER_MEMORY_REGION", _WRITE, 0x46, 32, "USER_MEMORY"),
    _row("SET_TSS_ADDR", _NONE, 0x47, 0, "SET_TSS_ADDR"),
    _row("SET_IDENTITY_MAP_ADDR", _WRITE, 0x48, 8, "SET_IDENTITY_MAP_ADDR"),
    _row("CREATE_IRQCHIP", _NONE, 0x60, 0, "IRQCHIP"),
    _row("IRQ_LINE_STATUS", _READ | _WRITE, 0x67, 8, "IRQ_INJECT_STATUS"),
    _row("IRQ_LINE", _WRITE, 0x61, 8, "IRQCHIP"),
    _row("GET_IRQCHIP", _READ | _WRITE, 0x62, 520, "IRQCHIP"),
    _row("SET_IRQCHIP", _READ, 0x63, 520, "IRQCHIP"),
    _row("REGISTER_COALESCED_MMIO", _WRITE, 0x67, 16, "COALESCED_MMIO"),
    _row("UNREGISTER_COALESCED_MMIO", _WRITE, 0x68, 16, "COALESCED_MMIO"),
    _row("SET_GSI_ROUTING", _WRITE, 0x6A, 8, "IRQ_ROUTING"),
    _row("IRQFD", _WRITE, 0x76, 32, "IRQFD"),
    _row("CREATE_PIT2", _WRITE, 0x77, 64, "PIT2"),
    _row("IOEVENTFD", _WRITE, 0x79, 64, "IOEVENTFD"),
    _row("SET_CLOCK", _WRITE, 0x7B, 48, "ADJUST_CLOCK"),
    _row("GET_CLOCK", _READ, 0x7C, 48, "ADJUST_CLOCK"),
    _row("GET_PIT2", _READ, 0x9F, 112, "PIT_STATE2"),
    _row("SET_PIT2", _WRITE, 0xA0, 112, "PIT_STATE2"),
    _row("ENABLE_CAP", _WRITE, 0xA3, 104, "ENABLE_CAP"),
    _row("SIGNAL_MSI", _WRITE, 0xA5, 32, "SIGNAL_MSI"),
    _row("CLEAR_DIRTY_LOG", _READ | _WRITE, 0xC0, 24, "MANUAL_DIRTY_LOG_PROTECT2"),
    _row("GET_STATS_FD", _NONE, 0xCE, 0, "BINARY_STATS_FD"),
    # a vCPU
    _row("RUN", _NONE, 0x80),
    _row("GET_REGS", _READ, 0x81, 144),
    _row("SET_REGS", _WRITE, 0x82, 144),
    _row("GET_SREGS", _READ, 0x83, 312),
    _row("SET_SREGS", _WRITE, 0x84, 312),
    _row("TRANSLATE", _READ | _WRITE, 0x85, 24),
    _row("INTERRUPT", _WRITE, 0x86, 4),
    _row("GET_MSRS", _READ | _WRITE, 0x88, 8),
    _row("SET_MSRS", _WRITE, 0x89, 8),
    _row("GET_FPU", _READ, 0x8C, 416),
    _row("SET_FPU", _WRITE, 0x8D, 416),
    _row("GET_LAPIC", _READ, 0x8E, 1024, "IRQCHIP"),
    _row("SET_LAPIC", _WRITE, 0x8F, 1024, "IRQCHIP"),
    _row("SET_CPUID2", _WRITE, 0x90, 8, "EXT_CPUID"),
    _row("GET_CPUID2", _READ | _WRITE, 0x91, 8, "EXT_CPUID"),
    _row("GET_MP_STATE", _READ, 0x98, 4, "MP_STATE"),
    _row("SET_MP_STATE", _WRITE, 0x99, 4, "MP_STATE"),
    _row("NMI", _NONE, 0x9A, 0, "USER_NMI"),
    _row("SET_GUEST_DEBUG", _WRITE, 0x9B, 72, "SET_GUEST_DEBUG"),
    _row("GET_VCPU_EVENTS", _READ, 0x9F, 64, "VCPU_EVENTS"),
    _row("SET_VCPU_EVENTS", _WRITE, 0xA0, 64, "VCPU_EVENTS"),
    _row("GET_DEBUGREGS", _READ, 0xA1, 128, "DEBUGREGS"),
    _row("SET_DEBUGREGS", _WRITE, 0xA2, 128, "DEBUGREGS"),
    _row("GET_XSAVE", _READ, 0xA4, 4096, "XSAVE"),
    _row("SET_XSAVE", _WRITE, 0xA5, 4096, "XSAVE"),
    _row("GET_XCRS", _READ, 0xA6, 392, "XCRS"),
    _row("SET_XCRS", _WRITE, 0xA7, 392, "XCRS"),
    _row("GET_TSC_KHZ", _NONE, 0xA3, 0, "GET_TSC_KHZ"),
    _row("GET_XSAVE2", _READ, 0xCF, 4096, "XSAVE2"),
)

IOCTLS: Final = {row.name: row for row in _ROWS}


def address_of(buffer: WritableBuffer) -> int:
    """The host address of a writable buffer. The caller keeps the buffer alive and in place."""
    with ffi.from_buffer("uint8_t[]", buffer, require_writable=True) as pointer:
        return int(ffi.cast("uintptr_t", pointer))


def pack(name: str, layout: str, *values: int) -> bytearray:
    """The struct of an ioctl; ConfigError, naming the ioctl, for a value that does not fit."""
    try:
        return bytearray(struct.pack(layout, *values))
    except struct.error:
        shown = ", ".join(
            f"{value:#x}" if isinstance(value, int) else repr(value) for value in values
        )
        raise errors.ConfigError(
            f"KVM_{name} takes unsigned numbers of limited width: {shown}"
        ) from None


def host_error(code: int, what: str, hint: str = "") -> errors.HostError:
    """The exception for a call that failed with errno `code`, in one line."""
    name = errno.errorcode.get(code, "no errno")
    text = f"{what} failed: {os.strerror(code)} ({name})" + (f"; {hint}" if hint else "")
    return errors.HostError(text, code)


def ioctl(fd: int, name: str, argument: int | WritableBuffer = 0, hint: str = "") -> int:
    """Issue the ioctl of that row; `argument` is a number or a writable buffer.

    Returns what the ioctl returned. Raises ConfigError for a number that is negative or wider
    than 64 bits, HostError with the ioctl's name, the errno and the hint, and
    UnsupportedError where the kernel does not know the ioctl.
    """
    row = IOCTLS[name]
    if isinstance(argument, int):
        if not 0 <= argument < 1 << 64:
            raise errors.ConfigError(f"KVM_{name} takes a number of 64 bits, not {argument:#x}")
        result = lib.kvmpy_ioctl(fd, row.number, argument)
    else:
        with ffi.from_buffer("uint8_t[]", argument, require_writable=True) as pointer:
            result = lib.kvmpy_ioctl_buffer(fd, row.number, pointer)
    if result >= 0:
        return int(result)
    if result == -errno.ENOTTY:
        needs = f" (KVM_CAP_{row.capability})" if row.capability else ""
        raise errors.UnsupportedError(f"this host's KVM has no KVM_{name}{needs}")
    raise host_error(-result, f"KVM_{name}", hint)
