"""Control state of a vCPU: control and segment registers, debug registers, XCRs, run state.

One class for each structure of the KVM API; `kvmpy.x86.events` and `kvmpy.x86.fpu` hold the
others, and all can be imported from here.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from operator import attrgetter
from struct import Struct, error
from typing import ClassVar

from kvmpy.errors import ConfigError
from kvmpy.x86.events import VcpuEvents
from kvmpy.x86.fpu import FPU
from kvmpy.x86.layout import Bytes, Layout, check_size
from kvmpy.x86.segments import DescriptorTable, Segment

__all__ = [
    "FPU",
    "CPUIDEntry",
    "ClockData",
    "DebugRegisters",
    "MPState",
    "SpecialRegisters",
    "VcpuEvents",
    "XCRs",
]


class MPState(IntEnum):
    """What a vCPU is doing (KVM API: KVM_GET_MP_STATE); from STOPPED on, other architectures."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    INIT_RECEIVED = 2
    HALTED = 3
    SIPI_RECEIVED = 4
    STOPPED = 5
    CHECK_STOP = 6
    OPERATING = 7
    LOAD = 8
    AP_RESET_HOLD = 9
    SUSPENDED = 10


_SEGMENT_NAMES = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_CONTROL_NAMES = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
_CONTROL = Layout("SpecialRegisters", ((name, "Q") for name in _CONTROL_NAMES))
_BITMAP_SIZE = 32
# struct kvm_segment eight times, struct kvm_dtable twice, the control registers, the bitmap
_SREGS = Struct("<" + "QIH9Bx" * 8 + "QH6x" * 2 + f"7Q{_BITMAP_SIZE}s")
_flat = attrgetter(
    *(f"{segment}.{part}" for segment in _SEGMENT_NAMES for part in Segment.FIELDS),
    *(f"{table}.{part}" for table in ("gdt", "idt") for part in ("base", "limit")),
    *_CONTROL_NAMES,
)


@dataclass(slots=True)
class SpecialRegisters:
    """Segment, table and control registers (KVM API: KVM_GET_SREGS, struct kvm_sregs).

    `interrupt_bitmap` is 256 bits: at most one is set, the external interrupt that has been
    acknowledged and not yet injected.
    """

    SIZE: ClassVar[int] = _SREGS.size

    cs: Segment = field(default_factory=Segment)
    ds: Segment = field(default_factory=Segment)
    es: Segment = field(default_factory=Segment)
    fs: Segment = field(default_factory=Segment)
    gs: Segment = field(default_factory=Segment)
    ss: Segment = field(default_factory=Segment)
    tr: Segment = field(default_factory=Segment)
    ldt: Segment = field(default_factory=Segment)
    gdt: DescriptorTable = field(default_factory=DescriptorTable)
    idt: DescriptorTable = field(default_factory=DescriptorTable)
    cr0: int = 0
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    efer: int = 0
    apic_base: int = 0
    interrupt_bitmap: bytes = bytes(_BITMAP_SIZE)

    def pack(self) -> bytes:
        """Return struct kvm_sregs; raise ConfigError naming a field that does not fit."""
        check_size("SpecialRegisters", "interrupt_bitmap", self.interrupt_bitmap, _BITMAP_SIZE)
        try:
            return _SREGS.pack(*_flat(self), self.interrupt_bitmap)
        except error:
            return self._pack_parts()

    def _pack_parts(self) -> bytes:
        """The same, part by part: slower, and each names the field that does not fit."""
        return b"".join(
            (
                *(getattr(self, name).pack() for name in _SEGMENT_NAMES),
                self.gdt.pack(),
                self.idt.pack(),
                _CONTROL.pack(*_CONTROL.values_of(self)),
                self.interrupt_bitmap,
            )
        )

    @classmethod
    def unpack(cls, buffer: Bytes) -> "SpecialRegisters":
        """Read struct kvm_sregs from the first `SIZE` bytes of `buffer`."""
        v = _SREGS.unpack_from(buffer)
        cs, ds, es, fs, gs, ss, tr, ldt = (Segment(*v[i : i + 12]) for i in range(0, 96, 12))
        gdt, idt = DescriptorTable(v[96], v[97]), DescriptorTable(v[98], v[99])
        return cls(cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, *v[100:])

    def copy(self) -> "SpecialRegisters":
        """Return an equal object that shares no segment or table with this one."""
        return SpecialRegisters.unpack(self.pack())


_DEBUG = Layout(
    "DebugRegisters",
    (
        *((f"db[{i}]", "Q") for i in range(4)),
        *((name, "Q") for name in ("dr6", "dr7", "flags")),
        ("", "72x"),
    ),
)


