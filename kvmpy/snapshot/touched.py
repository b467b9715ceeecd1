"""Which pages runs have changed: looked up after each, before the reset that takes it back."""

from collections.abc import Iterable
from typing import Any

from kvmpy.abi import ffi, host_error, lib
from kvmpy.memory import PAGE_SIZE, Memory
from kvmpy.snapshot.image import bits
from kvmpy.snapshot.pages import changed_pages
from kvmpy.snapshot.reset import Resetter

__all__ = ["Touched"]


class Touched:
    """Room for the changed pages of so many runs; C finds them where there is a dirty log."""

    def __init__(self, memory: Iterable[Memory], runs: int) -> None:
        self._regions = [region for region in memory if not region.readonly]
        # The address of the page that the first bit of each word stands for.
        self._first = [
            address
            for region in self._regions
            for address in range(region.address, region.end, 64 * PAGE_SIZE)
        ]
        self._words = len(self._first)
        self._bitmap: Any = ffi.new("uint64_t[]", self._words * runs)
        self._view = memoryview(ffi.buffer(self._bitmap)).cast("B").cast("Q")

    def use(self, resetter: Resetter, batch: Any) -> None:
        """Look for what differs from the snapshot that `resetter` goes back to."""
        self._resetter = resetter
        self._logged = resetter.method == "dirty-log"
        if self._logged:
            batch.touched, batch.touched_words = self._bitmap, self._words

    def find(self, at: int) -> None:
        """Find the pages of run number `at`, where C has not ended it."""
        if self._logged:
            code = lib.kvmpy_touched(self._resetter.native, self._bitmap + at * self._words)
            if code < 0:
                raise host_error(-code, "looking for changed pages: the dirty log")

    def pages(self, at: int) -> frozenset[int]:
        """The guest-physical addresses of the pages of run number `at`."""
        if not self._logged:  # it is the last that has run
            return self._by_tables()
        words = self._view[at * self._words : (at + 1) * self._words]
        found = []
        for first, word in [pair for pair in zip(self._first, words, strict=True) if pair[1]]:
            left = word
            while left:
                low = left & -left
                found.append(first + PAGE_SIZE * (low.bit_length() - 1))
                left ^= low
        return frozenset(found)

    def _by_tables(self) -> frozenset[int]:
        images = {image.address: image for image in self._resetter.snapshot.images}
        return frozenset(
            region.address + PAGE_SIZE * page
            for region in self._regions
            for page in bits(changed_pages(region, images[region.address]))
        )
