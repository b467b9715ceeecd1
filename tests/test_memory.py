"""Guest memory against a bytearray: bounds, types, views, backings, closing."""

import gc
import mmap
import os
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvmpy.access import GuestAccess
from kvmpy.errors import AddressError, ClosedError, ConfigError, HostError
from kvmpy.memory import PAGE_SIZE, AddressSpace, Memory

BASE = 0x10_0000
SIZE = 2 * PAGE_SIZE
END = BASE + SIZE
NON_CANONICAL = 0x0000_8000_0000_0000


@pytest.fixture
def ram() -> Iterator[Memory]:
    with closing(Memory(BASE, SIZE)) as region:
        yield region


@pytest.fixture
def space() -> Iterator[AddressSpace]:
    """Three pages at 0, one more right after it as a region of its own, two at 4 GiB."""
    regions = [
        Memory(0, 3 * PAGE_SIZE, slot=0),
        Memory(1 << 32, 2 * PAGE_SIZE, slot=1),
        Memory(3 * PAGE_SIZE, PAGE_SIZE, slot=2),
    ]
    built = AddressSpace()
    for region in regions:
        built.add(region)
    yield built
    for region in regions:
        region.close()


class Model(GuestAccess):
    """RAM as a dict of bytes: slow, and too simple to be wrong."""

    def __init__(self, *ranges: tuple[int, int]) -> None:
        self.bytes = {a: 0 for start, end in ranges for a in range(start, end)}

    def read(self, address: int, length: int) -> bytes:
        if length < 0 or any(address + i not in self.bytes for i in range(length)):
            raise AddressError("no RAM")
        return bytes(self.bytes[address + i] for i in range(length))

    def write(self, address: int, data: Any) -> None:
        if any(address + i not in self.bytes for i in range(len(data))):
            raise AddressError("no RAM")
        for i, byte in enumerate(bytes(data)):
            self.bytes[address + i] = byte


def outcome(call: Callable[[], object]) -> object:
    """What a call returns, or the type of what it raises."""
    try:
        return call()
    except Exception as error:
        return type(error)


near = st.one_of(*(st.integers(edge - 12, edge + 12) for edge in (0, PAGE_SIZE, 3 * PAGE_SIZE)))
space_addresses = st.one_of(
    near,
    st.integers(4 * PAGE_SIZE - 12, 4 * PAGE_SIZE + 12),
    st.integers((1 << 32) - 12, (1 << 32) + 12),
    st.integers((1 << 32) + SIZE - 12, (1 << 32) + SIZE + 12),
    st.sampled_from([-1, 1 << 63, (1 << 64) - 1, 1 << 64, (1 << 64) + 5, NON_CANONICAL]),
)
operations = st.one_of(
    st.tuples(st.just("read"), space_addresses, st.integers(-2, 30)),
    st.tuples(st.just("write"), space_addresses, st.binary(max_size=30)),
    st.tuples(st.sampled_from(["read_u8", "read_u16", "read_u32", "read_u64"]), space_addresses),
    st.tuples(
        st.sampled_from(["write_u8", "write_u16", "write_u32", "write_u64"]),
        space_addresses,
        st.one_of(st.sampled_from([-1, 0xFF, 0x100, 1 << 64]), st.integers(0, (1 << 64) - 1)),
    ),
    st.tuples(st.just("read_string"), space_addresses, st.integers(0, 40)),
    st.tuples(st.just("__getitem__"), space_addresses),
    st.tuples(st.just("__setitem__"), space_addresses, st.integers(-1, 256)),
    st.tuples(st.just("__getitem__"), st.builds(slice, space_addresses, space_addresses)),
    st.tuples(
        st.just("__setitem__"),
        space_addresses.flatmap(lambda a: st.integers(-1, 8).map(lambda n: slice(a, a + n))),
        st.binary(max_size=8),
    ),
)


