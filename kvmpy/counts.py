"""Counts of exits by kind, worked out when somebody looks at them."""

import struct
from collections.abc import Iterator, Mapping
from typing import Final

from kvmpy.abi import lib
from kvmpy.exits import exit_kind

__all__ = ["ExitCounts"]

_HALF: Final[int] = lib.KVMPY_REASONS
_COUNTERS: Final = struct.Struct(f"{2 * _HALF}Q")


class ExitCounts(Mapping[str, int]):
    """What was counted between two copies of the C loop's counters (struct kvmpy_loop, exits)."""

    def __init__(self, before: bytes, after: bytes) -> None:
        self._before, self._after = before, after
        self._counts: dict[str, int] | None = None

    def _found(self) -> dict[str, int]:
        if self._counts is None:
            pairs = zip(_COUNTERS.unpack(self._before), _COUNTERS.unpack(self._after), strict=True)
            self._counts = {
                exit_kind(number % _HALF, number >= _HALF): after - before
                for number, (before, after) in enumerate(pairs)
                if after > before
            }
        return self._counts

    def __getitem__(self, kind: str) -> int:
        return self._found()[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())

    def __repr__(self) -> str:
        return repr(self._found())
