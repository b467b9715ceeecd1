"""Why the guest stopped, as frozen values for `match`, decoded from struct kvm_run.

Source: KVM API, 5 "The kvm_run structure"; the offsets are those of the kernel's
include/uapi/linux/kvm.h. An exit that has no class of its own is an `OtherExit`.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

__all__ = [
    "REASONS",
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
    "decode",
    "exit_kind",
]

Buffer: TypeAlias = bytes | bytearray | memoryview

REASONS: Final = {
    0: "unknown",
    1: "exception",
    2: "io",
    3: "hypercall",
    4: "debug",
    5: "halt",
    6: "mmio",
    7: "irq-window-open",
    8: "shutdown",
    9: "fail-entry",
    10: "interrupted",
    11: "set-tpr",
    12: "tpr-access",
    16: "nmi",
    17: "internal-error",
    24: "system-event",
    26: "ioapic-eoi",
    27: "hyperv",
    29: "msr-read",
    30: "msr-write",
    31: "dirty-ring-full",
    32: "ap-reset-hold",
    33: "bus-lock",
    34: "xen",
    37: "notify",
    39: "memory-fault",
    40: "tdx",
}
"""The KVM_EXIT reasons that x86 can give, by kvmpy's names."""

RUN_SIZE: Final = 2352
"""sizeof(struct kvm_run), in bytes."""
OFFSET_IMMEDIATE_EXIT: Final = 1
OFFSET_REASON: Final = 8
OFFSET_CR8: Final = 16
OFFSET_UNION: Final = 32
OFFSET_VALID_REGS: Final = 288
OFFSET_DIRTY_REGS: Final = 296
OFFSET_SYNC: Final = 304


def exit_kind(reason: int, write: bool = False) -> str:
    """The name of an exit in counts and reports: "port-out", "mmio-read", "halt" and so on."""
    if reason == 2:
        return "port-out" if write else "port-in"
    if reason == 6:
        return "mmio-write" if write else "mmio-read"
    return REASONS.get(reason, f"exit-{reason}")


@dataclass(frozen=True, slots=True)
class PortIn:
    """IN or INS: `count` reads of `size` bytes from `port`; answer with `vcpu.reply(data)`."""

    port: int
    size: int
    count: int = 1


@dataclass(frozen=True, slots=True)
class PortOut:
    """OUT or OUTS: `data` is `size` times `count` bytes written to `port`."""

    port: int
    size: int
    data: bytes
    count: int = 1

    @property
    def values(self) -> tuple[int, ...]:
        """The elements of `data` as integers, in the order in which the guest wrote them."""
        return tuple(
            int.from_bytes(self.data[at : at + self.size], "little")
            for at in range(0, len(self.data), self.size)
        )


@dataclass(frozen=True, slots=True)
class MmioRead:
    """A read of `size` bytes (1 to 8) from an address without RAM; answer by `vcpu.reply`."""

    address: int
    size: int


@dataclass(frozen=True, slots=True)
class MmioWrite:
    """A write of `data` (1 to 8 bytes) to an address without writable RAM."""

    address: int
    data: bytes

    @property
    def value(self) -> int:
        """`data` as an integer."""
        return int.from_bytes(self.data, "little")


@dataclass(frozen=True, slots=True)
class Halt:
    """HLT, on a vCPU without an in-kernel local APIC."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """A triple fault, or another event that shuts a processor down."""


@dataclass(frozen=True, slots=True)
class InternalError:
    """KVM could not go on. `suberror` 1: an instruction that its emulator lacks."""

    suberror: int
    data: tuple[int, ...]
    instruction: bytes = b""

    @property
    def reason(self) -> str:
        """The suberror in words (KVM_INTERNAL_ERROR_*)."""
        return _SUBERRORS.get(self.suberror, f"suberror {self.suberror}")


@dataclass(frozen=True, slots=True)
class FailEntry:
    """The processor refused to enter the guest: its state breaks a rule (SDM Vol.3 27.3)."""

    hardware_reason: int
    cpu: int


@dataclass(frozen=True, slots=True)
class Debug:
    """A single step, a hardware breakpoint or a software breakpoint, at linear address `pc`."""

    exception: int
    pc: int
    dr6: int
    dr7: int


@dataclass(frozen=True, slots=True)
class IrqWindowOpen:
    """The guest can take an interrupt now, as `vcpu.request_irq_window` asked to be told."""


@dataclass(frozen=True, slots=True)
class MsrRead:
    """RDMSR that user space answers (KVM_CAP_X86_USER_SPACE_MSR) by `vcpu.reply`."""

    index: int
    reason: int


@dataclass(frozen=True, slots=True)
class MsrWrite:
    """WRMSR of `value` that user space serves (KVM_CAP_X86_USER_SPACE_MSR)."""

    index: int
    value: int
    reason: int


@dataclass(frozen=True, slots=True)
class SystemEvent:
    """Reset, power-off or crash that the guest asked of KVM (KVM_EXIT_SYSTEM_EVENT)."""

    type: int
    data: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class UnknownExit:
    """KVM_EXIT_UNKNOWN: a hardware exit that the kernel does not handle."""

    hardware_reason: int


@dataclass(frozen=True, slots=True)
class Interrupted:
    """No exit of the guest's: `why` is "stopped" (a kick) or "timeout"."""

    why: str