@given(st.lists(operations, max_size=30))
@example([("write", 3 * PAGE_SIZE - 2, b"abcd"), ("read_u32", 3 * PAGE_SIZE - 2)])
@example([("write_u64", 4 * PAGE_SIZE - 7, 1)])
def test_address_space_behaves_like_bytes_in_a_dict(steps: list[tuple[Any, ...]]) -> None:
    ranges = ((0, 4 * PAGE_SIZE), (1 << 32, (1 << 32) + SIZE))
    model, real = Model(*ranges), AddressSpace()
    regions = [Memory(1 << 32, SIZE), Memory(0, 3 * PAGE_SIZE), Memory(3 * PAGE_SIZE, PAGE_SIZE)]
    for region in regions:
        real.add(region)
    for name, *arguments in steps:
        if name == "__getitem__" and isinstance(arguments[0], slice):
            span = arguments[0].stop - arguments[0].start
            if span > 1 << 16:  # the model would count to 4 GiB
                assert outcome(lambda: real[arguments[0]]) is AddressError  # noqa: B023
                continue
        expected = outcome(lambda: getattr(model, name)(*arguments))  # noqa: B023
        assert outcome(lambda: getattr(real, name)(*arguments)) == expected, name  # noqa: B023
    for start, end in ranges:
        assert real.read(start, end - start) == model.read(start, end - start)
    for region in regions:
        region.close()


@given(
    address=st.one_of(st.integers(BASE - 20, BASE + 20), st.integers(END - 20, END + 20)),
    data=st.binary(max_size=24),
)
def test_region_takes_what_lies_inside_and_nothing_else(address: int, data: bytes) -> None:
    with closing(Memory(BASE, SIZE)) as ram:
        if address >= BASE and address + len(data) <= END:
            ram.write(address, data)
            assert ram.read(address, len(data)) == data
            assert sum(ram.read(BASE, SIZE)) == sum(data)
        else:
            with pytest.raises(AddressError):
                ram.write(address, data)
            with pytest.raises(AddressError):
                ram.read(address, len(data))
            assert not any(ram.read(BASE, SIZE))


@pytest.mark.parametrize(
    "address", [-1, BASE - 1, END, END - 3, (1 << 64) - 2, 1 << 64, NON_CANONICAL, -(1 << 70)]
)
def test_wild_address_is_named_and_nothing_is_written(ram: Memory, address: int) -> None:
    pattern = rf"{address:#x} lie outside of RAM \[0x100000, 0x102000\)"
    with pytest.raises(AddressError, match=pattern):
        ram.read_u32(address)
    with pytest.raises(AddressError, match=pattern):
        ram.write_u32(address, 0xFFFF_FFFF)
    assert not any(ram.view)


def test_write_over_a_gap_writes_nothing(space: AddressSpace) -> None:
    edge = 4 * PAGE_SIZE - 2
    with pytest.raises(AddressError, match="4 bytes at address 0x3ffe lie outside of RAM"):
        space.write(edge, b"abcd")
    assert space.read(edge, 2) == b"\0\0"


def test_empty_address_space_has_no_ram() -> None:
    with pytest.raises(AddressError, match=r"\(none\)"):
        AddressSpace().read(0, 1)
    with pytest.raises(AddressError, match="no RAM at address 0"):
        AddressSpace().view  # noqa: B018


def test_address_space_finds_and_forgets_regions(space: AddressSpace) -> None:
    assert [region.address for region in space] == [0, 3 * PAGE_SIZE, 1 << 32]
    assert len(space) == 3
    high = space.overlapping((1 << 32) + SIZE - 1, 1)
    assert high is not None and high.address == 1 << 32
    assert space.overlapping(4 * PAGE_SIZE, (1 << 32) - 4 * PAGE_SIZE) is None
    assert space.overlapping((1 << 32) - 1, 1) is None
    first = space.overlapping(0, 1 << 40)
    assert first is not None and first.address == 0
    space.remove(high)
    with pytest.raises(AddressError):
        space.read(1 << 32, 1)
    high.close()


