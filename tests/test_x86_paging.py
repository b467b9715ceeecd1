"""Page tables: what is mapped is found by a walk, and nothing else is."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.errors import AddressError, ConfigError, OverlapError
from kvmpy.x86.paging import (
    PAGE_1G,
    PAGE_2M,
    PAGE_4K,
    Mapping,
    PageFlags,
    PageTables,
    build_page_tables,
    is_canonical,
    walk,
)

PRESENT, WRITE, USER, NX = PageFlags.PRESENT, PageFlags.WRITE, PageFlags.USER, PageFlags.NX
HIGH = 0xFFFF_8000_0000_0000


def reader(tables: PageTables) -> Callable[[int], int]:
    def read(address: int) -> int:
        offset = address - tables.root
        assert 0 <= offset < tables.size, f"the walk left the tables at {address:#x}"
        assert offset % 8 == 0
        return int.from_bytes(tables.data[offset : offset + 8], "little")

    return read


FLAGS = st.sampled_from(
    [PRESENT | a | b | c for a in (0, WRITE) for b in (0, USER) for c in (0, NX)]
)


@st.composite
def mapping_lists(draw: st.DrawFn) -> list[Mapping]:
    """Mappings that do not overlap, in both halves, aligned in all the ways that matter."""
    mappings = []
    for start in (0, 1 << 40, HIGH, -PAGE_1G * 8 % (1 << 64)):
        virtual = start
        for _ in range(draw(st.integers(0, 3))):
            align = draw(st.sampled_from([PAGE_4K, PAGE_2M, PAGE_1G]))
            virtual = -(-virtual // align) * align + PAGE_4K * draw(st.integers(0, 2))
            length = PAGE_4K * draw(
                st.sampled_from([1, 2, 511, 512, 513, 1024, 1537, 512 * 513, 512 * 512 * 2 + 1])
            )
            unit = draw(st.sampled_from([PAGE_4K, PAGE_2M, PAGE_1G]))
            physical = unit * draw(st.integers(0, 1000)) + virtual % align
            if virtual + length > start + PAGE_1G * 8:
                break
            mappings.append(Mapping(virtual, physical, length, draw(FLAGS)))
            virtual += length
    return mappings


def page_size(mapping: Mapping, address: int, largest: int) -> int:
    """The size of the largest page that can hold `address`."""
    for size in (PAGE_1G, PAGE_2M):
        start = address - address % size
        inside = mapping.virtual <= start and start + size <= mapping.virtual + mapping.length
        if size <= largest and inside and not (mapping.virtual - mapping.physical) % size:
            return size
    return PAGE_4K


@given(mapping_lists(), st.sampled_from([PAGE_4K, PAGE_2M, PAGE_1G]), st.data())
def test_mapped_addresses_walk_to_their_pages(
    mappings: list[Mapping], largest: int, data: st.DataObject
) -> None:
    tables = build_page_tables(0x10_0000, data.draw(st.permutations(mappings)), largest)
    read = reader(tables)
    for mapping in mappings:
        inside = data.draw(st.integers(0, mapping.length - 1))
        for offset in (0, inside, mapping.length - 1):
            found = walk(read, tables.root, mapping.virtual + offset)
            assert found.physical == mapping.physical + offset
            assert found.flags == mapping.flags
            assert found.page_size == page_size(mapping, mapping.virtual + offset, largest)
            assert len(found.levels) == {PAGE_1G: 2, PAGE_2M: 3, PAGE_4K: 4}[found.page_size]


@given(mapping_lists(), st.data())
def test_other_addresses_walk_nowhere(mappings: list[Mapping], data: st.DataObject) -> None:
    tables = build_page_tables(0x10_0000, mappings)
    edges = [m.virtual - 1 for m in mappings] + [m.virtual + m.length for m in mappings]
    anywhere = data.draw(st.integers(0, 2**47 - 1))
    for address in [*edges, anywhere, HIGH + anywhere]:
        inside = any(m.virtual <= address < m.virtual + m.length for m in mappings)
        if is_canonical(address) and not inside:
            found = walk(reader(tables), tables.root, address)
            assert found.physical is None
            assert not found.levels[-1].entry & PRESENT
            assert (found.page_size, found.flags) == (0, 0)


def test_an_identity_map_by_the_book() -> None:
    tables = build_page_tables(0x8000, [Mapping(0, 0, 4 * PAGE_1G)], PAGE_2M)
    words = memoryview(tables.data).cast("Q")
    assert (tables.root, tables.size) == (0x8000, 6 * 4096)
    assert words[0] == 0x9027  # PML4[0]: table 1; present, write, user, accessed
    assert list(words[512:517]) == [0xA027, 0xB027, 0xC027, 0xD027, 0]
    assert list(words[1024:]) == [page * PAGE_2M | 0x83 for page in range(2048)]


def test_a_1_gib_page_and_its_flags() -> None:
    flags = PRESENT | USER | NX | PageFlags.GLOBAL | PageFlags.DIRTY | PageFlags.ACCESSED
    tables = build_page_tables(0, [Mapping(HIGH, 3 * PAGE_1G, PAGE_1G, flags)])
    assert tables.size == 2 * 4096
    assert memoryview(tables.data).cast("Q")[512] == 1 << 63 | 0xC000_0000 | 0x1E5
    assert [level.name for level in walk(reader(tables), 0, HIGH).levels] == ["PML4", "PDPT"]


def test_a_walk_joins_the_permissions_of_all_levels() -> None:
    tables = build_page_tables(0, [Mapping(0, 0x5000, PAGE_4K, PRESENT | WRITE | USER)])
    words = memoryview(bytearray(tables.data)).cast("Q")
    words[0] &= ~int(WRITE)
    words[512] |= 1 << 63
    words[1024] &= ~int(USER)
    found = walk(lambda address: words[address // 8], 0x0, 0x123)
    assert (found.physical, found.flags) == (0x5123, PRESENT | NX)
    assert [level.address for level in found.levels] == [0, 0x1000, 0x2000, 0x3000]


def test_a_walk_ignores_cr3s_low_bits_and_refuses_wild_addresses() -> None:
    tables = build_page_tables(0x3000, [Mapping(0, 0, PAGE_4K)])
    assert walk(reader(tables), 0x3018, 0).physical == 0
    for address in (1 << 47, HIGH - 1, 1 << 64, -1):
        with pytest.raises(AddressError, match="canonical"):
            walk(reader(tables), 0x3000, address)


def test_no_mappings_make_an_empty_root() -> None:
    assert build_page_tables(0x1000, []) == PageTables(0x1000, bytes(4096))


@pytest.mark.parametrize(
    ("mapping", "error", "named"),
    [
        (Mapping(0x800, 0, PAGE_4K), AddressError, "virtual 0x800"),
        (Mapping(0, 0x801, PAGE_4K), AddressError, "physical 0x801"),
        (Mapping(0, 0, 100), AddressError, "length 0x64"),
        (Mapping(0, 0, 0), AddressError, "no length"),
        (Mapping(0, 0, -PAGE_4K), AddressError, "length"),
        (Mapping(1 << 47, 0, PAGE_4K), AddressError, "canonical"),
        (Mapping((1 << 47) - PAGE_4K, 0, 2 * PAGE_4K), AddressError, "canonical"),
        (Mapping(0, 0, 1 << 64), AddressError, "canonical"),
        (Mapping(0x1000, 0, HIGH), AddressError, "canonical"),
        (Mapping((1 << 64) - PAGE_4K, 0, 2 * PAGE_4K), AddressError, "canonical"),
        (Mapping(0, 1 << 52, PAGE_4K), AddressError, "52 bits"),
        (Mapping(0, 0, PAGE_4K, WRITE), ConfigError, "PRESENT"),
        (Mapping(0, 0, PAGE_4K, PRESENT | PageFlags.LARGE), ConfigError, "LARGE"),
        (Mapping(0, 0, PAGE_4K, PRESENT | PageFlags(0x1000)), ConfigError, "0x1001"),
        (Mapping(0x1000, 0, 1 << 46), ConfigError, "64 MiB"),
    ],
)
def test_a_mapping_that_cannot_be_is_refused(
    mapping: Mapping, error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        build_page_tables(0, [mapping], PAGE_2M)


def test_overlap_and_wrong_places_are_refused() -> None:
    with pytest.raises(OverlapError, match="0x2000"):
        build_page_tables(0, [Mapping(0x2000, 0, PAGE_4K), Mapping(0, 0x5000, 3 * PAGE_4K)])
    with pytest.raises(AddressError, match="0x123"):
        build_page_tables(0x123, [])
    with pytest.raises(ConfigError, match="0x2000"):
        build_page_tables(0, [], 0x2000)


def test_tables_must_fit_the_physical_addresses() -> None:
    with pytest.raises(AddressError, match="52"):
        build_page_tables((1 << 52) - PAGE_4K, [Mapping(0, 0, PAGE_4K)])
