"""What a guest's runs have reached, from the maps of counters that they leave in its memory.

A map has a byte for each edge between two places in the code (or for several, where they fall
together); in it the guest counts how often a run has taken the edge, modulo 256. See
guests/c/kvmpy_harness.h. Counts matter by their magnitude, as in AFL: 1, 2, 3, 4 to 7, 8 to 15,
16 to 31, 32 to 127, 128 and more.
"""

from typing import Final, TypeAlias

from kvmpy.errors import ConfigError

__all__ = ["Coverage"]

_Bytes: TypeAlias = bytes | bytearray | memoryview
_STARTS: Final = (1, 2, 3, 4, 8, 16, 32, 128)  # the least count of each magnitude
_MAGNITUDES: Final = bytes(
    sum(1 << number for number, start in enumerate(_STARTS) if start <= count).bit_length()
    for count in range(256)
)
_BITS: Final = bytes(1 << magnitude - 1 if magnitude else 0 for magnitude in _MAGNITUDES)


class Coverage:
    """The edges that runs have taken so far, and how often, of maps of `size` bytes.

    `add` takes a run's map: `outcome.collected` of `runs`, or bytes of the guest's memory. Most
    runs take a way that another has taken before them, which costs the hash of a map.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ConfigError(f"a coverage map of {size} bytes: give 1 or more")
        self.size = size
        self._ways: set[int] = set()  # the hashes of all maps
        self._seen = 0  # a bit for each magnitude of each edge

    def add(self, counters: _Bytes) -> int:
        """Take a run's map; how many edges it has taken as often as no run before it.

        Raises ConfigError for a map of another size.
        """
        raw = bytes(counters)
        if len(raw) != self.size:
            raise ConfigError(f"a coverage map of {len(raw)} bytes: this is for {self.size}")
        way = hash(raw)
        if way in self._ways:
            return 0
        self._ways.add(way)
        new = int.from_bytes(raw.translate(_BITS), "little") & ~self._seen
        self._seen |= new
        return new.bit_count()

    @property
    def ways(self) -> int:
        """How many different maps there were."""
        return len(self._ways)

    @property
    def edges(self) -> frozenset[int]:
        """The edges that any run has taken, as indices into the map."""
        return self.edges_of(self._seen.to_bytes(self.size, "little"))

    @staticmethod
    def edges_of(counters: _Bytes) -> frozenset[int]:
        """The edges that one run has taken."""
        return frozenset(edge for edge, count in enumerate(bytes(counters)) if count)

    @staticmethod
    def magnitudes_of(counters: _Bytes) -> frozenset[tuple[int, int]]:
        """The edges that one run has taken, each with the least count of its magnitude."""
        return frozenset(
            (edge, _STARTS[_MAGNITUDES[count] - 1])
            for edge, count in enumerate(bytes(counters))
            if count
        )