# Types -------------------------------------------------------------------------------------


@given(value=st.integers(0, (1 << 64) - 1), size=st.sampled_from([1, 2, 4, 8]))
def test_integers_are_little_endian_and_must_fit(value: int, size: int) -> None:
    with closing(Memory(0, PAGE_SIZE)) as ram:
        write, read = getattr(ram, f"write_u{8 * size}"), getattr(ram, f"read_u{8 * size}")
        if value < 1 << 8 * size:
            write(5, value)
            assert read(5) == value and ram.read(5, size) == value.to_bytes(size, "little")
        else:
            with pytest.raises(ConfigError, match=f"{value:#x} does not fit"):
                write(5, value)
            assert not any(ram.view)


def test_strings_end_at_their_nul_even_over_pages(ram: Memory) -> None:
    text = b"x" * 5000
    ram.write(BASE + 10, text + b"\0y")
    assert ram.read_string(BASE + 10, limit=5001) == text
    with pytest.raises(AddressError, match="no NUL within 5000 bytes from address 0x10000a"):
        ram.read_string(BASE + 10, limit=5000)


def test_string_that_runs_out_of_ram_is_an_error(ram: Memory) -> None:
    ram.write(END - 3, b"abc")
    with pytest.raises(AddressError, match="lie outside of RAM"):
        ram.read_string(END - 3)


@pytest.mark.parametrize(
    "key", [slice(None, END), slice(BASE, None), slice(BASE, END, 2), slice(END, BASE)]
)
def test_slices_name_both_ends_in_order(ram: Memory, key: slice) -> None:
    with pytest.raises(AddressError):
        ram[key]
    with pytest.raises(AddressError):
        ram[key] = b""


def test_item_assignment_takes_what_fits(ram: Memory) -> None:
    ram[BASE] = 0x41
    ram[BASE + 1 : BASE + 3] = b"BC"
    assert ram[BASE : BASE + 3] == b"ABC" and ram[BASE + 2] == 0x43
    wrong: list[tuple[Any, Any]] = [(BASE, b"A"), (BASE, 256), (slice(BASE, BASE + 2), b"A")]
    for key, value in wrong:
        with pytest.raises(ConfigError):
            ram[key] = value
    with pytest.raises(ConfigError):
        ram[BASE : BASE + 2] = 7
    assert ram[BASE : BASE + 4] == b"ABC\0"


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview, lambda b: array("I", b)])
def test_any_contiguous_buffer_is_written_by_its_bytes(
    make: Callable[[bytes], Any], ram: Memory, space: AddressSpace
) -> None:
    data = make(b"12345678")
    ram.write(BASE, data)
    ram[BASE + 8 : BASE + 16] = data
    space.write(3 * PAGE_SIZE - 4, data)
    assert ram.read(BASE, 17) == b"1234567812345678\0"
    assert space.read(3 * PAGE_SIZE - 5, 10) == b"\x0012345678\0"
    with pytest.raises(AddressError):
        ram.write(END - 7, data)
    with pytest.raises(ConfigError):  # two elements, eight bytes
        space[0:2] = data
    assert not any(space.read(0, PAGE_SIZE))


# Views -------------------------------------------------------------------------------------


def test_view_is_the_memory_itself(ram: Memory) -> None:
    with ram.view as view:
        assert len(view) == SIZE and not view.readonly
        view[1:3] = b"hi"
        assert ram.read(BASE + 1, 2) == b"hi"
        ram.write_u8(BASE, 0x21)
        assert view[0] == 0x21


def test_view_of_an_address_space_is_indexed_by_address(space: AddressSpace) -> None:
    with space.view as view:
        space.write_u16(0x123, 0xBEEF)
        assert bytes(view[0x123:0x125]) == b"\xef\xbe"


