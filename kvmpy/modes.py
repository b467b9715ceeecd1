"""The state that a guest starts in: what kvmpy puts in its memory, and the registers.

kvmpy takes the TOP of low RAM, and nothing below it:

    4 GiB ........ +------------------------+
                   | extra RAM (long mode)  |  identity-mapped, as are the first 4 GiB
    low_ram ...... +------------------------+
                   | kernel stack, IST 1    |  ring 3 only
                   | TSS, I/O bitmap        |
                   | GDT                    |  the selectors: kvmpy.x86.tables
                   | IDT                    |  ring 3 only: vector n leads to stub n
                   | reporting stubs        |  ring 3 only: 256 of 16 bytes
                   | page tables            |  long mode only
    base ......... +------------------------+
                   | stack, growing down    |
                   | ...                    |  the guest's
    load ......... | image                  |  0x1000; 0x7c00 in real mode
    0 ............ +------------------------+

mode         paging  CS          other segments        stack pointer
real         off     0, 64 KiB   0, 64 KiB             0xfff0 in the last 64 KiB below 0xa0000
protected16  off     0, 64 KiB   0, 64 KiB             base or 0xfff0, whichever is less
protected    off     0, 4 GiB    0, 4 GiB              base
long         2 MiB   64-bit      64-bit                base

In real mode kvmpy puts nothing in memory. In ring 0 the IDT is empty: a guest that wants
exceptions brings its own, and until then one is a triple fault. In ring 3 all ports are open
through the I/O bitmap, and every vector leads to a stub that reports it through
`EXCEPTION_PORT`; HLT is one of them, a #GP. In long mode kvmpy's area belongs to the supervisor,
in 4 KiB pages, while protected mode has no paging to protect it with. Page-table entries are
accessed and dirty from the start, so that the processor writes to nothing of kvmpy's but the
kernel stacks.

Sources: SDM Vol.3 10.9 (mode switches), 27.3.1 (what a VM entry demands of the guest's state);
chapters are counted as in the editions of 2022 (paging 4, interrupts 6, tasks 8, VM entry 27).
"""

from dataclasses import dataclass
from functools import lru_cache

from kvmpy.errors import AddressError, ConfigError
from kvmpy.x86.area import Region, build_area
from kvmpy.x86.flags import CR0, CR4, EFER
from kvmpy.x86.paging import PAGE_1G, PAGE_4K, is_canonical
from kvmpy.x86.registers import Registers
from kvmpy.x86.segments import DescriptorTable, Segment
from kvmpy.x86.state import SpecialRegisters
from kvmpy.x86.tables import EXCEPTION_PORT, GDT_SIZE, STUB_SIZE, VECTORS, Selector

__all__ = [
    "DEFAULT_LOAD",
    "EXCEPTION_PORT",
    "MODES",
    "STUB_SIZE",
    "Layout",
    "Region",
    "build",
    "entry_state",
]

MODES = ("real", "protected16", "protected", "long")
"""The modes that a guest can start in."""

DEFAULT_LOAD = {"real": 0x7C00, "protected16": 0x1000, "protected": 0x1000, "long": 0x1000}
"""Where an image is loaded that says nothing else; 0x7c00 is where a BIOS loads a boot sector."""

_RING3_MODES = ("protected", "long")
_LOW_RAM_END = 3 * PAGE_1G
_REAL_RAM_END = 0xA0000
_SEGMENT_SIZE = 0x10000
_SEGMENT_STACK = 0xFFF0
_STUBS_SIZE = VECTORS * STUB_SIZE