@dataclass(slots=True)
class DebugRegisters:
    """DR0 to DR3 (`db`), DR6 and DR7 (KVM API: KVM_GET_DEBUGREGS, struct kvm_debugregs).

    The reset values of DR6 and DR7 are from SDM Vol.3 table 10-1; `flags` must be 0.
    """

    SIZE: ClassVar[int] = _DEBUG.size

    db: tuple[int, int, int, int] = (0, 0, 0, 0)
    dr6: int = 0xFFFF_0FF0
    dr7: int = 0x400
    flags: int = 0

    def pack(self) -> bytes:
        """Return struct kvm_debugregs; raise ConfigError naming a register that does not fit."""
        if len(self.db) != 4:
            raise ConfigError(f"DebugRegisters: db must hold 4 addresses, not {len(self.db)}")
        return _DEBUG.pack(*self.db, self.dr6, self.dr7, self.flags)

    @classmethod
    def unpack(cls, buffer: Bytes) -> "DebugRegisters":
        """Read struct kvm_debugregs from the first `SIZE` bytes of `buffer`."""
        db0, db1, db2, db3, dr6, dr7, flags = _DEBUG.unpack_from(buffer)
        return cls((db0, db1, db2, db3), dr6, dr7, flags)


_MAX_XCRS = 16
_XCRS_HEADER = Layout("XCRs", (("nr_xcrs", "I"), ("flags", "I")))
_XCR = Layout("XCRs", (("index", "I"), ("", "4x"), ("value", "Q")))
_XCRS_SIZE = _XCRS_HEADER.size + _MAX_XCRS * _XCR.size + 128


@dataclass(slots=True)
class XCRs:
    """Extended control registers by index (KVM API: KVM_GET_XCRS, struct kvm_xcrs).

    Index 0 is XCR0, the set of state components that XSAVE handles (SDM Vol.1 13.3).
    `flags` must be 0.
    """

    SIZE: ClassVar[int] = _XCRS_SIZE

    values: dict[int, int] = field(default_factory=dict)
    flags: int = 0

    def pack(self) -> bytes:
        """Return struct kvm_xcrs; raise ConfigError for what does not fit it."""
        if len(self.values) > _MAX_XCRS:
            raise ConfigError(f"XCRs: {len(self.values)} registers; at most {_MAX_XCRS} fit")
        entries = b"".join(_XCR.pack(index, value) for index, value in self.values.items())
        return (_XCRS_HEADER.pack(len(self.values), self.flags) + entries).ljust(_XCRS_SIZE, b"\0")

    @classmethod
    def unpack(cls, buffer: Bytes) -> "XCRs":
        """Read struct kvm_xcrs from the first `SIZE` bytes of `buffer`."""
        count, flags = _XCRS_HEADER.unpack_from(buffer)
        offsets = range(_XCRS_HEADER.size, _XCRS_SIZE, _XCR.size)[: min(count, _MAX_XCRS)]
        return cls(dict(_XCR.unpack_from(buffer, offset) for offset in offsets), flags)


_CPUID = Layout(
    "CPUIDEntry",
    (*((n, "I") for n in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")), ("", "12x")),
)


@dataclass(slots=True)
class CPUIDEntry:
    """One answer of CPUID (KVM API: KVM_SET_CPUID2, struct kvm_cpuid_entry2).

    `function` is the leaf (EAX) and `index` the subleaf (ECX), which counts only where `flags`
    has bit 0, KVM_CPUID_FLAG_SIGNIFCANT_INDEX.
    """

    SIZE: ClassVar[int] = _CPUID.size

    function: int = 0
    index: int = 0
    flags: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0

    def pack(self) -> bytes:
        """Return struct kvm_cpuid_entry2; raise ConfigError naming what does not fit."""
        return _CPUID.pack(*_CPUID.values_of(self))

    @classmethod
    def unpack(cls, buffer: Bytes) -> "CPUIDEntry":
        """Read struct kvm_cpuid_entry2 from the first `SIZE` bytes of `buffer`."""
        return cls(*_CPUID.unpack_from(buffer))


_CLOCK = Layout(
    "ClockData",
    (("clock", "Q"), ("flags", "I"), ("", "4x"), ("realtime", "Q"), ("host_tsc", "Q"), ("", "16x")),
)


@dataclass(slots=True)
class ClockData:
    """The VM's kvmclock (KVM API: KVM_GET_CLOCK, struct kvm_clock_data).

    `clock` and `realtime` are nanoseconds, `host_tsc` is in ticks; `flags` says which hold.
    """

    SIZE: ClassVar[int] = _CLOCK.size

    clock: int = 0
    flags: int = 0
    realtime: int = 0
    host_tsc: int = 0

    def pack(self) -> bytes:
        """Return struct kvm_clock_data; raise ConfigError naming what does not fit."""
        return _CLOCK.pack(*_CLOCK.values_of(self))

    @classmethod
    def unpack(cls, buffer: Bytes) -> "ClockData":
        """Read struct kvm_clock_data from the first `SIZE` bytes of `buffer`."""
        return cls(*_CLOCK.unpack_from(buffer))
