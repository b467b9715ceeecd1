"""The whole map, against page walks, and where tables are hostile."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.views import ranges
from kvmpy.views.pages import page_walk
from kvmpy.views.ranges import page_map
from kvmpy.x86.flags import CR0, CR4, EFER
from kvmpy.x86.paging import PAGE_1G, PAGE_2M, PAGE_4K, Mapping, PageFlags, build_page_tables
from kvmpy.x86.state import SpecialRegisters

LONG = {
    "cr0": int(CR0.PE | CR0.PG | CR0.WP),
    "cr4": int(CR4.PAE),
    "efer": int(EFER.LMA | EFER.LME | EFER.NXE),
}
PAGES = 12
MODES = {
    "4-level": LONG,
    "PAE": {"cr0": LONG["cr0"], "cr4": int(CR4.PAE), "efer": int(EFER.NXE)},
    "2-level": {"cr0": LONG["cr0"], "cr4": int(CR4.PSE)},
}


def reading(data):
    def read(address, length):
        end = address + length
        return bytes(data[address:end]) if end <= len(data) else None

    return read


@pytest.mark.parametrize("largest", [PAGE_1G, PAGE_2M])
def test_512_gib_are_one_range_and_few_reads(largest):
    tables = build_page_tables(0, [Mapping(0, 0, 512 << 30)], largest)
    reads = []

    def read(address, length):
        reads.append(address)
        return tables.data[address : address + length]

    view = page_map(read, SpecialRegisters(**LONG))
    (one,) = view.ranges
    assert (one.start, one.size, one.physical) == (0, 512 << 30, 0)
    assert one.page_sizes == (largest,) and one.writable and not one.user and view.complete
    assert len(reads) == len(tables.data) // 4096


def test_accessed_and_dirty_pages_are_no_ranges_of_their_own():
    tables = build_page_tables(0, [Mapping(0, 0, 1 << 30)], PAGE_2M)
    data = bytearray(tables.data)
    for at in range(2 * 4096, len(data), 24):
        data[at] |= 0x60
    assert len(page_map(reading(data), SpecialRegisters(**LONG)).ranges) == 1


def test_rights_sizes_and_halves_of_the_address_space():
    user = PageFlags.PRESENT | PageFlags.WRITE | PageFlags.USER
    top = (1 << 64) - (1 << 47)
    tables = build_page_tables(
        0x10000,
        [
            Mapping(0, 0, PAGE_2M + PAGE_4K, user),
            Mapping(PAGE_2M + PAGE_4K, PAGE_2M + PAGE_4K, PAGE_4K),
            Mapping(top - (1 << 64) + (1 << 64), 0x5000, PAGE_4K, PageFlags.PRESENT | PageFlags.NX),
        ],
    )
    data = bytes(0x10000) + tables.data
    view = page_map(reading(data), SpecialRegisters(**LONG, cr3=0x10000))
    assert [(one.start, one.last, one.physical) for one in view.ranges] == [
        (0, PAGE_2M + PAGE_4K - 1, 0),
        (PAGE_2M + PAGE_4K, PAGE_2M + 2 * PAGE_4K - 1, PAGE_2M + PAGE_4K),
        (top, top + PAGE_4K - 1, 0x5000),
    ]
    assert view.ranges[0].page_sizes == (PAGE_4K, PAGE_2M)
    assert [one.user for one in view.ranges] == [True, False, False]
    assert [one.executable for one in view.ranges] == [True, True, False]
    assert "user rwx" in str(view) and "supervisor r--" in str(view)


def test_without_paging():
    view = page_map(reading(b""), SpecialRegisters())
    assert "paging is off" in str(view) and view.ranges[0].size == 1 << 32


@pytest.mark.parametrize("fill", ["itself", "all", "nothing", "outside"])
def test_hostile_tables_end(fill, monkeypatch):
    monkeypatch.setattr(ranges, "MOST_RANGES", 2000)
    pages = 64
    entry = {
        "itself": lambda index: 7,
        "all": lambda index: (index % pages) << 12 | 7,
        "nothing": lambda index: 1 << 12 | 7 if index < 511 else 0,
        "outside": lambda index: 1 << 40 | 7,
    }[fill]
    data = struct.pack("<512Q", *map(entry, range(512))) * pages
    view = page_map(reading(data), SpecialRegisters(**LONG))
    assert len(view.ranges) <= 2001 and str(view)
    assert view.complete is (fill == "outside")
    if fill == "outside":
        assert all("outside RAM" in one.problem and one.physical is None for one in view.ranges)


entries = st.builds(
    lambda page, flags, high: page << 12 | flags | high,
    st.integers(0, PAGES),
    st.sampled_from([7, 7, 7, 3, 5, 0, 0, 0x87, 0x27]),
    st.sampled_from([0] * 8 + [1 << 63, 1 << 51, 1 << 21]),
)
rows = st.lists(st.lists(entries, min_size=4, max_size=4), min_size=PAGES, max_size=PAGES)


@given(st.sampled_from(sorted(MODES)), rows, st.data())
@settings(max_examples=100)
def test_each_address_is_where_its_walk_says(mode, tables, data):
    """What is in a range leads where the range says; what is in none leads nowhere."""
    size = 4 if mode == "2-level" else 8
    ram = bytearray(PAGES * 4096)
    for page, row in enumerate(tables):
        for at, value in enumerate(row):
            packed = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            ram[page * 4096 + at * size : page * 4096 + (at + 1) * size] = packed
    special = SpecialRegisters(**MODES[mode], cr3=0x1000)
    view = page_map(reading(ram), special)
    assert all(a.last < b.start for a, b in zip(view.ranges, view.ranges[1:], strict=False))
    picks = [data.draw(st.integers(0, 1 << 32 if size == 4 else 4 << 39)) & 0xFFFF_FFFF_F000]
    for one in view.ranges[:20]:
        picks += [one.start, one.last, max(0, one.start - 1), min(one.last + 1, (1 << 64) - 1)]
    for linear in picks:
        if mode != "4-level" and linear >= 1 << 32:
            continue
        walk = page_walk(reading(ram), special, linear)
        found = next((one for one in view.ranges if one.start <= linear <= one.last), None)
        if walk.physical is None:
            assert found is None or found.problem
            assert bool(found) is (walk.end in ("reserved bit", "outside RAM"))
        else:
            assert found is not None and not found.problem
            assert found.physical + linear - found.start == walk.physical
            rights = (found.writable, found.user, found.executable)
            assert rights == (walk.writable, walk.user, walk.executable)
            assert walk.page_size in found.page_sizes
