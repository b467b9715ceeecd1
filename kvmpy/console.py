"""What the guest has printed: kept for `machine.console`, and passed on as it comes."""

from collections.abc import Callable
from typing import Final

__all__ = ["Console"]

KEPT: Final = 16 << 20


class Console:
    """Collects the console's bytes; keeps the last 16 MiB and counts what it dropped.

    `output`, if any, is called with each piece as the guest writes it.
    """

    def __init__(self, output: Callable[[bytes], object] | None = None) -> None:
        self.output = output
        self.dropped = 0
        self._kept = bytearray()

    def write(self, data: bytes) -> None:
        """Take what a console device was given."""
        self._kept += data
        if len(self._kept) > 2 * KEPT:
            self.dropped += len(self._kept) - KEPT
            del self._kept[:-KEPT]
        if self.output is not None:
            self.output(data)

    def data(self) -> bytes:
        """Everything that is kept, in the order in which the guest wrote it."""
        return bytes(self._kept)

    def replace(self, data: bytes) -> None:
        """Keep `data` instead, as a machine does that goes back to an earlier moment."""
        self._kept[:] = data

    def clear(self) -> None:
        """Forget what is kept."""
        self._kept.clear()
        self.dropped = 0
