"""The registers that guests start with: Intel's rules for them, the GDT's, and known values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.errors import ConfigError
from kvmpy.modes import MODES, Layout, build, entry_state
from kvmpy.x86 import tables
from kvmpy.x86.flags import CR0, CR4, EFER, RFLAGS
from kvmpy.x86.paging import PAGE_1G, PAGE_2M, PAGE_4K, is_canonical
from kvmpy.x86.registers import Registers
from kvmpy.x86.segments import Segment
from kvmpy.x86.state import SpecialRegisters

MIB = 1 << 20
STARTS = [(mode, 0) for mode in MODES] + [("protected", 3), ("long", 3)]
WITH_TABLES = STARTS[1:]
INITIAL = SpecialRegisters(apic_base=0xFEE0_0900, cr0=0x6000_0010, cr2=1, cr8=1, efer=1)

starts = st.sampled_from(STARTS)
ram_sizes = st.one_of(
    st.integers(32, 1200), st.integers(32, 3 * 2**18), st.sampled_from([512, 513, 1024, 3 * 2**18])
).map(lambda pages: pages * PAGE_4K)
extra_sizes = st.sampled_from([0, PAGE_4K, PAGE_2M, PAGE_1G, 5 * PAGE_1G + PAGE_4K])


def read(layout: Layout, address: int, size: int) -> bytes:
    offset = address - layout.base
    assert 0 <= offset <= len(layout.data) - size, f"{address:#x} is not in kvmpy's area"
    return layout.data[offset : offset + size]


def check_usable(name: str, segment: Segment) -> None:
    """What holds for each usable segment register (SDM Vol.3 27.3.1.2)."""
    assert segment.present == 1 and segment.unusable == 0, name
    assert segment.limit & 0xFFF == 0xFFF or not segment.g, name
    assert not segment.limit >> 20 or segment.g, name


def check_vm_entry(registers: Registers, special: SpecialRegisters) -> None:
    """The checks that a VM entry makes on the guest's state outside real mode, by section."""
    # 27.3.1.1 control registers
    long_mode = bool(special.efer & EFER.LMA)
    assert special.cr0 & (CR0.PE | CR0.NE) == CR0.PE | CR0.NE
    assert not special.cr0 & (CR0.CD | CR0.NW)
    assert bool(special.efer & EFER.LME) == long_mode == bool(special.cr0 & CR0.PG)
    assert bool(special.cr4 & CR4.PAE) == long_mode
    assert special.cr0 >> 32 == 0 and special.cr3 < 1 << 46
    # 27.3.1.2 segment registers
    cs, ss = special.cs, special.ss
    for name in ("cs", "ss", "ds", "es", "fs", "gs"):
        segment = getattr(special, name)
        check_usable(name, segment)
        assert segment.s == 1 and segment.type & 1 and segment.base >> 32 == 0, name
        assert segment.dpl == segment.selector & 3 == cs.selector & 3, name
        assert segment.selector & 4 == 0, name
    assert cs.type in {9, 11} and ss.type in {3, 7}
    assert not (long_mode and cs.l and cs.db)
    tr, ldt = special.tr, special.ldt
    check_usable("tr", tr)
    assert (tr.type, tr.s, tr.selector & 4) == (0xB, 0, 0)
    assert is_canonical(tr.base)
    assert ldt.unusable == 1 and ldt.present == 0
    # 27.3.1.3 descriptor tables
    assert is_canonical(special.gdt.base) and is_canonical(special.idt.base)
    # 27.3.1.4 RIP, RFLAGS, SSP
    assert is_canonical(registers.rip) and (cs.l or registers.rip >> 32 == 0)
    assert registers.rflags == RFLAGS.FIXED


@given(st.sampled_from(WITH_TABLES), ram_sizes, extra_sizes)
def test_states_pass_intels_checks(start: tuple[str, int], low_ram: int, extra: int) -> None:
    layout = build(*start, low_ram, extra)
    registers, special = entry_state(layout, 0x1000, INITIAL)
    check_vm_entry(registers, special)
    assert special.cs.selector & 3 == layout.ring
    assert (registers.rip, registers.rsp) == (0x1000, layout.stack)


