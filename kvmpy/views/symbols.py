"""Names for addresses of code."""

from bisect import bisect_right
from collections.abc import Mapping
from typing import Final

__all__ = ["Symbols", "places"]

_FARTHEST: Final = 1 << 16


class Symbols:
    """Finds the symbol at or before an address; `names` maps names to linear addresses."""

    def __init__(self, names: Mapping[str, int] | None = None) -> None:
        self.names = dict(names or {})
        by_address = sorted((address, name) for name, address in self.names.items())
        self._addresses = [address for address, _ in by_address]
        self._names = [name for _, name in by_address]

    def at(self, address: int) -> str:
        """Such as "start" or "start+0x3"; empty where no symbol is near below."""
        index = bisect_right(self._addresses, address) - 1
        if index < 0:
            return ""
        distance = address - self._addresses[index]
        if distance > _FARTHEST:
            return ""
        return self._names[index] + (f"+{distance:#x}" if distance else "")


def places(names: Mapping[str, int], start: int, size: int) -> dict[str, int]:
    """Those of an image's symbols that lie in its bytes: the others are constants, not places."""
    return {name: value for name, value in names.items() if start <= value < start + size}
