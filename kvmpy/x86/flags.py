"""Bits of CR0, CR4, EFER and RFLAGS (SDM Vol.3 2.5, 2.2.1; Vol.1 3.4.3; APM Vol.2 3.1).

Bits without a name are kept through | and &, but `~CR0.PE` has named bits only: to clear a bit of
a value that may have others, write `value & ~int(CR0.PE)`.
"""

from enum import KEEP, IntFlag
from typing import Final, Self

__all__ = ["CR0", "CR4", "EFER", "RFLAGS", "RFLAGS_RESERVED", "may_be_rflags"]


class _Bits(IntFlag, boundary=KEEP):
    """Flags of which each with a name has a `meaning`, a sentence; combined ones have none."""

    meaning: str

    def __new__(cls, value: int, meaning: str = "") -> Self:
        """A member of that value and meaning."""
        self = int.__new__(cls, value)
        self._value_ = value
        self.meaning = meaning
        return self


class CR0(_Bits, boundary=KEEP):
    """Control register 0 (SDM Vol.3 2.5)."""

    PE = 1 << 0, "Protection enable: protected mode."
    MP = 1 << 1, "Monitor coprocessor: WAIT obeys TS."
    EM = 1 << 2, "Emulation: x87 instructions raise #NM, SSE ones #UD."
    TS = 1 << 3, "Task switched: the next x87 or SSE instruction raises #NM."
    ET = 1 << 4, "Extension type: always one."
    NE = 1 << 5, "Numeric error: x87 errors raise #MF."
    WP = 1 << 16, "Write protect: the supervisor obeys read-only pages."
    AM = 1 << 18, "Alignment mask: RFLAGS.AC has effect."
    NW = 1 << 29, "Not write-through."
    CD = 1 << 30, "Cache disable."
    PG = 1 << 31, "Paging."


class CR4(_Bits, boundary=KEEP):
    """Control register 4 (SDM Vol.3 2.5)."""

    VME = 1 << 0, "Virtual-8086 mode extensions."
    PVI = 1 << 1, "Protected-mode virtual interrupts."
    TSD = 1 << 2, "Time stamp disable: RDTSC needs ring 0."
    DE = 1 << 3, "Debugging extensions."
    PSE = 1 << 4, "Page size extensions: 4 MiB pages with 32-bit paging."
    PAE = 1 << 5, "Physical address extension; long mode needs it."
    MCE = 1 << 6, "Machine-check enable."
    PGE = 1 << 7, "Global pages."
    PCE = 1 << 8, "RDPMC at any ring."
    OSFXSR = 1 << 9, "The system saves SSE state: SSE instructions are enabled."
    OSXMMEXCPT = 1 << 10, "The system handles #XM."
    UMIP = 1 << 11, "SGDT, SIDT, SLDT, SMSW and STR need ring 0."
    LA57 = 1 << 12, "Five-level paging."
    VMXE = 1 << 13, "VMX enable."
    SMXE = 1 << 14, "SMX enable."
    FSGSBASE = 1 << 16, "RDFSBASE and its kin."
    PCIDE = 1 << 17, "Process-context identifiers."
    OSXSAVE = 1 << 18, "XSAVE, XGETBV and XSETBV."
    KL = 1 << 19, "Key locker."
    SMEP = 1 << 20, "No supervisor execution of user pages."
    SMAP = 1 << 21, "No supervisor access to user pages."
    PKE = 1 << 22, "Protection keys of user pages."
    CET = 1 << 23, "Control-flow enforcement."
    PKS = 1 << 24, "Protection keys of supervisor pages."
    UINTR = 1 << 25, "User interrupts."
    LASS = 1 << 27, "Linear address space separation."
    LAM_SUP = 1 << 28, "Linear address masking of supervisor addresses."
    FRED = 1 << 32, "Flexible return and event delivery."


class EFER(_Bits, boundary=KEEP):
    """Extended feature enable register, MSR 0xc0000080 (SDM Vol.3 2.2.1; APM Vol.2 3.1.7)."""

    SCE = 1 << 0, "SYSCALL and SYSRET."
    LME = 1 << 8, "Long mode enable."
    LMA = 1 << 10, "Long mode active: LME and paging are both on."
    NXE = 1 << 11, "The no-execute bit of page-table entries."
    SVME = 1 << 12, "SVM enable (AMD)."
    LMSLE = 1 << 13, "Segment limits in long mode (AMD)."
    FFXSR = 1 << 14, "Fast FXSAVE and FXRSTOR (AMD)."
    TCE = 1 << 15, "Translation cache extension (AMD)."
    MCOMMIT = 1 << 17, "MCOMMIT instruction (AMD)."
    INTWB = 1 << 18, "Interruptible WBINVD (AMD)."
    UAIE = 1 << 20, "Upper address ignore (AMD)."
    AIBRSE = 1 << 21, "Automatic IBRS (AMD)."


class RFLAGS(_Bits, boundary=KEEP):
    """The flags register (SDM Vol.1 3.4.3); IOPL is a two-bit field."""

    CF = 1 << 0, "Carry."
    FIXED = 1 << 1, "Always one."
    PF = 1 << 2, "Parity."
    AF = 1 << 4, "Auxiliary carry."
    ZF = 1 << 6, "Zero."
    SF = 1 << 7, "Sign."
    TF = 1 << 8, "Trap: a #DB after each instruction."
    IF = 1 << 9, "External interrupts are taken."
    DF = 1 << 10, "Direction: string instructions go down."
    OF = 1 << 11, "Overflow."
    IOPL = 3 << 12, "I/O privilege level: the highest ring that may use any port."
    NT = 1 << 14, "Nested task."
    RF = 1 << 16, "Resume: no instruction breakpoint at the next instruction."
    VM = 1 << 17, "Virtual-8086 mode."
    AC = 1 << 18, "Alignment check, or access control with SMAP."
    VIF = 1 << 19, "Virtual interrupt flag."
    VIP = 1 << 20, "Virtual interrupt pending."
    ID = 1 << 21, "CPUID is there where software can change this bit."


# IOPL, of two bits, is none of those that an iteration over the class gives; and as flags, ~ would
# invert bits with names only.
RFLAGS_RESERVED: Final = ~(sum(RFLAGS) | int(RFLAGS.IOPL))
"""The bits that RFLAGS cannot have."""


def may_be_rflags(word: int) -> bool:
    """Whether RFLAGS can be that. With bit 1, which is always set, an address hardly is."""
    return bool(word & RFLAGS.FIXED) and not word & RFLAGS_RESERVED
