"""Segment registers with their hidden parts, and the descriptors they are loaded from.

Sources: SDM Vol.3 3.4 (segment descriptors), 3.5 (system descriptors), 8.2 (TSS descriptors);
KVM API: struct kvm_segment and struct kvm_dtable of KVM_GET_SREGS.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

from kvmpy.errors import ConfigError
from kvmpy.x86.layout import Bytes, Layout

__all__ = ["DescriptorTable", "Segment", "SegmentType", "SystemType"]


class SegmentType(IntEnum):
    """The type field of code and data segments (S = 1; SDM Vol.3 table 3-1) as used here.

    All have the accessed bit set, so that the processor never writes to the table.
    """

    DATA_READ_WRITE = 0x3
    CODE_EXECUTE_READ = 0xB


class SystemType(IntEnum):
    """The type field of system segments and gates (S = 0; SDM Vol.3 table 3-2)."""

    LDT = 0x2
    TSS_AVAILABLE = 0x9
    TSS_BUSY = 0xB
    CALL_GATE = 0xC
    INTERRUPT_GATE = 0xE
    TRAP_GATE = 0xF


_SEGMENT_FIELDS = (
    *(("base", "Q"), ("limit", "I"), ("selector", "H")),
    *((name, "B") for name in ("type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable")),
    ("", "x"),
)
_SEGMENT = Layout("Segment", _SEGMENT_FIELDS)
_TABLE = Layout("DescriptorTable", (("base", "Q"), ("limit", "H"), ("", "6x")))

_FLAT_LIMIT = 0xFFFF_FFFF


@dataclass(slots=True)
class Segment:
    """A segment register: the selector and the hidden part (SDM Vol.3 3.4.3).

    `limit` is in bytes, as the processor caches it: a descriptor with G = 1 and a limit field of
    0xfffff gives 0xffff_ffff. The default is a register that holds a null selector.
    """

    SIZE: ClassVar[int] = _SEGMENT.size
    FIELDS: ClassVar[tuple[str, ...]] = tuple(name for name, _ in _SEGMENT.fields)

    base: int = 0
    limit: int = 0
    selector: int = 0
    type: int = 0
    present: int = 0
    dpl: int = 0
    db: int = 0
    s: int = 0
    l: int = 0  # noqa: E741 - the architecture's name of the 64-bit code bit
    g: int = 0
    avl: int = 0
    unusable: int = 1

    def pack(self) -> bytes:
        """Return struct kvm_segment; raise ConfigError naming a field that does not fit."""
        return _SEGMENT.pack(*_SEGMENT.values_of(self))

    @classmethod
    def unpack(cls, buffer: Bytes) -> "Segment":
        """Read struct kvm_segment from the first `SIZE` bytes of `buffer`."""
        return cls(*_SEGMENT.unpack_from(buffer))

    # Code and data, as they are loaded from descriptors

    @classmethod
    def code64(cls, selector: int, dpl: int = 0) -> "Segment":
        """64-bit code: L = 1, D = 0; base and limit are ignored by the processor."""
        code = SegmentType.CODE_EXECUTE_READ
        return cls(0, _FLAT_LIMIT, selector, code, 1, dpl, db=0, s=1, l=1, g=1, unusable=0)

    @classmethod
    def code32(cls, selector: int, dpl: int = 0) -> "Segment":
        """Flat 32-bit code of 4 GiB; in long mode this is compatibility mode."""
        code = SegmentType.CODE_EXECUTE_READ
        return cls(0, _FLAT_LIMIT, selector, code, 1, dpl, db=1, s=1, g=1, unusable=0)

    @classmethod
    def code16(cls, selector: int, base: int = 0, dpl: int = 0) -> "Segment":
        """16-bit protected-mode code of 64 KiB at `base`."""
        code = SegmentType.CODE_EXECUTE_READ
        return cls(base, 0xFFFF, selector, code, 1, dpl, s=1, unusable=0)

    @classmethod
    def data(cls, selector: int, dpl: int = 0) -> "Segment":
        """Flat writable data of 4 GiB with a 32-bit stack pointer (B = 1)."""
        data = SegmentType.DATA_READ_WRITE
        return cls(0, _FLAT_LIMIT, selector, data, 1, dpl, db=1, s=1, g=1, unusable=0)

    @classmethod
    def data16(cls, selector: int, base: int = 0, dpl: int = 0) -> "Segment":
        """Writable data of 64 KiB at `base` with a 16-bit stack pointer (B = 0)."""
        data = SegmentType.DATA_READ_WRITE
        return cls(base, 0xFFFF, selector, data, 1, dpl, s=1, unusable=0)

    @classmethod
    def real_mode(cls, selector: int, *, code: bool = False) -> "Segment":
        """A real-mode segment: base = selector * 16, limit 0xffff (SDM Vol.3 21.1.1)."""
        kind = SegmentType.CODE_EXECUTE_READ if code else SegmentType.DATA_READ_WRITE
        return cls(selector << 4, 0xFFFF, selector, kind, 1, s=1, unusable=0)

    # System segments

    @classmethod
    def tss(cls, selector: int, base: int, limit: int) -> "Segment":
        """A busy 32-bit or 64-bit TSS (one type code for both; SDM Vol.3 8.2.2, 8.2.3)."""
        return cls(base, limit, selector, SystemType.TSS_BUSY, 1, unusable=0)

    @classmethod
    def no_ldt(cls) -> "Segment":
        """An LDTR that holds a null selector and is unusable."""
        return cls(type=SystemType.LDT)

    # Descriptors

    def descriptor(self) -> bytes:
        """Return the 8-byte descriptor that loads this hidden part (SDM Vol.3 figure 3-8).

        Raises ConfigError where the base needs more than 32 bits (see `system_descriptor`) or
        the limit cannot be said with the granularity `g`.
        """
        if not 0 <= self.base <= 0xFFFF_FFFF:
            raise ConfigError(
                f"Segment: base = {self.base:#x} needs more than a descriptor's 32 bits"
            )
        return self._low_half()

    def system_descriptor(self) -> bytes:
        """Return the 16-byte descriptor of a TSS or LDT in long mode (SDM Vol.3 figure 8-4).

        Raises ConfigError for a code or data segment and for a limit that `g` cannot express.
        """
        if self.s:
            raise ConfigError(
                "Segment: a code or data segment has no 16-byte descriptor; use s = 0"
            )
        self.pack()  # names a base that is not 64-bit
        return self._low_half() + struct.pack("<II", self.base >> 32, 0)

    def _low_half(self) -> bytes:
        limit = self._limit_field()
        base = self.base
        self._check_bits()
        value = (
            (limit & 0xFFFF)
            | (base & 0xFF_FFFF) << 16
            | self.type << 40
            | self.s << 44
            | self.dpl << 45
            | self.present << 47
            | (limit >> 16) << 48
            | self.avl << 52
            | self.l << 53
            | self.db << 54
            | self.g << 55
            | (base >> 24 & 0xFF) << 56
        )
        return value.to_bytes(8, "little")

    def _limit_field(self) -> int:
        field = self.limit >> 12 if self.g else self.limit
        granular = not self.g or self.limit & 0xFFF == 0xFFF
        if not 0 <= field <= 0xF_FFFF or not granular:
            raise ConfigError(
                f"Segment: a descriptor with g = {self.g} has no limit {self.limit:#x}"
            )
        return field

    def _check_bits(self) -> None:
        for name, largest in (("type", 15), ("dpl", 3)):
            if not 0 <= getattr(self, name) <= largest:
                raise ConfigError(f"Segment: {name} = {getattr(self, name)} is not 0 to {largest}")
        for name in ("s", "present", "avl", "l", "db", "g"):
            if getattr(self, name) not in {0, 1}:
                raise ConfigError(f"Segment: {name} = {getattr(self, name)} is not 0 or 1")

    @classmethod
    def from_descriptor(cls, selector: int, descriptor: Bytes) -> "Segment":
        """Return what loading `selector` from an 8-byte or 16-byte descriptor gives.

        A descriptor that is not present gives an unusable segment. Raises ConfigError for any
        other length.
        """
        if len(descriptor) not in {8, 16}:
            raise ConfigError(f"a descriptor has 8 or 16 bytes, not {len(descriptor)}")
        value = int.from_bytes(descriptor[:8], "little")
        g = value >> 55 & 1
        field = value & 0xFFFF | (value >> 48 & 0xF) << 16
        upper = int.from_bytes(descriptor[8:12], "little")
        present = value >> 47 & 1
        return cls(
            base=value >> 16 & 0xFF_FFFF | (value >> 56) << 24 | upper << 32,
            limit=field << 12 | 0xFFF if g else field,
            selector=selector,
            type=value >> 40 & 0xF,
            present=present,
            dpl=value >> 45 & 3,
            db=value >> 54 & 1,
            s=value >> 44 & 1,
            l=value >> 53 & 1,
            g=g,
            avl=value >> 52 & 1,
            unusable=1 - present,
        )


@dataclass(slots=True)
class DescriptorTable:
    """GDTR or IDTR: the linear address of the table and its last byte's offset."""

    SIZE: ClassVar[int] = _TABLE.size

    base: int = 0
    limit: int = 0

    def pack(self) -> bytes:
        """Return struct kvm_dtable; raise ConfigError naming a field that does not fit."""
        return _TABLE.pack(self.base, self.limit)

    @classmethod
    def unpack(cls, buffer: Bytes) -> "DescriptorTable":
        """Read struct kvm_dtable from the first `SIZE` bytes of `buffer`."""
        return cls(*_TABLE.unpack_from(buffer))
