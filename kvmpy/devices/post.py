"""POST codes: the progress bytes that firmware writes to port 0x80.

A PC's diagnostic card shows the last one (IBM PC/AT Technical Reference, "POST"). Linux
writes to the same port for a short delay, so codes may arrive that mean nothing.
"""

from collections import deque

from ..bus import ones
from .state import packed, unpacked

__all__ = ["PORT", "SIZE", "PostCode"]

PORT = 0x80
SIZE = 1

_KEPT = 4096


class PostCode:
    """Keeps the last 4096 codes in `codes`, the newest in `last`, and their number in `count`.

    `last` is None until the first code. The port is one byte wide: of a wider write the
    lowest byte is the code. Reads give ones, for nothing answers on a card that only listens.
    """

    name = "POST code"

    def __init__(self) -> None:
        self.codes: deque[int] = deque(maxlen=_KEPT)
        self.count = 0

    @property
    def last(self) -> int | None:
        """The newest code, or None."""
        return self.codes[-1] if self.codes else None

    def read(self, offset: int, size: int) -> int:
        """Return all ones."""
        return ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Keep a code."""
        self.count += 1
        self.codes.append(value & 0xFF)

    def save_state(self) -> bytes:
        """The codes and their number, as JSON."""
        return packed({"codes": list(self.codes), "count": self.count})

    def load_state(self, state: bytes) -> None:
        """Take what `save_state` gave."""
        values = unpacked(state)
        self.codes = deque(values["codes"], maxlen=_KEPT)
        self.count = values["count"]
