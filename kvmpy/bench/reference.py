"""The same few exits before and after each batch: what tells a disturbed batch from a quiet one.

A neighbour on the same core or a clock that is turned down makes exits slower by a half for a
while, whatever is measured. The reference sees that without looking at the batch itself, so to take
a batch again because of it does not choose among results.
"""

from collections.abc import Iterable, Sequence
from typing import Final, TypeVar

import numpy as np

from kvmpy.bench.guest import GuestBench, Kind
from kvmpy.bench.model import Batch, Case, Conditions
from kvmpy.devices import Sink

__all__ = ["Reference", "baseline", "disturbed", "quiet_ones"]

_EXITS: Final = 64
_LIMIT: Final = 1.10
_ENOUGH: Final = 3  # quiet batches, and a quarter of all, are enough to go by them alone
_LOWEST: Final = 0.05  # the share of readings that the baseline lies above

_T = TypeVar("_T")


class Reference:
    """A guest of its own that writes to a port, in long mode, which the C loop serves."""

    def __init__(self) -> None:
        conditions = Conditions(count=_EXITS)
        self._bench = GuestBench(Kind("port", "out1"), Case("pio-out", "c", "long"), conditions)
        self._bench.attach(Sink())
        self.read()  # the first few are slow

    def read(self) -> float:
        """The median of a few exits, in ns."""
        self._bench.start("out1", _EXITS)
        pairs = self._bench.sample(_EXITS + 1, self._bench.run_to_its_end)
        return float(np.median(np.diff(pairs[:, 0])))

    def close(self) -> None:
        """Close its machine."""
        self._bench.machine.close()


def baseline(readings: Iterable[float]) -> float:
    """What the reference takes when nothing disturbs it, as far as its readings tell; ns."""
    found = list(readings)
    return float(np.quantile(found, _LOWEST)) if found else 0.0


def disturbed(batch: Batch, quiet: float) -> bool:
    """Whether the reference was more than a tenth slower before or after it than `quiet`."""
    return any(reading > _LIMIT * quiet for reading in batch.reference)


def quiet_ones(batches: Sequence[_T], are_disturbed: Iterable[bool]) -> list[_T]:
    """Those that were not disturbed; or all, where too few of them were quiet."""
    quiet = [batch for batch, bad in zip(batches, are_disturbed, strict=True) if not bad]
    return quiet if len(quiet) >= max(_ENOUGH, len(batches) / 4) else list(batches)