_CR0_PROTECTED = CR0.PE | CR0.MP | CR0.ET | CR0.NE
_CR4_SSE = CR4.OSFXSR | CR4.OSXMMEXCPT
_BITS = {"real": 20, "protected16": 16, "protected": 32}


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where kvmpy's things are in a guest's memory, and their bytes.

    `data` is to be written at `base`, from where on low RAM is kvmpy's; in real mode there is
    none of it, and `base` is `low_ram`. `stack` is the initial stack pointer, a multiple of 16,
    counted from `stack_base`, the stack segment's base, which is 0 but in real mode. The
    addresses of what a mode does not have are None; `stubs` is that of vector 0's stub.
    """

    mode: str
    ring: int
    low_ram: int
    extra_ram: int
    base: int
    data: bytes
    stack: int
    stack_base: int = 0
    gdt: int | None = None
    idt: int | None = None
    tss: int | None = None
    page_tables: int | None = None
    stubs: int | None = None
    regions: tuple[Region, ...] = ()

    def describe(self) -> tuple[Region, ...]:
        """Return the rows of a memory map of low RAM, from address 0 upwards."""
        top = self.stack_base + self.stack
        rows = [Region(0, top, "guest, stack at its top")]
        if top < self.base:
            rows.append(Region(top, self.base, "guest"))
        return (*rows, *self.regions)

    def check_load(self, address: int, size: int) -> None:
        """Raise AddressError for an image that would cover what kvmpy keeps in low RAM."""
        if address < self.low_ram and address + size > self.base:
            raise AddressError(
                f"an image of {size} bytes at {address:#x} does not fit: the guest's RAM is "
                f"[0x0, {self.base:#x}), and kvmpy keeps its tables above that; "
                "give the machine more memory or another address"
            )

    def vector_at(self, rip: int) -> int | None:
        """Return the vector of the reporting stub that holds `rip`, None where none does."""
        if self.stubs is None or not self.stubs <= rip < self.stubs + _STUBS_SIZE:
            return None
        return (rip - self.stubs) // STUB_SIZE


@lru_cache(maxsize=16)
def build(mode: str, ring: int, low_ram: int, extra_ram: int = 0) -> Layout:
    """Return the layout of a guest that starts in `mode` at `ring`.

    `low_ram` is the size of the RAM at address 0 and `extra_ram` that of the RAM at 4 GiB, both
    in bytes and multiples of 4 KiB; low RAM ends at 3 GiB at the latest. Raises ConfigError for
    anything else, for an unknown mode, a ring that the mode does not have (0; or 3 in protected
    and long mode), and where low RAM is too small.
    """
    _check(mode, ring, low_ram, extra_ram)
    if mode == "real":
        top = min(low_ram, _REAL_RAM_END)
        stack_base = max(top - _SEGMENT_SIZE, 0)
        stack = min(top - stack_base, _SEGMENT_STACK)
        return Layout(mode, ring, low_ram, extra_ram, low_ram, b"", stack, stack_base)
    area = build_area(long_mode=mode == "long", ring=ring, low_ram=low_ram, extra_ram=extra_ram)
    at = {region.name: region.start for region in area.regions}
    return Layout(
        mode,
        ring,
        low_ram,
        extra_ram,
        base=area.base,
        data=area.data,
        stack=min(area.base, _SEGMENT_STACK) if mode == "protected16" else area.base,
        gdt=at["GDT"],
        idt=at.get("IDT"),
        tss=at["TSS"],
        page_tables=at.get("page tables"),
        stubs=at.get("reporting stubs"),
        regions=area.regions,
    )


def _check(mode: str, ring: int, low_ram: int, extra_ram: int) -> None:
    if mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}; use one of {', '.join(MODES)}")
    if ring not in (0, 3) or (ring and mode not in _RING3_MODES):
        raise ConfigError(
            f"{mode} mode cannot start in ring {ring!r}; use ring 0, or 3 in "
            f"{' or '.join(_RING3_MODES)} mode"
        )
    if low_ram <= 0 or low_ram % PAGE_4K or low_ram > _LOW_RAM_END:
        raise ConfigError(f"low RAM of {low_ram:#x} bytes: use a multiple of 4096 up to 3 GiB")
    if extra_ram < 0 or extra_ram % PAGE_4K:
        raise ConfigError(f"extra RAM of {extra_ram:#x} bytes: use a multiple of 4096")


def entry_state(
    layout: Layout, entry: int, initial: SpecialRegisters
) -> tuple[Registers, SpecialRegisters]:
    """Return fresh registers that start a guest of `layout` at the address `entry`.

    Of `initial`, a vCPU's state after its creation, the APIC base and the interrupt bitmap are
    kept. Raises ConfigError where the mode cannot start at `entry`.
    """
    _check_entry(layout.mode, entry)
    special = SpecialRegisters.unpack(_start(layout))
    special.apic_base = initial.apic_base
    special.interrupt_bitmap = initial.interrupt_bitmap
    if layout.mode == "real" and entry >= _SEGMENT_SIZE:
        special.cs = Segment.real_mode(entry >> 4, code=True)
        entry &= 0xF
    return Registers(rip=entry, rsp=layout.stack), special


def _check_entry(mode: str, entry: int) -> None:
    bits = _BITS.get(mode)
    if bits is None:
        if not is_canonical(entry):
            raise ConfigError(f"entry {entry:#x} is not a canonical address")
    elif not 0 <= entry < 1 << bits:
        raise ConfigError(f"entry {entry:#x} is beyond the {bits} address bits of {mode} mode")


@lru_cache(maxsize=16)
def _start(layout: Layout) -> bytes:
    """Return the special registers of a layout as bytes: unpacking makes a fresh object."""
    return (_real_start(layout) if layout.mode == "real" else _protected_start(layout)).pack()


def _real_start(layout: Layout) -> SpecialRegisters:
    data = Segment.real_mode(0)
    return SpecialRegisters(
        cs=Segment.real_mode(0, code=True),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=Segment.real_mode(layout.stack_base >> 4),
        tr=Segment.tss(0, 0, 0xFFFF),
        ldt=Segment.no_ldt(),
        gdt=DescriptorTable(0, 0xFFFF),
        idt=DescriptorTable(0, 0x3FF),
        cr0=CR0.ET,
    )


_SELECTORS = {
    ("protected16", 0): (Selector.CODE16, Selector.DATA16),
    ("protected", 0): (Selector.CODE32, Selector.DATA),
    ("protected", 3): (Selector.USER_CODE32, Selector.USER_DATA),
    ("long", 0): (Selector.CODE64, Selector.DATA),
    ("long", 3): (Selector.USER_CODE64, Selector.USER_DATA),
}


def _protected_start(layout: Layout) -> SpecialRegisters:
    assert layout.gdt is not None
    long_mode = layout.mode == "long"
    gdt = layout.data[layout.gdt - layout.base :][:GDT_SIZE]
    idt_limit = VECTORS * (16 if long_mode else 8) - 1

    def load(selector: Selector, size: int = 8) -> Segment:
        return Segment.from_descriptor(selector, gdt[selector & ~7 :][:size])

    code, data = _SELECTORS[layout.mode, layout.ring]
    return SpecialRegisters(
        cs=load(code),
        ds=load(data),
        es=load(data),
        fs=load(data),
        gs=load(data),
        ss=load(data),
        tr=load(Selector.TSS, 16 if long_mode else 8),
        ldt=Segment.no_ldt(),
        gdt=DescriptorTable(layout.gdt, GDT_SIZE - 1),
        idt=DescriptorTable() if layout.idt is None else DescriptorTable(layout.idt, idt_limit),
        cr0=_CR0_PROTECTED | (CR0.WP | CR0.PG if long_mode else 0),
        cr3=layout.page_tables or 0,
        cr4=_CR4_SSE | (CR4.PAE if long_mode else 0),
        efer=EFER.LME | EFER.LMA | EFER.NXE if long_mode else 0,
    )
