"""Maps of counters, and what is new in them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy import ConfigError, Coverage

SIZE = 32
maps = st.lists(st.sampled_from([0, 0, 0, 1, 2, 3, 5, 9, 200]), min_size=SIZE, max_size=SIZE).map(
    bytes
)


def magnitude(count: int) -> int:
    return max(start for start in (1, 2, 3, 4, 8, 16, 32, 128) if start <= count)


def pairs(counters: bytes) -> set[tuple[int, int]]:
    return {(edge, magnitude(count)) for edge, count in enumerate(counters) if count}


@given(st.lists(maps, max_size=12))
def test_new_is_what_no_map_before_had(given_: list[bytes]) -> None:
    coverage, seen = Coverage(SIZE), set[tuple[int, int]]()
    for counters in given_:
        new = pairs(counters) - seen
        seen |= new
        assert coverage.add(memoryview(counters)) == len(new)
        assert coverage.add(counters) == 0
        assert Coverage.magnitudes_of(counters) == pairs(counters)
        assert Coverage.edges_of(counters) == {edge for edge, _ in pairs(counters)}
    assert coverage.edges == {edge for edge, _ in seen}
    assert coverage.ways == len(set(given_))


def test_counts_of_a_magnitude_are_alike() -> None:
    for count in range(1, 256):
        for other in range(1, 256):
            coverage = Coverage(1)
            assert coverage.add(bytes([count])) == 1
            assert coverage.add(bytes([other])) == (magnitude(count) != magnitude(other))


def test_sizes_are_checked() -> None:
    with pytest.raises(ConfigError, match="31 bytes: this is for 32"):
        Coverage(SIZE).add(bytes(31))
    with pytest.raises(ConfigError, match="0 bytes"):
        Coverage(0)
