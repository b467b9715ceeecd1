"""ELF files damaged in every way: an image or an ImageError comes of each, and soon."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_boot_elf import ABSOLUTE, DYNAMIC, build, error_of, segment

from kvmpy.boot.elf import load_elf
from kvmpy.errors import ImageError

WHOLE = build(
    segment(),
    segment(address=0x101000, memory=0x1000),
    segment(kind=DYNAMIC, address=0x103000, data=bytes(16)),
    symbols=(("main", 0x12, 1, 0x100000), ("kvmpy_ring", 0x10, ABSOLUTE, 3)),
)
INTERESTING = [0, 1, 2, 3, 4, 7, 8, 0x7F, 0x80, 0xFE, 0xFF]


def survives(data: bytes) -> None:
    try:
        image = load_elf(data, "g.elf")
    except ImageError as error:
        assert "\n" not in str(error)
    else:
        assert image.segments
        for part in image.segments:
            assert 0 <= len(part.data) <= part.memory_size
            assert part.end <= 1 << 52
        for low, high in zip(image.segments, image.segments[1:], strict=False):
            assert low.end <= high.address


@pytest.mark.parametrize("length", range(4, len(WHOLE)))
def test_every_truncation(length: int) -> None:
    assert error_of(WHOLE[:length])


def test_every_byte_of_the_tables_at_extremes() -> None:
    for offset in (*range(4, 64 + 56), *range(len(WHOLE) - 192, len(WHOLE))):
        for value in (0, 1, 0x7F, 0xFF):
            survives(WHOLE[:offset] + bytes([value]) + WHOLE[offset + 1 :])


@given(
    st.lists(
        st.tuples(
            st.integers(4, len(WHOLE) - 1),
            st.binary(min_size=1, max_size=8)
            | st.sampled_from(INTERESTING).map(lambda b: bytes([b] * 8)),
        ),
        min_size=1,
        max_size=8,
    ),
    st.integers(4, len(WHOLE)),
)
def test_mutated_files(changes: list[tuple[int, bytes]], length: int) -> None:
    data = bytearray(WHOLE)
    for offset, patch in changes:
        data[offset : offset + len(patch)] = patch
    survives(bytes(data[:length]))


@given(st.binary(max_size=400))
def test_anything_after_the_magic(data: bytes) -> None:
    survives(b"\x7fELF\x02\x01\x01" + data)


# Sections and names that all are the same bytes, over and over: read as they ask to be, each of
# these would take minutes and gigabytes.
FILLER = b"\x01" * (1 << 20)
LONG_NAMES = tuple(("x" * 600, 0x10, 1, 1) for _ in range(1000))
HOSTILE = {
    "sections without size": build(segment(data=FILLER), shnum=0xFEFF, shentsize=0, shoff=64),
    "sections by the thousand": build(segment(data=FILLER), shnum=0x3F00, shoff=64),
    "sections counted elsewhere": build(segment(data=FILLER), shnum=0, shentsize=0, shoff=64),
    "segments without size": build(segment(data=FILLER), phnum=0xFFFF, phentsize=0),
    "segments by the thousand": build(segment(data=FILLER), phnum=0x4000),
    "long names": build(segment(data=FILLER), symbols=LONG_NAMES),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_tables_are_dealt_with_in_time(what: str) -> None:
    survives(HOSTILE[what])


def test_names_of_absurd_length_are_left_out() -> None:
    assert load_elf(HOSTILE["long names"], "g").symbols == {}
