"""The debug console: a guest writes a byte to one port, the host prints it.

Port 0xe9 is the "port E9 hack" of Bochs (Bochs user manual, `port_e9_hack`), port 0x402 the
debug port of SeaBIOS and OVMF; QEMU's `isa-debugcon` device serves either, and a guest that
reads 0xe9 from it knows that the console is there.
"""

from collections.abc import Callable

from ..bus import ones
from .words import moved

__all__ = ["FIRMWARE_PORT", "PORT", "SIZE", "DebugConsole"]

PORT = 0xE9
FIRMWARE_PORT = 0x402
SIZE = 1

_PRESENT = 0xE9


class DebugConsole:
    """Hands each byte written to `output`, at once; a read answers 0xe9, "I am here".

    The console is one port wide. A bus splits a wider write into bytes for consecutive
    ports, so of `out 0xe9, ax` only AL is for the console, as on QEMU: AH belongs to the
    next port, which nobody owns. The bytes above the first read as ones for the same reason.
    """

    name = "debug console"

    def __init__(self, output: Callable[[bytes], object]) -> None:
        self.output = output

    def read(self, offset: int, size: int) -> int:
        """Return 0xe9 in the lowest byte and ones above it."""
        return ones(size) & ~0xFF | _PRESENT

    def write(self, offset: int, size: int, value: int) -> None:
        """Give the lowest byte of `value` to the output."""
        self.output((value & 0xFF).to_bytes())

    def describe(self, offset: int, size: int, value: int, write: bool) -> str:
        """The access in words."""
        return moved(value, size, write, letter=write)
