"""All views of one vCPU's state and the memory beside it: of a machine's, or of a snapshot's."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, get_args

from kvmpy.errors import ConfigError
from kvmpy.views.code import CodeView, HexView, disassemble, hexdump
from kvmpy.views.descriptors import DescriptorView, gdt_view, ldt_view
from kvmpy.views.gates import GateView, idt_view
from kvmpy.views.pages import Access, PageWalk, Read, page_walk
from kvmpy.views.ranges import MapView, page_map
from kvmpy.views.registers import ControlView, RegistersView, SegmentsView
from kvmpy.views.symbols import Symbols
from kvmpy.views.taskstate import TssView, tss_view
from kvmpy.x86.flags import RFLAGS
from kvmpy.x86.registers import Registers
from kvmpy.x86.state import CPUIDEntry, SpecialRegisters

__all__ = ["Processor", "StateView"]

_WITHOUT_LEAF = 36


class Processor(NamedTuple):
    """What of a vCPU's CPUID decides which bits of page-table entries are reserved."""

    physical_bits: int = 52
    gigabyte_pages: bool = True

    @classmethod
    def of(cls, leaves: Iterable[CPUIDEntry]) -> "Processor":
        """By leaves 0x80000008, EAX (SDM Vol.3 4.1.4), and 0x80000001, EDX bit 26."""
        bits, pages = _WITHOUT_LEAF, False
        for leaf in leaves:
            if leaf.function == 0x8000_0008:
                bits = leaf.eax & 0xFF
            elif leaf.function == 0x8000_0001:
                pages = bool(leaf.edx & 1 << 26)
        return cls(bits, pages)


class StateView:
    """Views of a vCPU's state. Each prints, and shows itself in a notebook.

    `read` gives bytes of RAM or None (see `kvmpy.views.pages.reader`); `processor` says what
    is reserved in page tables.
    """

    def __init__(
        self,
        read: Read,
        registers: Registers,
        special: SpecialRegisters,
        *,
        processor: Processor = Processor(),  # noqa: B008 - a value
        symbols: Mapping[str, int] | None = None,
    ) -> None:
        self._read, self._registers, self._special = read, registers, special
        self._of, self._symbols = processor, symbols

    # What a subclass asks for anew each time.

    def _regs(self) -> Registers:
        return self._registers

    def _sregs(self) -> SpecialRegisters:
        return self._special

    def _processor(self) -> Processor:
        return self._of

    def registers(self) -> RegistersView:
        """The general registers, RIP, and RFLAGS with its bits named."""
        return RegistersView(self._regs())

    def control(self) -> ControlView:
        """CR0, CR3, CR4, EFER and so on, bit by bit, and the mode that they make."""
        return ControlView(self._sregs())

    def segments(self) -> SegmentsView:
        """The segment registers with their hidden parts, GDTR and IDTR."""
        return SegmentsView(self._sregs())

    def gdt(self) -> DescriptorView:
        """The GDT, entry by entry, from guest memory."""
        return gdt_view(self._read, self._sregs())

    def ldt(self) -> DescriptorView:
        """The LDT, if there is one."""
        return ldt_view(self._read, self._sregs())

    def idt(self) -> GateView:
        """The IDT, or real mode's vectors, gate by gate, from guest memory."""
        return idt_view(self._read, self._sregs())

    def tss(self) -> TssView:
        """The TSS that TR leads to: stacks, the IST, open ports."""
        return tss_view(self._read, self._sregs())

    def walk(self, address: int, access: Access = "read", cpl: int | None = None) -> PageWalk:
        """The page walk for a linear address, level by level, and whether `access` is allowed.

        `access` is "read", "write" or "fetch", and `cpl`, 0 to 3, by default the ring that the
        vCPU is in. Raises ConfigError for others, AddressError for what is no 64-bit number.
        """
        if access not in get_args(Access):
            raise ConfigError(f"access={access!r}: use one of {', '.join(get_args(Access))}")
        if cpl not in (None, 0, 1, 2, 3):
            raise ConfigError(f"cpl={cpl!r}: rings are 0 to 3")
        ac = bool(self._regs().rflags & RFLAGS.AC)
        kind = self._processor()._asdict()
        return page_walk(self._read, self._sregs(), address, access, cpl=cpl, ac=ac, **kind)

    def map(self) -> MapView:
        """All that the page tables map, merged into ranges."""
        return page_map(self._read, self._sregs(), **self._processor()._asdict())

    def disassemble(self, address: int | None = None, count: int = 8) -> CodeView:
        """Instructions from `address` on, an offset in CS; by default where the vCPU is."""
        registers = self._regs()
        return disassemble(
            self._read,
            self._sregs(),
            registers.rip if address is None else address,
            count,
            rflags=registers.rflags,
            symbols=Symbols(self._symbols),
        )

    def hexdump(self, address: int, length: int = 128, *, linear: bool = True) -> HexView:
        """Bytes of memory at a linear, or else guest-physical, address."""
        return hexdump(self._read, self._sregs(), address, length, linear=linear)
