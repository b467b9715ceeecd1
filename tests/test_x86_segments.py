"""Descriptors, gates, the GDT, the TSS and the stubs, against the SDM's pictures of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.errors import ConfigError
from kvmpy.x86 import tables
from kvmpy.x86.gates import interrupt_gate32, interrupt_gate64
from kvmpy.x86.segments import Segment
from kvmpy.x86.tables import Selector

bit = st.integers(0, 1)


@st.composite
def segments(draw: st.DrawFn, system: bool = False) -> Segment:
    g = draw(bit)
    field = draw(st.integers(0, 0xFFFFF))
    return Segment(
        base=draw(st.integers(0, 2**64 - 1 if system else 2**32 - 1)),
        limit=field << 12 | 0xFFF if g else field,
        selector=draw(st.integers(0, 0xFFFF)),
        type=draw(st.integers(0, 15)),
        present=1,
        dpl=draw(st.integers(0, 3)),
        db=draw(bit),
        s=0 if system else draw(bit),
        l=draw(bit),
        g=g,
        avl=draw(bit),
        unusable=0,
    )


@given(segments())
def test_descriptors_round_trip(segment: Segment) -> None:
    descriptor = segment.descriptor()
    assert len(descriptor) == 8
    assert Segment.from_descriptor(segment.selector, descriptor) == segment


@given(segments(system=True))
def test_system_descriptors_round_trip(segment: Segment) -> None:
    descriptor = segment.system_descriptor()
    assert len(descriptor) == 16
    assert descriptor[12:] == bytes(4)
    assert Segment.from_descriptor(segment.selector, descriptor) == segment


@given(st.binary(min_size=8, max_size=8))
def test_any_present_descriptor_reads_and_writes_back(raw: bytes) -> None:
    segment = Segment.from_descriptor(0x10, raw)
    assert segment.unusable == 1 - segment.present
    assert segment.descriptor() == raw


@pytest.mark.parametrize(
    ("segment", "value"),
    [  # the flat descriptors that every x86 kernel has, with the accessed bit set
        (Segment.code64(0x08), 0x00AF_9B00_0000_FFFF),
        (Segment.code32(0x18), 0x00CF_9B00_0000_FFFF),
        (Segment.data(0x10), 0x00CF_9300_0000_FFFF),
        (Segment.code64(0x33, dpl=3), 0x00AF_FB00_0000_FFFF),
        (Segment.data(0x2B, dpl=3), 0x00CF_F300_0000_FFFF),
        (Segment.code16(0x48), 0x0000_9B00_0000_FFFF),
        (Segment.code16(0x48, base=0x12345678), 0x1200_9B34_5678_FFFF),
        (Segment.data16(0x50), 0x0000_9300_0000_FFFF),
        (Segment.tss(0x38, 0xDEAD_BEEF, 0x67), 0xDE00_8BAD_BEEF_0067),
    ],
)
def test_known_descriptors(segment: Segment, value: int) -> None:
    assert int.from_bytes(segment.descriptor(), "little") == value


def test_a_system_descriptor_has_the_bases_upper_half() -> None:
    tss = Segment.tss(0x38, 0xFFFF_8880_DEAD_BEEF, 0x67)
    low, high = 0xDE00_8BAD_BEEF_0067, 0xFFFF_8880
    assert tss.system_descriptor() == low.to_bytes(8, "little") + high.to_bytes(8, "little")
    with pytest.raises(ConfigError, match="0xffff8880deadbeef"):
        tss.descriptor()


def test_real_mode_segments() -> None:
    code = Segment.real_mode(0xF000, code=True)
    assert (code.base, code.limit, code.type, code.s, code.present) == (0xF0000, 0xFFFF, 0xB, 1, 1)
    assert Segment.real_mode(0x9000).type == 3


@pytest.mark.parametrize(
    ("segment", "named"),
    [
        (Segment(limit=0x1000, g=1), "0x1000"),
        (Segment(limit=0x100000), "0x100000"),
        (Segment(limit=-1), "limit"),
        (Segment(base=-1), "base"),
        (Segment(type=16), "type"),
        (Segment(dpl=4), "dpl"),
        (Segment(db=2), "db"),
    ],
)
def test_a_segment_without_a_descriptor_is_refused(segment: Segment, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        segment.descriptor()


def test_only_system_segments_have_system_descriptors() -> None:
    with pytest.raises(ConfigError, match="s = 0"):
        Segment.data(0x10).system_descriptor()
    with pytest.raises(ConfigError, match="base"):
        Segment(base=1 << 64).system_descriptor()


@pytest.mark.parametrize("size", [0, 7, 9, 15, 17])
def test_a_descriptor_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=str(size)):
        Segment.from_descriptor(8, bytes(size))


def test_gates_by_the_book() -> None:
    gate = interrupt_gate64(0x1122_3344_5566_7788, 0x08, ist=1, dpl=3)
    assert gate.hex() == "88770800" + "01ee6655" + "44332211" + "00000000"
    assert interrupt_gate32(0x1122_3344, 0x18).hex() == "44331800" + "008e2211"


@given(st.integers(0, 2**64 - 1), st.integers(0, 0xFFFF), st.integers(0, 7), st.integers(0, 3))
def test_gate_fields_can_be_read_back(offset: int, selector: int, ist: int, dpl: int) -> None:
    gate = int.from_bytes(interrupt_gate64(offset, selector, ist, dpl), "little")
    assert gate & 0xFFFF | (gate >> 48 & 0xFFFF_FFFF_FFFF) << 16 == offset
    assert (gate >> 16 & 0xFFFF, gate >> 32 & 0xFF) == (selector, ist)
    assert gate >> 40 & 0xFF == 0x8E | dpl << 5
    assert gate >> 96 == 0


def test_a_gates_values_are_checked() -> None:
    for arguments in ((1 << 64, 8), (-1, 8), (0, 1 << 16), (0, 8, 8), (0, 8, 0, 4)):
        with pytest.raises(ConfigError, match="gate"):
            interrupt_gate64(*arguments)
    for arguments in ((1 << 32, 8), (0, -1), (0, 8, 4)):
        with pytest.raises(ConfigError, match="gate"):
            interrupt_gate32(*arguments)


def test_the_gdt_suits_syscall_and_sysret() -> None:
    gdt = tables.gdt(Segment.tss(Selector.TSS, 0x5000, 0x67), long_mode=True)
    assert len(gdt) == tables.GDT_SIZE

    def at(selector: int) -> Segment:
        return Segment.from_descriptor(selector, gdt[selector & ~7 :][:8])

    kernel, user = 0x08, 0x20
    assert at(kernel) == Segment.code64(kernel)  # SYSCALL: CS, then SS
    assert at(kernel + 8) == Segment.data(kernel + 8)
    assert at(user | 3) == Segment.code32(user | 3, dpl=3)  # SYSRET: 32-bit CS, SS, 64-bit CS
    assert at(user + 8 | 3) == Segment.data(user + 8 | 3, dpl=3)
    assert at(user + 16 | 3) == Segment.code64(user + 16 | 3, dpl=3)
    assert gdt[:8] == bytes(8)


def test_a_64_bit_tss_by_the_book() -> None:
    tss = tables.tss64(0x1111, 0x2222)
    assert len(tss) == tables.TSS_SIZE == 104
    assert int.from_bytes(tss[4:12], "little") == 0x1111
    assert int.from_bytes(tss[36:44], "little") == 0x2222
    assert int.from_bytes(tss[102:104], "little") == 104


def test_a_32_bit_tss_by_the_book() -> None:
    tss = tables.tss32(0x1111)
    assert len(tss) == tables.TSS_SIZE
    assert int.from_bytes(tss[4:8], "little") == 0x1111
    assert int.from_bytes(tss[8:10], "little") == Selector.DATA
    assert int.from_bytes(tss[102:104], "little") == 104


@pytest.mark.parametrize("make", [tables.tss64, tables.tss32])
def test_an_open_io_bitmap_has_a_zero_for_every_port(make: object) -> None:
    tss = make(0, open_ports=True)  # type: ignore[operator]
    start = int.from_bytes(tss[102:104], "little")
    assert tss[start:] == bytes(8192) + b"\xff"


def test_stubs_report_and_halt() -> None:
    stubs = tables.stubs()
    assert len(stubs) == 256 * tables.STUB_SIZE
    assert stubs[:5].hex() == "e6f1f4ebfd"  # out 0xf1, al; hlt; jmp to the hlt
    jump_end, displacement = 5, int.from_bytes(stubs[4:5], "little", signed=True)
    assert stubs[jump_end + displacement] == 0xF4
    assert stubs == stubs[: tables.STUB_SIZE] * 256


@pytest.mark.parametrize("wide", [True, False])
def test_each_vector_has_its_stub(wide: bool) -> None:
    first = 0x12_3450
    size = 16 if wide else 8
    idt = tables.idt64(first) if wide else tables.idt32(first)
    assert len(idt) == 256 * size
    for vector in range(256):
        ist, dpl = int(wide and vector == 8), 3 if vector in {3, 4} else 0
        offset = first + vector * tables.STUB_SIZE
        expected = (
            interrupt_gate64(offset, Selector.CODE64, ist, dpl)
            if wide
            else interrupt_gate32(offset, Selector.CODE32, dpl)
        )
        assert idt[vector * size :][:size] == expected
