"""The tables that a guest of kvmpy starts with: GDT, TSS, IDT and its reporting stubs, as bytes.

    GDT   0x00 null                        0x28 data, ring 3
          0x08 64-bit code, ring 0         0x30 64-bit code, ring 3
          0x10 data, ring 0                0x38 TSS (16 bytes in long mode, else 8)
          0x18 32-bit code, ring 0         0x48 16-bit code, ring 0, base 0
          0x20 32-bit code, ring 3         0x50 16-bit data, ring 0, base 0

The order suits SYSCALL (CS = 0x08, SS = CS + 8) and SYSRET with a base of 0x20 (32-bit CS = base,
SS = base + 8, 64-bit CS = base + 16), that is STAR = 0x0020_0008 << 32 (SDM Vol.3 5.8.8). All
accessed bits and the TSS's busy bit are set, so that the processor never writes to the GDT.
"""

import struct
from enum import IntEnum

from kvmpy.x86.gates import interrupt_gate32, interrupt_gate64
from kvmpy.x86.segments import Segment

__all__ = [
    "EXCEPTION_PORT",
    "GDT_SIZE",
    "IO_BITMAP_SIZE",
    "STUB_SIZE",
    "TSS_SIZE",
    "VECTORS",
    "Selector",
    "gdt",
    "idt32",
    "idt64",
    "stubs",
    "tss32",
    "tss64",
]

EXCEPTION_PORT = 0xF1
"""The port that a reporting stub writes to."""

STUB_SIZE = 16
"""Bytes from one reporting stub to the next."""

VECTORS = 256
"""The vectors of an IDT."""

TSS_SIZE = 104
"""Bytes of a 32-bit or 64-bit TSS without an I/O permission bitmap (SDM Vol.3 8.2.1, 8.7)."""

IO_BITMAP_SIZE = 65536 // 8 + 1
"""A bit for each port, and the byte of ones that must end the bitmap (SDM Vol.1 19.5.2)."""


class Selector(IntEnum):
    """The GDT's selectors; those of ring 3 have it as their requested privilege level."""

    NULL = 0x00
    CODE64 = 0x08
    DATA = 0x10
    CODE32 = 0x18
    USER_CODE32 = 0x20 | 3
    USER_DATA = 0x28 | 3
    USER_CODE64 = 0x30 | 3
    TSS = 0x38
    CODE16 = 0x48
    DATA16 = 0x50


GDT_SIZE = 0x58
"""Bytes of the GDT."""

_BREAKPOINT, _OVERFLOW, _DOUBLE_FAULT = 3, 4, 8


def gdt(tss: Segment, *, long_mode: bool) -> bytes:
    """Return the GDT with `tss` in it; `long_mode` makes the TSS descriptor one of 16 bytes."""
    return b"".join(
        (
            bytes(8),
            Segment.code64(Selector.CODE64).descriptor(),
            Segment.data(Selector.DATA).descriptor(),
            Segment.code32(Selector.CODE32).descriptor(),
            Segment.code32(Selector.USER_CODE32, dpl=3).descriptor(),
            Segment.data(Selector.USER_DATA, dpl=3).descriptor(),
            Segment.code64(Selector.USER_CODE64, dpl=3).descriptor(),
            tss.system_descriptor() if long_mode else tss.descriptor() + bytes(8),
            Segment.code16(Selector.CODE16).descriptor(),
            Segment.data16(Selector.DATA16).descriptor(),
        )
    )


def tss64(rsp0: int = 0, ist1: int = 0, *, open_ports: bool = False) -> bytes:
    """Return a 64-bit TSS (SDM Vol.3 figure 8-11).

    `rsp0` is the stack for entries from ring 3, `ist1` that of gates with ist = 1. With
    `open_ports` an I/O permission bitmap follows that opens every port to ring 3.
    """
    return struct.pack("<4xQ24xQ58xH", rsp0, ist1, TSS_SIZE) + _io_bitmap(open_ports)


def tss32(esp0: int = 0, *, open_ports: bool = False) -> bytes:
    """Return a 32-bit TSS (SDM Vol.3 figure 8-2) whose ring-0 stack is `esp0` in `Selector.DATA`.

    With `open_ports` an I/O permission bitmap follows that opens every port to ring 3.
    """
    return struct.pack("<4xIH92xH", esp0, Selector.DATA, TSS_SIZE) + _io_bitmap(open_ports)


def _io_bitmap(open_ports: bool) -> bytes:
    # Without a bitmap, its offset lies at the limit, and every port is closed.
    return bytes(IO_BITMAP_SIZE - 1) + b"\xff" if open_ports else b""


def stubs() -> bytes:
    """Return the 256 reporting stubs: code that is the same in 32-bit and 64-bit mode.

    Each writes to `EXCEPTION_PORT` and halts for ever. It changes no register: at the exit, RIP
    says which stub it is, and RSP points at what the processor pushed.
    """
    code = bytes(
        (
            *(0xE6, EXCEPTION_PORT),  # out EXCEPTION_PORT, al
            0xF4,  # hlt
            *(0xEB, 0xFD),  # jmp to the hlt
        )
    )
    return code.ljust(STUB_SIZE, b"\xcc") * VECTORS


def idt64(first_stub: int) -> bytes:
    """Return a long-mode IDT whose vector n leads to stub n; the double fault takes IST 1.

    Only int3 (3) and overflow (4) are open to ring 3: any other `int n` there is a #GP.
    """
    return b"".join(
        interrupt_gate64(
            first_stub + vector * STUB_SIZE,
            Selector.CODE64,
            ist=1 if vector == _DOUBLE_FAULT else 0,
            dpl=_gate_dpl(vector),
        )
        for vector in range(VECTORS)
    )


def idt32(first_stub: int) -> bytes:
    """Return a protected-mode IDT whose vector n leads to stub n, open to ring 3 as `idt64`."""
    return b"".join(
        interrupt_gate32(first_stub + vector * STUB_SIZE, Selector.CODE32, _gate_dpl(vector))
        for vector in range(VECTORS)
    )


def _gate_dpl(vector: int) -> int:
    return 3 if vector in {_BREAKPOINT, _OVERFLOW} else 0
