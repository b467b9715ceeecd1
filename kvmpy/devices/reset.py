"""The two ways a PC's software resets it: the keyboard controller and port 0xcf9.

Sources: Intel 8042 (IBM PC/AT Technical Reference, "Keyboard Controller": commands 0xf0 to
0xff pulse output port bits, bit 0 being the system reset line), and the reset control
register of Intel's chipsets (ICH9 data sheet, "RST_CNT - Reset Control Register").
"""

from collections.abc import Callable

from ..bus import ones
from .words import moved

__all__ = ["CONTROL_PORT", "KEYBOARD_PORT", "SIZE", "KeyboardReset", "ResetControl"]

KEYBOARD_PORT = 0x64
CONTROL_PORT = 0xCF9
SIZE = 1

_PULSE = 0xF0
_PULSE_RESET_LINE = 0x01  # active low: a clear bit pulses the line

_SYSTEM_RESET = 0x02
_RESET_CPU = 0x04
_FULL_RESET = 0x08


class KeyboardReset:
    """The command port of a keyboard controller that can do nothing but reset the machine.

    Command 0xfe, and any of 0xf0 to 0xff with bit 0 clear, calls `on_reset()`; all others are
    ignored. A read gives the status 0: input buffer empty, so that a guest that waits for it
    goes on, and no key in the output buffer. There is no keyboard behind port 0x60.
    """

    name = "keyboard controller"

    def __init__(self, on_reset: Callable[[], object]) -> None:
        self.on_reset = on_reset

    def read(self, offset: int, size: int) -> int:
        """Return the status 0 in the lowest byte and ones above it, where no port of ours is."""
        return ones(size) & ~0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a command."""
        if value & 0xF0 == _PULSE and not value & _PULSE_RESET_LINE:
            self.on_reset()

    def describe(self, offset: int, size: int, value: int, write: bool) -> str:
        """The access in words."""
        return f"{'command' if write else 'status'} {moved(value, size, write)}"


class ResetControl:
    """The reset control register: setting bit 2 (RST_CPU) calls `on_reset()`.

    Bits 1 (SYS_RST) and 3 (FULL_RST) are kept and read back; they choose between kinds of
    reset that are one and the same here. RST_CPU acts on a change from 0 to 1, and the
    reset that follows clears the register, so the bit never reads as 1.
    """

    name = "reset control"

    def __init__(self, on_reset: Callable[[], object]) -> None:
        self.on_reset = on_reset
        self._register = 0

    def read(self, offset: int, size: int) -> int:
        """Return the register in the lowest byte and ones above it."""
        return ones(size) & ~0xFF | self._register

    def write(self, offset: int, size: int, value: int) -> None:
        """Keep the bits, or reset."""
        if value & _RESET_CPU:
            self._register = 0
            self.on_reset()
        else:
            self._register = value & (_SYSTEM_RESET | _FULL_RESET)

    def save_state(self) -> bytes:
        """The register."""
        return bytes([self._register])

    def load_state(self, state: bytes) -> None:
        """Take what `save_state` gave."""
        (self._register,) = state
