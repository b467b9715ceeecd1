"""Power-off by one write: port 0x604, value 0x2000.

This is the PM1a control register of ACPI (ACPI specification, "PM1 Control Registers") where
QEMU's PC has it (Bochs has it at 0xb004): bit 13 is SLP_EN, and a sleep type of 0 in bits 10
to 12 means S5, soft off, on both.
"""

from collections.abc import Callable

from .words import register

__all__ = ["PORT", "SIZE", "PowerOff"]

PORT = 0x604
SIZE = 2

_SLEEP_ENABLE = 0x2000


class PowerOff:
    """Calls `on_power_off()` at a 16-bit write of 0x2000; ignores other writes, reads give 0."""

    name = "power off"

    def __init__(self, on_power_off: Callable[[], object]) -> None:
        self.on_power_off = on_power_off

    def read(self, offset: int, size: int) -> int:
        """Return 0: the machine is awake."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Power off, where the write is the one that asks for it."""
        if offset == 0 and size == SIZE and value == _SLEEP_ENABLE:
            self.on_power_off()

    def describe(self, offset: int, size: int, value: int, write: bool) -> str:
        """The access in words."""
        return register({0: "PM1a control"}, offset, size, value, write)