@dataclass(frozen=True, slots=True)
class OtherExit:
    """An exit without a class of its own; `payload` is the 256 bytes of kvm_run's union."""

    reason: int
    name: str
    payload: bytes


Exit: TypeAlias = (
    PortIn
    | PortOut
    | MmioRead
    | MmioWrite
    | Halt
    | Shutdown
    | InternalError
    | FailEntry
    | Debug
    | IrqWindowOpen
    | MsrRead
    | MsrWrite
    | SystemEvent
    | UnknownExit
    | Interrupted
    | OtherExit
)

_SUBERRORS = {
    1: "the emulator lacks the instruction",
    2: "simultaneous exceptions",
    3: "an exit while an event was being delivered",
    4: "an unexpected exit reason",
}

_IO = struct.Struct("<BBHIQ")
_MMIO = struct.Struct("<Q8sIB")
_DEBUG = struct.Struct("<I4xQQQ")
_MSR = struct.Struct("<B7xIIQ")


def _io(run: Buffer) -> Exit:
    direction, size, port, count, offset = _IO.unpack_from(run, OFFSET_UNION)
    if direction == 0:
        return PortIn(port, size, count)
    return PortOut(port, size, bytes(run[offset : offset + size * count]), count)


def _mmio(run: Buffer) -> Exit:
    address, data, size, is_write = _MMIO.unpack_from(run, OFFSET_UNION)
    return MmioWrite(address, data[:size]) if is_write else MmioRead(address, size)


def _internal_error(run: Buffer) -> Exit:
    suberror, ndata = struct.unpack_from("<II", run, OFFSET_UNION)
    data = struct.unpack_from(f"<{min(ndata, 16)}Q", run, OFFSET_UNION + 8)
    instruction = b""
    # struct kvm_run.emulation_failure: bit 0 of the flags says that the bytes are there, and
    # flags, size and bytes make up the first three numbers of the data.
    if suberror == 1 and ndata >= 3 and data[0] & 1:
        raw = bytes(run[OFFSET_UNION + 16 : OFFSET_UNION + 32])
        instruction = raw[1 : 1 + min(raw[0], 15)]
    return InternalError(suberror, data, instruction)


def _system_event(run: Buffer) -> Exit:
    kind, count = struct.unpack_from("<II", run, OFFSET_UNION)
    return SystemEvent(kind, struct.unpack_from(f"<{min(count, 16)}Q", run, OFFSET_UNION + 8))


def _msr_read(run: Buffer) -> Exit:
    _, reason, index, _ = _MSR.unpack_from(run, OFFSET_UNION)
    return MsrRead(index, reason)


def _msr_write(run: Buffer) -> Exit:
    _, reason, index, value = _MSR.unpack_from(run, OFFSET_UNION)
    return MsrWrite(index, value, reason)


_WITHOUT_DATA: dict[int, Exit] = {5: Halt(), 7: IrqWindowOpen(), 8: Shutdown()}
_DECODERS: dict[int, Callable[[Buffer], Exit]] = {
    0: lambda run: UnknownExit(*struct.unpack_from("<Q", run, OFFSET_UNION)),
    2: _io,
    4: lambda run: Debug(*_DEBUG.unpack_from(run, OFFSET_UNION)),
    6: _mmio,
    9: lambda run: FailEntry(*struct.unpack_from("<QI", run, OFFSET_UNION)),
    17: _internal_error,
    24: _system_event,
    29: _msr_read,
    30: _msr_write,
}


def decode(run: Buffer) -> Exit:
    """The exit that a vCPU's mapping (struct kvm_run, then the page of port data) holds."""
    (reason,) = struct.unpack_from("<I", run, OFFSET_REASON)
    if reason in _WITHOUT_DATA:
        return _WITHOUT_DATA[reason]
    decoder = _DECODERS.get(reason)
    if decoder is None:
        payload = bytes(run[OFFSET_UNION : OFFSET_UNION + 256])
        return OtherExit(reason, exit_kind(reason), payload)
    return decoder(run)