@given(st.sampled_from(WITH_TABLES), ram_sizes, extra_sizes)
def test_hidden_parts_are_what_the_gdt_says(
    start: tuple[str, int], low_ram: int, extra: int
) -> None:
    layout = build(*start, low_ram, extra)
    _, special = entry_state(layout, 0x1000, INITIAL)
    assert special.gdt.base == layout.gdt
    for name in ("cs", "ss", "ds", "es", "fs", "gs", "tr"):
        segment = getattr(special, name)
        size = 16 if name == "tr" and layout.mode == "long" else 8
        index = segment.selector & ~7
        assert index + size <= special.gdt.limit + 1
        descriptor = read(layout, special.gdt.base + index, size)
        assert segment == Segment.from_descriptor(segment.selector, descriptor), name
    assert special.tr.base == layout.tss
    assert special.tr.limit >= tables.TSS_SIZE - 1


@pytest.mark.parametrize(
    ("mode", "ring", "expected"),
    [
        ("real", 0, (0x10, 0, 0, 0, 0)),
        ("protected16", 0, (0x33, 0x600, 0, 0x48, 0x50)),
        ("protected", 0, (0x33, 0x600, 0, 0x18, 0x10)),
        ("protected", 3, (0x33, 0x600, 0, 0x23, 0x2B)),
        ("long", 0, (0x8001_0033, 0x620, 0xD00, 0x08, 0x10)),
        ("long", 3, (0x8001_0033, 0x620, 0xD00, 0x33, 0x2B)),
    ],
)
def test_known_values(mode: str, ring: int, expected: tuple[int, ...]) -> None:
    _, special = entry_state(build(mode, ring, MIB), 0x1000, INITIAL)
    cs, ds = special.cs.selector, special.ds.selector
    assert (special.cr0, special.cr4, special.efer, cs, ds) == expected
    assert (special.cr2, special.cr8, special.apic_base) == (0, 0, INITIAL.apic_base)
    assert special.cs.l == (mode == "long")
    assert special.cs.db == (mode == "protected")


@pytest.mark.parametrize(
    ("low_ram", "base", "pointer"),
    [
        (PAGE_4K, 0, 0x1000),
        (0xF000, 0, 0xF000),
        (0x10000, 0, 0xFFF0),
        (0x20000, 0x10000, 0xFFF0),
        (0xA0000, 0x90000, 0xFFF0),
        (16 * MIB, 0x90000, 0xFFF0),
    ],
)
def test_the_real_mode_stack(low_ram: int, base: int, pointer: int) -> None:
    layout = build("real", 0, low_ram)
    registers, special = entry_state(layout, 0x7C00, INITIAL)
    assert (special.ss.base, special.ss.selector) == (base, base >> 4)
    assert (registers.rsp, layout.stack_base, layout.stack) == (pointer, base, pointer)
    assert (layout.base, layout.data) == (low_ram, b"")


@pytest.mark.parametrize(
    ("entry", "selector", "ip"),
    [
        (0, 0, 0),
        (0x7C00, 0, 0x7C00),
        (0xFFFF, 0, 0xFFFF),
        (0x10000, 0x1000, 0),
        (0x12345, 0x1234, 5),
        (0xFFFFF, 0xFFFF, 0xF),
    ],
)
def test_the_real_mode_entry(entry: int, selector: int, ip: int) -> None:
    registers, special = entry_state(build("real", 0, MIB), entry, INITIAL)
    assert (special.cs.selector, special.cs.base, registers.rip) == (selector, selector << 4, ip)
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(special, name)
        assert segment.base == segment.selector << 4
        assert (segment.limit, segment.s, segment.present, segment.unusable) == (0xFFFF, 1, 1, 0)
        assert segment.type == (0xB if name == "cs" else 3)
    assert (special.idt.base, special.idt.limit) == (0, 0x3FF)
    assert registers.rflags == 2


@given(starts)
def test_each_entry_state_is_fresh(start: tuple[str, int]) -> None:
    layout = build(*start, MIB)
    registers, special = entry_state(layout, 0x1000, INITIAL)
    special.cs.base = special.gdt.limit = registers.rax = 0x77
    again_registers, again = entry_state(layout, 0x1000, INITIAL)
    assert (again.cs.base, again_registers.rax) == (0, 0)
    assert again.gdt.limit != 0x77
    assert INITIAL.cr0 == 0x6000_0010


@pytest.mark.parametrize(
    ("mode", "entry"),
    [
        ("real", 1 << 20),
        ("real", -1),
        ("protected16", 1 << 16),
        ("protected", 1 << 32),
        ("long", 1 << 47),
        ("long", -1),
    ],
)
def test_an_entry_that_the_mode_cannot_reach_is_refused(mode: str, entry: int) -> None:
    with pytest.raises(ConfigError, match="entry"):
        entry_state(build(mode, 0, MIB), entry, INITIAL)