def test_numpy_sees_the_memory_itself(ram: Memory) -> None:
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    words = numpy.frombuffer(ram.view, dtype="<u4")
    ram.write_u32(BASE + 8, 0xDEAD_BEEF)
    assert words.shape == (SIZE // 4,) and words[2] == 0xDEAD_BEEF
    words[3] = 7
    assert ram.read_u32(BASE + 12) == 7
    with pytest.raises(BufferError, match="live views"):
        ram.close()
    del words
    gc.collect()


def test_closing_waits_for_the_last_view(ram: Memory) -> None:
    view = ram.view
    part = view[10:20]
    view.release()
    for _ in range(2):
        with pytest.raises(BufferError, match="the RAM at 0x100000 has live views: release"):
            ram.close()
        ram.write(BASE, b"still there")  # nothing was closed
    part.release()
    ram.check_no_views()
    ram.close()
    ram.close()


def test_closed_memory_says_so(ram: Memory) -> None:
    ram.close()
    ram.check_no_views()
    for call in (
        lambda: ram.read(BASE, 1),
        lambda: ram.write(BASE, b"a"),
        lambda: ram.view,
        lambda: ram.buffer,
        lambda: ram[BASE],
    ):
        with pytest.raises(ClosedError, match="the RAM at 0x100000 is closed"):
            call()


def test_abandoned_memory_goes_with_its_last_view() -> None:
    ram = Memory(BASE, SIZE, backing="shared")
    view, fd = ram.view, ram.fd
    assert fd is not None
    ram.abandon()
    view[0] = 1  # still mapped
    with pytest.raises(ClosedError):
        ram.read(BASE, 1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    ram.abandon()
    ram.close()
    lines = maps_with("memfd:kvmpy")
    view.release()
    gc.collect()
    assert lines and len(maps_with("memfd:kvmpy")) == len(lines) - 1


def maps_with(text: str) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if text in line]


# Backings ----------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A file of four pages: page n is full of the byte n + 1."""
    path = tmp_path / "image"
    path.write_bytes(b"".join(bytes([n + 1]) * PAGE_SIZE for n in range(4)))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def test_fresh_memory_is_zero() -> None:
    for backing in ("anonymous", "shared"):
        with closing(Memory(0, SIZE, backing=backing)) as ram:
            assert ram.read(0, SIZE) == bytes(SIZE)


def test_shared_memory_is_seen_through_two_mappings() -> None:
    with closing(Memory(0, SIZE, backing="shared")) as one:
        assert one.fd is not None
        with closing(Memory(BASE, SIZE, backing="shared", fd=one.fd)) as two:
            assert two.fd not in (None, one.fd)
            one.write(5, b"there")
            assert two.read(BASE + 5, 5) == b"there"
            two.write_u8(END - 1, 9)
            assert one.read_u8(SIZE - 1) == 9
        with mmap.mmap(one.fd, SIZE) as other:
            assert other[5:10] == b"there"


def test_shared_memory_outlives_the_descriptor_it_came_from(file: int) -> None:
    given_fd = os.dup(file)
    ram = Memory(0, PAGE_SIZE, backing="shared", fd=given_fd, offset=PAGE_SIZE)
    os.close(given_fd)
    with closing(ram):
        assert ram.read_u8(0) == 2
        ram.write_u8(0, 99)
        assert os.pread(file, 1, PAGE_SIZE) == b"\x63"


def test_private_memory_never_reaches_the_file(file: int) -> None:
    before = os.pread(file, 4 * PAGE_SIZE, 0)
    with closing(Memory(0, SIZE, backing="private", fd=file, offset=PAGE_SIZE)) as ram:
        assert (ram.read_u8(0), ram.read_u8(SIZE - 1)) == (2, 3)
        ram.write(0, b"\xff" * SIZE)
        assert ram.read(0, SIZE) == b"\xff" * SIZE
        assert os.pread(file, 4 * PAGE_SIZE, 0) == before
        with closing(Memory(0, SIZE, backing="private", fd=file)) as other:
            assert other.read_u8(PAGE_SIZE) == 2
    assert os.pread(file, 4 * PAGE_SIZE, 0) == before


def test_private_memory_needs_no_right_to_write(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"a" * PAGE_SIZE)
    fd = os.open(path, os.O_RDONLY)
    try:
        with closing(Memory(0, PAGE_SIZE, backing="private", fd=fd)) as ram:
            ram.write_u8(0, 0x62)
        with pytest.raises(HostError, match=r"cannot map 4096 bytes of guest RAM \(shared\)"):
            Memory(0, PAGE_SIZE, backing="shared", fd=fd)
    finally:
        os.close(fd)
    assert path.read_bytes() == b"a" * PAGE_SIZE


@pytest.mark.parametrize("backing", ["shared", "private"])
@pytest.mark.parametrize(("size", "offset"), [(5, 0), (4, 1), (1, 4), (1, 1 << 40), (1, -1)])
def test_file_shorter_than_the_region_is_refused(
    file: int, backing: str, size: int, offset: int
) -> None:
    with pytest.raises(ConfigError, match="the file has 16384 bytes; the region needs"):
        Memory(0, size * PAGE_SIZE, backing=backing, fd=file, offset=offset * PAGE_SIZE)


def test_unaligned_offset_into_a_file_is_refused(file: int) -> None:
    with pytest.raises(HostError, match="cannot map"):
        Memory(0, PAGE_SIZE, backing="private", fd=file, offset=512)


@pytest.mark.parametrize("backing", ["shared", "private"])
@pytest.mark.parametrize("fd", [-1, 1 << 20, 1 << 40])
def test_descriptor_that_is_none_is_refused(backing: str, fd: int) -> None:
    with pytest.raises(HostError, match=f"file descriptor {fd}"):
        Memory(0, PAGE_SIZE, backing=backing, fd=fd)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backing": "hugetlb"}, "'hugetlb': use anonymous, shared or private"),
        ({"backing": "private"}, "needs the descriptor of a file"),
        ({"backing": "anonymous", "fd": 0}, "takes no file descriptor"),
        ({"size": 0}, "0 bytes: give a positive multiple of 4096"),
        ({"size": -4096}, "give a positive multiple of 4096"),
        ({"size": 4097}, "4097 bytes"),
        ({"size": 1 << 52}, "at most"),
        ({"address": -4096}, "-0x1000"),
        ({"address": 512}, "0x200: give a multiple of 4096"),
        ({"address": 1 << 52}, r"ends above 2\*\*52"),
        ({"address": (1 << 64) - 4096}, r"ends above 2\*\*52"),
    ],
)
def test_absurd_regions_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Memory(**({"address": 0, "size": 4096} | arguments))


def test_more_than_the_host_can_map_is_refused() -> None:
    too_much = Memory(0, PAGE_SIZE)
    too_much.close()
    regions: list[Memory] = []
    try:
        # 47 bits of user addresses hold 16 regions of 2**43 bytes at the most.
        with pytest.raises(HostError, match="cannot map 8796093022208 bytes of guest RAM"):
            for _ in range(20):
                regions.append(Memory(0, 1 << 43))
    finally:
        for region in regions:
            region.close()


@pytest.mark.parametrize("backing", ["anonymous", "shared"])
def test_huge_pages_are_only_advice(backing: str) -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no transparent huge pages")
    with closing(Memory(0, 4 << 20, backing=backing, huge=True)) as ram:
        ram.write(0, b"x" * (4 << 20))
        assert ram.read_u8((4 << 20) - 1) == ord("x")


def test_advice_that_the_host_refuses_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # No kernel knows advice 12345, and one without huge pages answers in the same way.
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError, match="leave out huge=True"):
        Memory(0, PAGE_SIZE, backing="shared", huge=True)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not maps_with("memfd:kvmpy")


def test_repr_says_where_it_is(ram: Memory) -> None:
    assert repr(ram) == "<Memory [0x100000, 0x102000) slot 0 anonymous>"
