"""What kvmpy puts at the top of a guest's memory: the map, the tables in it, and refusals."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy import modes
from kvmpy.errors import ConfigError
from kvmpy.modes import DEFAULT_LOAD, EXCEPTION_PORT, MODES, STUB_SIZE, Layout, build, entry_state
from kvmpy.x86 import tables
from kvmpy.x86.paging import PAGE_1G, PAGE_2M, PAGE_4K, PageFlags, Walk, walk
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


def translate(layout: Layout, virtual: int) -> Walk:
    assert layout.page_tables is not None
    return walk(
        lambda address: int.from_bytes(read(layout, address, 8), "little"),
        layout.page_tables,
        virtual,
    )


@given(starts, ram_sizes, extra_sizes)
def test_the_area_is_at_the_top_and_the_stack_under_it(
    start: tuple[str, int], low_ram: int, extra: int
) -> None:
    layout = build(*start, low_ram, extra)
    assert layout.base + len(layout.data) == low_ram
    assert layout.base % PAGE_4K == 0
    assert layout.stack % 16 == 0
    assert 0 < layout.stack_base + layout.stack <= layout.base
    end = 0
    for region in layout.describe():
        assert end <= region.start < region.end <= low_ram, region
        end = region.end
    assert layout.describe()[0].end == layout.stack_base + layout.stack


@given(st.sampled_from([0, 3]), ram_sizes, extra_sizes, st.data())
def test_long_mode_maps_each_address_to_itself(
    ring: int, low_ram: int, extra: int, data: st.DataObject
) -> None:
    layout = build("long", ring, low_ram, extra)
    end = 4 * PAGE_1G + extra
    anywhere = data.draw(st.integers(0, end - 1))
    edges = {layout.base - 1, layout.base, low_ram - 1, low_ram, end - 1}
    for address in (0, anywhere, *edges):
        found = translate(layout, address)
        kvmpys = layout.base <= address < low_ram
        assert found.physical == address
        assert found.flags & PageFlags.WRITE and not found.flags & PageFlags.NX
        assert bool(found.flags & PageFlags.USER) == (ring == 3 and not kvmpys)
    beyond = -(-end // PAGE_2M) * PAGE_2M
    for address in (beyond, 1 << 46, 0xFFFF_8000_0000_0000, (1 << 64) - 1):
        assert translate(layout, address).physical is None


@pytest.mark.parametrize("pages_over", [-1, 0, 1, 6, 12, 13, 14])
def test_the_area_may_lie_across_2_mib_pages(pages_over: int) -> None:
    low_ram = 2 * PAGE_2M + pages_over * PAGE_4K
    layout = build("long", 3, low_ram)
    assert layout.base + len(layout.data) == low_ram
    for address in (layout.base - 1, layout.base, 2 * PAGE_2M, low_ram - 1, low_ram):
        user = bool(translate(layout, address).flags & PageFlags.USER)
        assert user == (not layout.base <= address < low_ram)


@given(st.sampled_from([0, 3]), ram_sizes, st.integers(0, 4 * PAGE_1G - 1))
def test_no_entry_is_left_for_the_processor_to_mark(ring: int, low_ram: int, where: int) -> None:
    found = translate(build("long", ring, low_ram), where)
    assert all(level.entry & PageFlags.ACCESSED for level in found.levels)
    assert found.flags & PageFlags.DIRTY


def test_ring_0_has_no_idt_and_closed_ports() -> None:
    for mode in ("protected16", "protected", "long"):
        layout = build(mode, 0, MIB)
        _, special = entry_state(layout, 0x1000, INITIAL)
        assert (special.idt.base, special.idt.limit) == (0, 0)
        assert (layout.idt, layout.stubs, layout.vector_at(layout.base)) == (None, None, None)
        assert special.tr.limit == 103


@pytest.mark.parametrize("mode", ["protected", "long"])
def test_ring_3_reports_every_vector_and_opens_every_port(mode: str) -> None:
    layout = build(mode, 3, MIB)
    _, special = entry_state(layout, 0x1000, INITIAL)
    assert layout.idt is not None and layout.stubs is not None and layout.tss is not None
    wide = mode == "long"
    idt = tables.idt64(layout.stubs) if wide else tables.idt32(layout.stubs)
    assert (special.idt.base, special.idt.limit + 1) == (layout.idt, len(idt))
    assert read(layout, layout.idt, len(idt)) == idt
    assert read(layout, layout.stubs, 256 * STUB_SIZE) == tables.stubs()
    tss = read(layout, special.tr.base, special.tr.limit + 1)
    assert tss[tables.TSS_SIZE :] == bytes(8192) + b"\xff"
    rows = {region.name: region for region in layout.regions}
    stack, ist1 = rows["kernel stack"], rows["IST 1 stack"]
    assert int.from_bytes(tss[4 : 12 if wide else 8], "little") == stack.end
    assert stack.end - stack.start >= 1024 and ist1.end - ist1.start >= 1024
    if wide:
        assert int.from_bytes(tss[36:44], "little") == ist1.end == layout.low_ram
    assert stack.end % 16 == 0 and stack.start >= layout.tss + len(tss)


def test_a_stubs_address_gives_its_vector() -> None:
    layout = build("long", 3, MIB)
    assert layout.stubs is not None
    for vector in range(256):
        for inside in (0, 2, STUB_SIZE - 1):
            assert layout.vector_at(layout.stubs + vector * STUB_SIZE + inside) == vector
    assert layout.vector_at(layout.stubs - 1) is None
    assert layout.vector_at(layout.stubs + 256 * STUB_SIZE) is None
    assert layout.vector_at(0x1000) is None


def test_layouts_are_cached() -> None:
    assert build("long", 3, MIB) is build("long", 3, MIB)


@pytest.mark.parametrize(("mode", "ring"), WITH_TABLES)
def test_the_least_size_is_said_and_true(mode: str, ring: int) -> None:
    with pytest.raises(ConfigError, match=r"at least \d+ KiB") as caught:
        build(mode, ring, PAGE_4K)
    least = int(str(caught.value).split("at least ")[1].split(" KiB")[0]) << 10
    assert least <= 64 << 10
    assert build(mode, ring, least).base == 2 * PAGE_4K
    with pytest.raises(ConfigError, match=f"at least {least >> 10} KiB"):
        build(mode, ring, least - PAGE_4K)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("virtual", 0, MIB), "'virtual'"),
        (("long", 1, MIB), "ring 1"),
        (("real", 3, MIB), "real mode"),
        (("protected16", 3, MIB), "protected16"),
        (("long", 0, 0), "0x0"),
        (("long", 0, -MIB), "multiple of 4096"),
        (("real", 0, MIB + 1), "0x100001"),
        (("long", 0, 3 * PAGE_1G + PAGE_4K), "3 GiB"),
        (("long", 0, MIB, 1), "extra RAM"),
        (("long", 0, MIB, -PAGE_4K), "extra RAM"),
        (("long", 0, MIB, 1 << 40), "KiB of low RAM"),
        (("long", 0, 3 * PAGE_1G, 1 << 46), "64 MiB"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build(*arguments)


def test_the_documented_constants() -> None:
    assert set(DEFAULT_LOAD) == set(MODES) == {mode for mode, _ in STARTS}
    assert (EXCEPTION_PORT, STUB_SIZE, DEFAULT_LOAD["real"]) == (0xF1, 16, 0x7C00)
    assert f"{DEFAULT_LOAD['long']:#x}; {DEFAULT_LOAD['real']:#x}" in str(modes.__doc__)
